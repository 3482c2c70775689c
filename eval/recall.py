"""Long-range recall: does the model still find what it read thousands of tokens ago?

Perplexity on running text is decided by nearby tokens, so it hides damage to attention far from the
diagonal. The two measures here do not:

* **passkey accuracy**: a five-digit number is stated once, and asked for again `distance` tokens of
  unrelated text later (the passkey retrieval task of Mohtashami and Jaggi, 2023, arXiv 2305.16300,
  with running text as filler);
* **second-copy perplexity**: a passage appears twice, and only its second appearance is scored.

Both call ``model(input_ids).logits`` and work with any causal language model and any attention.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NEEDLE = "\nThe secret number of {name} is {number}.\n"
QUESTION = "\nQuestion: what is the secret number of {name}?\nAnswer:"

# Not used as names in the training of the built-in model.
NAMES = (
    "anchor", "basket", "candle", "copper", "dragon", "engine", "feather", "garden",
    "hammer", "island", "jacket", "kettle", "lantern", "marble", "needle", "orange",
    "pepper", "quarry", "ribbon", "silver", "tunnel", "velvet", "window", "winter",
)  # fmt: skip

# Filler before the needle. It keeps the needle out of the first 128 tokens: the sink tile, which
# DMA attends to in high precision whatever the distance.
LEAD = 256

Progress = Callable[[int], None]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _start_tokens(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, for tokenizers that put one before every text."""
    special = list(tokenizer("")["input_ids"])
    return special[:1] if special and special[0] == tokenizer.bos_token_id else []


def _check_context(model: Any, length: int, what: str) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and length > context:
        raise ValueError(f"{what} needs {length} tokens; the model's context is {context} tokens")


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def passkey_accuracy(
    model: Any,
    tokenizer: Any,
    filler: str,
    *,
    distances: Sequence[int],
    samples: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[int, float]:
    """Fraction of five-digit numbers recalled exactly, per distance.

    A prompt is ``filler (256 tokens) | NEEDLE | filler (distance tokens) | QUESTION``. The answer
    counts when every one of its tokens is the model's most likely next token, which is the same as
    greedy decoding giving the number. The samples of a distance depend on ``seed`` and the distance
    alone, so two attentions see the same prompts.

    Args:
        model: causal language model; called as ``model(input_ids).logits``, batch size 1.
        tokenizer: its Transformers tokenizer.
        filler: running text; at least ``256 + max(distances)`` tokens.
        distances: tokens between the end of the needle and the start of the question.
        samples: prompts per distance.
        seed: chooses filler, names and numbers.
        progress: called with 1 after every prompt.

    Returns:
        ``{distance: accuracy}``, accuracies between 0 and 1.

    Raises:
        ValueError: the filler is too short, a prompt exceeds the model's context, or ``samples`` or
            a distance is below 1.
    """
    _check_positive(samples=samples)
    text = _encode(tokenizer, filler)
    start = _start_tokens(tokenizer)
    accuracy = {}
    for distance in distances:
        _check_positive(distance=distance)
        if len(text) < LEAD + distance:
            raise ValueError(f"filler has {len(text)} tokens; distance {distance} needs {LEAD + distance}")
        rng = random.Random(f"{seed}:{distance}")
        correct = 0
        for _ in range(samples):
            name, number = rng.choice(NAMES), f"{rng.randrange(100_000):05d}"
            offset = rng.randrange(len(text) - LEAD - distance + 1)
            question = QUESTION.format(name=name)
            # Tokenised together: where the answer's tokens begin is the tokenizer's business.
            answered = _encode(tokenizer, f"{question} {number}")
            asked = _encode(tokenizer, question)
            same = (a == b for a, b in zip(asked, answered, strict=False))
            answer_length = len(answered) - next((i for i, s in enumerate(same) if not s), len(asked))
            ids = [
                *start,
                *text[offset : offset + LEAD],
                *_encode(tokenizer, NEEDLE.format(name=name, number=number)),
                *text[offset + LEAD : offset + LEAD + distance],
                *answered,
            ]
            _check_context(model, len(ids), f"distance {distance}")
            correct += _is_argmax(model, ids, answer_length)
            if progress is not None:
                progress(1)
        accuracy[distance] = correct / samples
    return accuracy


def _is_argmax(model: Any, ids: list[int], count: int) -> bool:
    """Whether each of the last `count` tokens is the most likely one after those before it."""
    tokens = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        predicted = model(tokens[:, :-1]).logits[0, -count:].argmax(-1)
    return bool((predicted == tokens[0, -count:]).all())


def second_copy_perplexity(
    model: Any,
    token_ids: Tensor,
    *,
    passage: int = 512,
    distance: int = 1900,
    samples: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    """Perplexity of the second copy of a passage, running text between the two copies.

    A sequence is ``distance`` tokens of text followed by its own first ``passage`` tokens again.
    All tokens of the second copy are scored, the first few too, which nothing announces.

    Args:
        model: causal language model; called as ``model(input_ids).logits``, batch size 1.
        token_ids: the text, 1-D LongTensor ``[length]``, at least ``distance`` tokens.
        passage: length of the passage, in tokens.
        distance: tokens from the start of the first copy to the start of the second; at least
            ``passage``.
        samples: sequences, each from a random place in the text.
        seed: chooses the places.
        progress: called with 1 after every sequence.

    Returns:
        exp of the mean negative log-likelihood (nats) over ``samples * passage`` tokens.

    Raises:
        ValueError: ``token_ids`` is not 1-D or too short, ``distance < passage``, or a sequence
            exceeds the model's context.
    """
    _check_positive(passage=passage, samples=samples)
    if token_ids.ndim != 1:
        raise ValueError(f"token_ids must be 1-D, got shape {tuple(token_ids.shape)}")
    if distance < passage:
        raise ValueError(f"distance must be at least passage ({passage}), got {distance}")
    if len(token_ids) < distance:
        raise ValueError(f"token_ids has {len(token_ids)} tokens; distance {distance} needs more")
    _check_context(model, distance + passage, f"distance {distance} with passage {passage}")
    rng = random.Random(f"{seed}:{distance}")
    total = 0.0
    for _ in range(samples):
        offset = rng.randrange(len(token_ids) - distance + 1)
        text = token_ids[offset : offset + distance]
        tokens = torch.cat([text, text[:passage]]).to(model.device)
        with torch.inference_mode():
            logits = model(tokens[None, :-1]).logits[0, -passage:].float()
            total += F.cross_entropy(logits, tokens[-passage:]).item()
        if progress is not None:
            progress(1)
    return math.exp(total / samples)
