"""The documents of the bundled tasks: what ``custom_dataset`` in the task files names.

lm-eval loads this file by its path, so it imports nothing of its package, and the task files work with
the plain ``lm_eval`` command too. Every function takes the size of the task (``dataset_kwargs`` in the
task file) and lm-eval's metadata, of which it needs the tokenizer: lengths are counted in the tokens of
the model that is tested. The running text is what every Python carries for ``help()``.

A document has a ``context`` and the ``answer`` that should follow it. The same tokenizer, Python version and
size always give the same documents.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Sequence
from typing import Any

import datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase

Document = dict[str, Any]
Split = dict[str, datasets.Dataset]

# The wording of recall.py, which the built-in model was trained on.
NEEDLE = "\nThe secret number of {name} is {number}.\n"
QUESTION = "\nQuestion: what is the secret number of {name}?\nAnswer:"

SLACK = 16
"""Tokens that a prompt stays below its length: where texts are joined, they may be cut otherwise."""
LEAD = 110
"""Characters of a passage's second copy that the prompt gives, about 32 tokens: they tell what to copy."""


def passkey(*, length: int, depths: Sequence[float], samples: int, **metadata: Any) -> Split:
    """A five-digit number stated once in running text, and asked for at its end.

    Args:
        length: of prompt and answer, in tokens.
        depths: where the number stands, as fractions of the text.
        samples: numbers per depth.
        metadata: lm-eval's, with "tokenizer" or "pretrained".
    """
    filler = _Filler.of(metadata)
    documents = []
    for depth in depths:
        rng = random.Random(f"passkey {length} {depth}")
        for _ in range(samples):
            name, number = rng.choice(filler.words), _number(rng)
            needle, question = NEEDLE.format(name=name, number=number), QUESTION.format(name=name)
            room = length - SLACK - filler.count(f"{needle}{question} {number}")
            before, after = filler.cut(rng, round(depth * room), room - round(depth * room))
            context = f"{before}{needle}{after}{question}"
            documents.append({"context": context, "answer": number, "depth": depth})
    return _split(documents)


def key_value(*, pairs: int, samples: int, **metadata: Any) -> Split:
    """Many names with a five-digit number each, one after the other; the number of one is asked for."""
    words = _Filler.of(metadata).words
    documents = []
    for sample in range(samples):
        rng = random.Random(f"key-value {pairs} {sample}")
        names = rng.sample(words, pairs)
        numbers = [_number(rng) for _ in names]
        asked = rng.randrange(pairs)
        stated = (NEEDLE.format(name=name, number=n) for name, n in zip(names, numbers, strict=True))
        context = "".join([*stated, QUESTION.format(name=names[asked])])
        documents.append({"context": context, "answer": numbers[asked], "asked": asked})
    return _split(documents)


def copy(*, length: int, words: int, samples: int, **metadata: Any) -> Split:
    """Running text of so many tokens, then a passage of its beginning again: so many words more of it."""
    filler = _Filler.of(metadata)
    documents: list[Document] = []
    for sample in range(samples):
        rng = random.Random(f"copy {length} {sample}")
        passage: re.Match[str] | None = None
        while passage is None:
            (text,) = filler.cut(rng, length - SLACK - LEAD)
            # In its second eighth: far from the end, and behind the sink of a long prompt.
            start = len(text) // 8 + rng.randrange(len(text) // 8)
            passage = re.compile(rf"\s(\S.{{{LEAD},}}?) (\w\S*(?:\s+\S+){{{words - 1}}})\s", re.S).search(
                text, start, start + 20 * LEAD
            )
        documents.append({"context": f"{text}\n\n{passage[1]}", "answer": passage[2]})
    return _split(documents)


def cloze(*, length: int, gap: int, samples: int, **metadata: Any) -> Split:
    """The last word of a sentence that has stood in the text before, after the same word as here.

    Args:
        length: tokens of running text before the word, about.
        gap: tokens before the word in which it does not stand, about: only what is further back tells it.
        samples: at most so many sentences; fewer if the text has fewer.
        metadata: lm-eval's, with "tokenizer" or "pretrained".
    """
    filler = _Filler.of(metadata)
    text, reach, near = filler.text, round(length * filler.characters), round(gap * filler.characters)
    documents = []
    for match in re.finditer(r"(\S+)\s([a-z]{4,})(?=[.:]\s)", text):
        end = match.start(2) - 1
        if end < reach:
            continue
        seen = rf"\b{re.escape(match[1])}\s+{match[2]}\b"
        if re.search(seen, text[end - reach : end - near]) and match[2] not in text[end - near : end]:
            start = text.index(" ", end - reach) + 1
            documents.append({"context": text[start:end], "answer": match[2]})
    return _split(random.Random(f"cloze {length}").sample(documents, min(samples, len(documents))))


def score(document: Document, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """``process_results`` of the task files: does greedy decoding give the answer, and how likely is it?"""
    log_likelihood, greedy = results[0]
    size = len(document["answer"].encode())
    return {"acc": float(greedy), "bits_per_byte": -log_likelihood / math.log(2) / size}


class _Filler:
    """Running text, cut to a number of tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from pydoc_data.topics import topics

        self.tokenizer = tokenizer
        self.text = "\n\n".join(topics.values())
        self.tokens = self._encode(self.text)
        self.characters = len(self.text) / len(self.tokens)  # a token, on average
        self.words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", self.text)))

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> _Filler:
        """The filler for the tokenizer that lm-eval's metadata names."""
        name = metadata.get("tokenizer") or metadata.get("pretrained")
        if not name:
            raise ValueError('the bundled tasks need a tokenizer: --metadata \'{"tokenizer": "NAME"}\'')
        return _filler(str(name), metadata.get("trust_remote_code") is True)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def count(self, text: str) -> int:
        """How many tokens ``text`` has."""
        return len(self._encode(text))

    def cut(self, rng: random.Random, *lengths: int) -> list[str]:
        """Consecutive pieces of so many tokens, from a random place. The text starts again at its end."""
        if min(lengths) < 1:
            raise ValueError(f"a length of {sum(lengths)} tokens leaves no room for text")
        place = rng.randrange(len(self.tokens))
        pieces = []
        for length in lengths:
            places = range(place, place + length)
            pieces.append(self.tokenizer.decode([self.tokens[i % len(self.tokens)] for i in places]))
            place += length
        return pieces


@functools.cache
def _filler(tokenizer: str, trust_remote_code: bool) -> _Filler:
    return _Filler(AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code))


def _number(rng: random.Random) -> str:
    return f"{rng.randrange(100_000):05d}"


def _split(documents: list[Document]) -> Split:
    return {"test": datasets.Dataset.from_list(documents)}
