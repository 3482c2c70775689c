"""Perplexity and divergence of DMA against SDPA on one text, window by window.

The windows are the outer loop and the attentions the inner one. SDPA's logits of a window are the
reference of every other run on it, so memory holds two sets of logits however many runs there are.
"""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention import attention
from .bootstrap import Bootstrap
from .divergence import compare_logits
from .errors import EvalError, UsageError, first_line
from .failures import Failures
from .journal import NO_JOURNAL, Journal, text_fingerprint
from .pieces import Pieces
from .progress import Advance
from .recall import second_copy_perplexity
from .runs import SDPA, Run
from .windows import Window, sliding_windows

SCHEMA = 2
"""Of perplexity.json; see ``results``."""
BOOTSTRAP = Bootstrap()
FIRST_BIN = 128
"""Where the first bin of ``by_position`` ends: at DMA's default diagonal. The next ends twice as far."""

Logits = tuple[Tensor, float]
"""The logits of a window's scored positions [scored, vocabulary], and the seconds they took."""


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
    position: list[Tensor] = field(default_factory=list)
    """How many tokens of its window the model had read to predict the token (see ``windows``)."""
    recall_perplexity: float = math.nan
    seconds: float = 0.0
    """Time in the model's forward passes over the windows (recall not included)."""

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood per scored token."""
        return math.exp(_mean(self.loss))

    def delta_percent_interval(self, baseline: RunResult) -> tuple[float, float]:
        """Confidence interval of the change of perplexity against ``baseline``, in percent.

        The ratio of two perplexities on the same tokens is exp of the mean difference of the losses, so
        the interval is that of this mean (see ``bootstrap``), through the exponential.
        """
        low, high = BOOTSTRAP.interval(torch.cat(self.loss).double() - torch.cat(baseline.loss).double())
        return 100 * math.expm1(low), 100 * math.expm1(high)

    def by_position(self, baseline: RunResult) -> list[dict[str, Any]]:
        """Loss, its change against ``baseline`` and KL, in nats, by position in the context.

        The bins double from ``FIRST_BIN``; those in which nothing was scored are left out.
        """
        position = torch.cat(self.position)
        loss, expected, kl = (torch.cat(parts).double() for parts in (self.loss, baseline.loss, self.kl))
        bins = []
        first, last = 1, FIRST_BIN
        while first <= int(position.max()):
            inside = (position >= first) & (position <= last)
            if bool(inside.any()):
                bins.append(
                    {
                        "first": first,
                        "last": min(last, int(position.max())),
                        "tokens": int(inside.sum()),
                        "loss": loss[inside].mean().item(),
                        "delta_loss": (loss - expected)[inside].mean().item(),
                        "kl": kl[inside].mean().item(),
                    }
                )
            first, last = last + 1, 2 * last
        return bins

    def summary(self, baseline: RunResult) -> dict[str, Any]:
        """The run as results files hold it. Changes are relative to ``baseline``."""
        return {
            **self.run.describe(),
            "perplexity": self.perplexity,
            "delta_percent": 100 * (self.perplexity / baseline.perplexity - 1),
            "delta_percent_interval": list(self.delta_percent_interval(baseline)),
            "kl_mean": _mean(self.kl),
            "top1_agreement": _mean(self.agree),
            "recall_perplexity": self.recall_perplexity,
            "seconds": self.seconds,
            "by_position": self.by_position(baseline),
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
    journal: Journal = NO_JOURNAL,
    failures: Failures | None = None,
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
        journal: of what is already measured (see ``journal``). Its key must hold the model.
        failures: takes note of runs that fail, and the others go on. Runs that it already holds are
            left out. By default the first failure is raised.
        advance: told 1 after each of ``steps(...)`` steps.

    Returns:
        The results of the runs that did not fail, in their order.

    Raises:
        UsageError: if a run asks for what DMA refuses on this model.
        EvalError: if a run's logits are not finite.
    """
    if not runs or runs[0] != SDPA:
        raise ValueError("the first of runs must be SDPA: the others are measured against it")
    windows = sliding_windows(len(tokens), context=context, stride=stride)
    pieces = Pieces(journal, failures, advance)
    text = text_fingerprint(tokens)
    results = [RunResult(run) for run in runs]

    @functools.cache
    def warm_up(run: Run) -> None:
        # The first call of a kernel compiles it, which is no part of what a run costs.
        if model.device.type == "cuda":
            _logits(model, run, tokens, windows[0])

    def logits(run: Run, window: Window) -> Logits:
        warm_up(run)
        return _logits(model, run, tokens, window)

    for window in windows:
        # Kept for this window, and only computed if some run of it is not in the journal.
        reference = functools.cache(functools.partial(logits, SDPA, window))
        targets = tokens[window.targets].to(model.device)
        for result in results:
            own = reference if result.run == SDPA else functools.partial(logits, result.run, window)
            compute = functools.partial(_compare, result.run, window, targets, reference, own)
            place = [window.start, window.stop, window.scored]
            found = pieces.measure(result.run, compute, text=text, window=place)
            if found is not None:
                result.loss.append(found["loss"])
                result.kl.append(found["kl"])
                result.agree.append(found["agree"])
                result.position.append(torch.tensor(window.positions))
                result.seconds += found["seconds"]
    for result in results:
        recall_it = functools.partial(_recall, model, result.run, tokens, recall)
        found = pieces.measure(result.run, recall_it, steps=recall.samples, text=text, recall=asdict(recall))
        if found is not None:
            result.recall_perplexity = found
    return [result for result in results if not pieces.failed(result.run)]


def steps(tokens: int, runs: int, *, context: int, stride: int, recall: RecallTask) -> int:
    """How many steps ``compare_perplexity`` reports: one per forward pass."""
    windows = sliding_windows(tokens, context=context, stride=stride)
    return runs * (len(windows) + recall.samples)


def _compare(
    run: Run, window: Window, targets: Tensor, reference: Callable[[], Logits], own: Callable[[], Logits]
) -> dict[str, Any]:
    """One window of one run against SDPA's logits: per-token values and seconds, for the journal."""
    expected, _ = reference()
    logits, seconds = own()
    compared = compare_logits(expected, logits, targets)
    if not bool(compared.loss.isfinite().all() and compared.kl.isfinite().all()):
        raise EvalError(
            f"run '{run.name}': the model's logits are not finite in the window that"
            f" starts at token {window.start} (for float16 try --dtype bfloat16)"
        )
    return {"loss": compared.loss, "kl": compared.kl, "agree": compared.agree, "seconds": seconds}


def _recall(model: PreTrainedModel, run: Run, tokens: Tensor, task: RecallTask) -> float:
    with attention(model, run.config):
        return second_copy_perplexity(
            model, tokens, passage=task.passage, distance=task.distance, samples=task.samples
        )


def _logits(model: PreTrainedModel, run: Run, tokens: Tensor, window: Window) -> Logits:
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
