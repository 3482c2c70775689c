"""Recall over distance, DMA against SDPA: where the low-precision tiles would show their damage."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .attention import attention
from .errors import UsageError, first_line
from .failures import Failures
from .journal import NO_JOURNAL, Journal, text_fingerprint
from .pieces import Pieces
from .progress import Advance
from .recall import passkey_accuracy, second_copy_perplexity
from .runs import Run

DISTANCES = (1000, 1500, 2000, 2500, 3000, 3500)
"""In tokens: from far outside DMA's diagonal up to what a context of 4,096 tokens holds."""
LONGEST_PASSAGE = 512
PROMPT_RESERVE = 512
"""Tokens kept free beside the longest default distance, for the passage or the passkey's prompt."""


@dataclass
class RecallResult:
    """What one run recalled; the keys of both tables are distances in tokens."""

    run: Run
    passkey_accuracy: dict[int, float] = field(default_factory=dict)
    second_copy_perplexity: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """The run as results files hold it."""
        return {
            **self.run.describe(),
            "passkey_accuracy": {str(d): value for d, value in self.passkey_accuracy.items()},
            "second_copy_perplexity": {str(d): value for d, value in self.second_copy_perplexity.items()},
            "seconds": self.seconds,
        }


def default_distances(context: int) -> list[int]:
    """Those of ``DISTANCES`` that fit into ``context``; in a shorter one, fractions of what does.

    Raises:
        UsageError: if the context is too short to hold a prompt and a distance worth the name.
    """
    reach = context - PROMPT_RESERVE
    if reach < PROMPT_RESERVE:
        raise UsageError(
            f"the model's context of {context} tokens is too short for recall"
            f" ({2 * PROMPT_RESERVE} are needed)"
        )
    fitting = [distance for distance in DISTANCES if distance <= reach]
    return fitting or [reach // 4, reach // 2, reach]


def passage_length(distances: Sequence[int]) -> int:
    """The passage that is repeated: no longer than the shortest way between its two copies."""
    return min(LONGEST_PASSAGE, *distances)


def compare_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    tokens: Tensor,
    runs: Sequence[Run],
    *,
    distances: Sequence[int],
    samples: int,
    journal: Journal = NO_JOURNAL,
    failures: Failures | None = None,
    advance: Advance = lambda steps: None,
) -> list[RecallResult]:
    """Passkey accuracy and second-copy perplexity of every run at every distance.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        text: what stands around and between the things to recall.
        tokens: the same text's ids, LongTensor [tokens].
        runs: the attentions.
        distances: in tokens.
        samples: passkeys, and as many passages, per distance.
        journal: of what is already measured (see ``journal``). Its key must hold the model.
        failures: takes note of runs that fail, and the others go on. By default the first failure is
            raised.
        advance: told how many of ``2 * runs * distances * samples`` forward passes are done.

    Returns:
        The results of the runs that did not fail, in their order.

    Raises:
        UsageError: if a distance does not fit the model or the text, or DMA refuses a run.
    """
    pieces = Pieces(journal, failures, advance)
    passage = passage_length(distances)
    what = {"text": text_fingerprint(tokens), "samples": samples, "passage": passage}
    results = []
    for run in runs:
        result = RecallResult(run)
        for distance in distances:
            passkeys = functools.partial(
                passkey_accuracy, model, tokenizer, text, distances=[distance], samples=samples
            )
            second_copy = functools.partial(
                second_copy_perplexity, model, tokens, passage=passage, distance=distance, samples=samples
            )
            for measure, compute in (("passkeys", passkeys), ("second copy", second_copy)):
                timed = functools.partial(_timed, model, run, compute)
                found = pieces.measure(run, timed, steps=samples, measure=measure, distance=distance, **what)
                if found is not None:
                    value, seconds = found
                    if measure == "passkeys":
                        result.passkey_accuracy[distance] = value[distance]
                    else:
                        result.second_copy_perplexity[distance] = value
                    result.seconds += seconds
        if not pieces.failed(run):
            results.append(result)
    return results


def _timed(model: PreTrainedModel, run: Run, compute: Callable[[], Any]) -> list[Any]:
    """What ``compute`` gives with the attention of ``run``, and the seconds it takes."""
    start = time.perf_counter()
    try:
        with attention(model, run.config):
            return [compute(), time.perf_counter() - start]
    except (NotImplementedError, ValueError) as error:
        raise UsageError(f"recall with '{run.name}': {first_line(error)}") from error
