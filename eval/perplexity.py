"""Perplexity and divergence of DMA against SDPA on one text, window by window.

The windows are the outer loop and the attentions the inner one. SDPA's logits of a window are the
reference of every other run on it, so memory holds two sets of logits however many runs there are.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention import attention
from .divergence import compare_logits
from .errors import EvalError, UsageError, first_line
from .progress import Advance
from .recall import second_copy_perplexity
from .runs import SDPA, Run
from .windows import Window, sliding_windows


@dataclass(frozen=True)
class RecallTask:
    """The long-range passage that every run repeats: sizes in tokens, see ``recall``."""

    passage: int
    distance: int
    samples: int

    @classmethod
    def fitting(cls, context: int) -> RecallTask:
        """A 512-token passage repeated 1,900 tokens later, or what of it fits into ``context``."""
        passage = min(512, context // 4)
        return cls(passage, min(1900, context - passage), samples=4)


@dataclass
class RunResult:
    """What one run measured. Per-token values cover the scored tokens in the order of the text."""

    run: Run
    loss: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    agree: list[Tensor] = field(default_factory=list)
    recall_perplexity: float = math.nan
    seconds: float = 0.0
    """Time in the model's forward passes over the windows (recall not included)."""

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood per scored token."""
        return math.exp(_mean(self.loss))

    def summary(self, baseline: RunResult) -> dict[str, Any]:
        """The run as results files hold it. ``delta_percent`` is relative to ``baseline``."""
        return {
            **self.run.describe(),
            "perplexity": self.perplexity,
            "delta_percent": 100 * (self.perplexity / baseline.perplexity - 1),
            "kl_mean": _mean(self.kl),
            "top1_agreement": _mean(self.agree),
            "recall_perplexity": self.recall_perplexity,
            "seconds": self.seconds,
        }


def _mean(parts: list[Tensor]) -> float:
    return torch.cat(parts).double().mean().item()


def compare_perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    runs: Sequence[Run],
    *,
    context: int,
    stride: int,
    recall: RecallTask,
    advance: Advance = lambda steps: None,
) -> list[RunResult]:
    """Runs ``model`` over ``tokens`` with every attention of ``runs``, SDPA first.

    Args:
        model: a causal language model in evaluation mode.
        tokens: the text, LongTensor [tokens]; all but the first are scored, each once.
        runs: the attentions; the first is SDPA, the reference of KL and agreement.
        context: tokens in a window.
        stride: tokens that windows advance by (see ``windows``).
        recall: the second-copy test that each run takes as well.
        advance: told 1 after each of ``steps(...)`` steps.

    Raises:
        UsageError: if a run asks for what DMA refuses on this model.
        EvalError: if a run's logits are not finite.
    """
    if not runs or runs[0] != SDPA:
        raise ValueError("the first of runs must be SDPA: the others are measured against it")
    windows = sliding_windows(len(tokens), context=context, stride=stride)
    results = [RunResult(run) for run in runs]
    if model.device.type == "cuda":
        # The first call of a kernel compiles it, which is no part of what a run costs.
        for run in runs:
            _logits(model, run, tokens, windows[0])
    for window in windows:
        reference: Tensor | None = None
        targets = tokens[window.targets].to(model.device)
        for result in results:
            logits, seconds = _logits(model, result.run, tokens, window)
            reference = logits if reference is None else reference
            compared = compare_logits(reference, logits, targets)
            del logits  # before the next run makes its own
            if not bool(compared.loss.isfinite().all() and compared.kl.isfinite().all()):
                raise EvalError(
                    f"run '{result.run.name}': the model's logits are not finite in the window that"
                    f" starts at token {window.start} (for float16 try --dtype bfloat16)"
                )
            result.loss.append(compared.loss)
            result.kl.append(compared.kl)
            result.agree.append(compared.agree)
            result.seconds += seconds
            advance(1)
    for result in results:
        with attention(model, result.run.config):
            result.recall_perplexity = second_copy_perplexity(
                model,
                tokens,
                passage=recall.passage,
                distance=recall.distance,
                samples=recall.samples,
                progress=advance,
            )
    return results


def steps(tokens: int, runs: int, *, context: int, stride: int, recall: RecallTask) -> int:
    """How many steps ``compare_perplexity`` reports: one per forward pass."""
    windows = sliding_windows(tokens, context=context, stride=stride)
    return runs * (len(windows) + recall.samples)


def _logits(model: PreTrainedModel, run: Run, tokens: Tensor, window: Window) -> tuple[Tensor, float]:
    """The window's logits of the scored positions [scored, vocabulary], and the seconds taken."""
    inputs = tokens[window.inputs].to(model.device)[None]
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = window.scored  # no memory for logits that nobody scores
    try:
        with attention(model, run.config), torch.inference_mode():
            _synchronize(model)
            start = time.perf_counter()
            logits = model(inputs, **options).logits[0, -window.scored :]
            _synchronize(model)
            return logits, time.perf_counter() - start
    except (NotImplementedError, ValueError) as error:
        if run.config is None:
            raise
        raise UsageError(f"--config '{run.name}': {first_line(error)}") from error


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
