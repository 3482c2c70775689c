"""The training mixture: running text, some of it made to need recall.

A batch is built on the training device with a few indexing operations, no loop over sequences:
plain windows of the token stream, of which some get *copies* (a span repeated later) and some get
*named numbers* (stated once, asked for again later). Text is overwritten rather than moved, so every
sequence keeps its length.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..recall import NAMES, NEEDLE, QUESTION

STATEMENTS = (
    NEEDLE,
    "\nRemember: {name} has the number {number}.\n",
    "\n{name}: {number}\n",
)
REQUESTS = (
    QUESTION + " {number}\n",
    "\nThe number of {name} was {number}.\n",
    "\n{name} again: {number}\n",
)
DIGITS = 5
_KEEP = -1  # in a snippet: leave the text's own token
_DIGIT = -2  # in a snippet: the number's first digit; its second is _DIGIT - 1, and so on


@dataclass(frozen=True)
class Mixture:
    """Shares of the sequences and sizes, in tokens unless said otherwise."""

    copies: float = 0.35  # share of sequences
    numbers: float = 0.40  # share of sequences; the rest is plain
    max_spans: int = 3  # copied spans per sequence
    min_span: int = 16
    max_span: int = 512
    whole_passages: float = 0.25  # share of the spans that have the maximal length
    min_numbers: int = 2
    max_numbers: int = 8
    slot: int = 32  # room for one statement or request
    answer_weight: float = 4.0  # loss weight of the digits asked for
    names: int = 4000


def common_words(texts: Iterable[str], count: int) -> list[str]:
    """The `count` most frequent words of 4 to 10 letters, without those the recall test uses."""
    frequency: Counter[str] = Counter()
    for text in texts:
        frequency.update(re.findall(r"\b[A-Za-z][a-z]{3,9}\b", text))
    for name in NAMES:
        del frequency[name], frequency[name.capitalize()]
    return [word for word, _ in frequency.most_common(count)]


def _snippets(
    tokenizer: PreTrainedTokenizerFast, templates: Iterable[str], names: list[str], slot: int
) -> Tensor:
    """Templates filled with names, as tokens: [templates, names, slot], right-padded with _KEEP.

    The number's digits are placeholders. Rows that do not fit the slot stay empty.
    """
    digit_ids = tokenizer.convert_tokens_to_ids([str(d) for d in range(DIGITS)])
    placeholder = {token: _DIGIT - i for i, token in enumerate(digit_ids)}
    table = torch.full((len(tuple(templates)), len(names), slot), _KEEP)
    for t, template in enumerate(templates):
        number = "".join(str(d) for d in range(DIGITS))
        texts = [template.format(name=name, number=number) for name in names]
        for n, ids in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"]):
            if len(ids) <= slot:
                table[t, n, : len(ids)] = torch.tensor([placeholder.get(i, i) for i in ids])
    return table


class MixtureSampler:
    """Draws training batches from a token stream.

    Args:
        stream: token ids, 1-D, on the device that trains.
        tokenizer: gives the tokens of the named numbers.
        names: what numbers are named after.
        mixture: shares and sizes.
        seed: the batches are a function of it and of the sequence of calls.

    Raises:
        ValueError: no name fits a slot in every template.
    """

    def __init__(
        self,
        stream: Tensor,
        tokenizer: PreTrainedTokenizerFast,
        names: list[str],
        mixture: Mixture,
        seed: int,
    ) -> None:
        self.stream = stream
        self.mixture = mixture
        self.device = stream.device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        statements = _snippets(tokenizer, STATEMENTS, names, mixture.slot)
        requests = _snippets(tokenizer, REQUESTS, names, mixture.slot)
        fits = ((statements != _KEEP).any(-1) & (requests != _KEEP).any(-1)).all(0)
        if int(fits.sum()) < mixture.max_numbers:
            raise ValueError(
                f"slot must hold every template with {mixture.max_numbers} of the names; "
                f"{mixture.slot} tokens do for {int(fits.sum())} of {len(names)}"
            )
        self.statements = statements[:, fits].to(self.device)
        self.requests = requests[:, fits].to(self.device)
        digits = tokenizer.convert_tokens_to_ids([str(d) for d in range(10)])
        self.digit_ids = torch.tensor(digits, device=self.device)

    def batch(self, sequences: int, context: int) -> tuple[Tensor, Tensor]:
        """Draw a batch.

        Returns:
            ids: int64 [sequences, context + 1]; the model reads ``ids[:, :-1]``, predicts
                ``ids[:, 1:]``.
            weights: float32 [sequences, context + 1], the loss weight of each token of ids.
        """
        length = context + 1
        start = self._integers(0, len(self.stream) - length, sequences)
        ids = self.stream[start[:, None] + self._range(length)].long()
        weights = torch.ones(sequences, length, device=self.device)
        copies = round(self.mixture.copies * sequences)
        numbers = round(self.mixture.numbers * sequences)
        ids[:copies] = self._with_copies(ids[:copies])
        rows = slice(copies, copies + numbers)
        ids[rows], weights[rows] = self._with_numbers(ids[rows], weights[rows])
        return ids, weights

    def _range(self, stop: int) -> Tensor:
        return torch.arange(stop, device=self.device)

    def _random(self, *shape: int) -> Tensor:
        # float64: float32 cannot name every position of a stream of more than 2^24 tokens.
        return torch.rand(shape, dtype=torch.float64, device=self.device, generator=self.generator)

    def _integers(self, low: int | Tensor, high: int | Tensor, *shape: int) -> Tensor:
        """Uniform integers from low to high, both included; bounds may be tensors of `shape`."""
        return (low + self._random(*shape) * (high - low + 1)).long()

    def _with_copies(self, ids: Tensor) -> Tensor:
        """Repeat one to `max_spans` spans of each row later in the row, at any distance."""
        mix, (rows, length) = self.mixture, ids.shape
        longest = min(mix.max_span, 3 * length // 8)
        spans = self._integers(1, mix.max_spans, rows)
        position = self._range(length)
        for i in range(mix.max_spans):
            size = self._integers(mix.min_span, longest, rows)
            size = torch.where(self._random(rows) < mix.whole_passages, longest, size)
            distance = self._integers(size, length - size, rows)
            source = self._integers(0, length - size - distance, rows)
            target = (source + distance)[:, None]
            inside = (position >= target) & (position < target + size[:, None])
            inside &= (i < spans)[:, None]
            ids = ids.gather(1, torch.where(inside, position - distance[:, None], position))
        return ids

    def _with_numbers(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """State `min_numbers` to `max_numbers` named numbers per row, and ask for each later on.

        The row is cut into slots; each number takes two random ones, the earlier for the statement.
        """
        mix, (rows, length) = self.mixture, ids.shape
        most = min(mix.max_numbers, length // mix.slot // 2)
        if most == 0 or rows == 0:
            return ids, weights
        slots = self._random(rows, length // mix.slot).topk(2 * most).indices
        slots = slots.view(rows, most, 2).sort(-1).values
        count = self._integers(min(mix.min_numbers, most), most, rows)
        used = self._range(most) < count[:, None]
        kinds, names, _ = self.statements.shape
        name = self._random(rows, names).topk(most).indices
        number = self._integers(0, 9, rows, most, DIGITS)
        # One column more than the text: what must not be written goes there.
        ids = torch.nn.functional.pad(ids, (0, 1))
        weights = torch.nn.functional.pad(weights, (0, 1))
        for table, slot, weight in (
            (self.statements, slots[..., 0], 1.0),
            (self.requests, slots[..., 1], mix.answer_weight),
        ):
            snippet = table[self._integers(0, kinds - 1, rows, most), name]  # [rows, most, slot]
            is_digit = snippet <= _DIGIT
            digit = number.gather(-1, (_DIGIT - snippet).clamp(0, DIGITS - 1))
            tokens = torch.where(is_digit, self.digit_ids[digit], snippet)
            written = (snippet != _KEEP) & used[..., None]
            room = mix.slot - (snippet != _KEEP).sum(-1)
            first = slot * mix.slot + self._integers(torch.zeros_like(room), room, rows, most)
            place = torch.where(written, first[..., None] + self._range(mix.slot), length)
            ids.scatter_(1, place.flatten(1), tokens.flatten(1))
            factors = torch.where(is_digit, weight, 1.0)
            weights.scatter_(1, place.flatten(1), factors.flatten(1))
        return ids[:, :length], weights[:, :length]
