"""Is a difference between two runs on the same samples more than chance?

Both tests are paired: what makes a sample hard counts in neither run's favour.

* ``mcnemar`` for answers that are right or wrong (McNemar, 1947, in its exact form): of the samples on
  which the runs differ, either run should win about half.
* ``paired_bootstrap`` for any other metric (Efron and Tibshirani, 1993): samples are drawn again and again,
  the same for both runs, and the metric of both is taken anew.

The p-values are two-sided and belong to one comparison; among many, some are small by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest  # type: ignore[import-untyped]

RESAMPLES = 2000
CONFIDENCE = 0.95

Statistic = Callable[[Sequence[Any]], float]


def mcnemar(baseline: Sequence[float], other: Sequence[float]) -> float:
    """The p-value of McNemar's exact test: how likely such a split of the changed answers is by chance.

    Args:
        baseline: 1 for a right answer and 0 for a wrong one, a value per sample.
        other: the same of the other run, on the same samples.

    Raises:
        ValueError: if a value is neither 0 nor 1, or the lengths differ.
    """
    lost, gained = flips(baseline, other)
    changed = len(lost) + len(gained)
    return 1.0 if changed == 0 else float(binomtest(len(lost), changed).pvalue)


def flips(baseline: Sequence[float], other: Sequence[float]) -> tuple[list[int], list[int]]:
    """The positions of the samples that ``other`` answers wrong and ``baseline`` right, and the reverse.

    Raises:
        ValueError: if a value is neither 0 nor 1, or the lengths differ.
    """
    if not (is_right_or_wrong(baseline) and is_right_or_wrong(other)):
        raise ValueError("the values of both runs must be 0 or 1")
    pairs = list(enumerate(zip(baseline, other, strict=True)))
    return [i for i, (a, b) in pairs if a > b], [i for i, (a, b) in pairs if a < b]


def is_right_or_wrong(values: Sequence[Any]) -> bool:
    """Whether every value is 0 or 1."""
    return all(isinstance(value, (bool, int, float)) and value in (0, 1) for value in values)


@dataclass(frozen=True)
class PairedBootstrap:
    """Statistics of two runs, and of their difference ``other - baseline``.

    Standard errors, the interval (``CONFIDENCE``) and the p-value come from the same ``RESAMPLES`` draws.
    They are None where the statistic is not finite in some draw, or there is but one sample.
    """

    baseline: float
    other: float
    baseline_error: float | None
    other_error: float | None
    interval: tuple[float, float] | None
    p_value: float | None


def paired_bootstrap(
    baseline: Sequence[Any],
    other: Sequence[Any],
    statistic: Statistic | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedBootstrap:
    """Compares ``statistic`` of two runs on the same samples.

    Args:
        baseline: what the statistic takes, a value per sample.
        other: the same of the other run, in the same order.
        statistic: of a list of values; None is their mean, which is fast.
        resamples: how often samples are drawn.
        seed: of the draws; the same values give the same result.

    Raises:
        ValueError: if the lengths differ, or there are no samples.
    """
    if len(baseline) != len(other):
        raise ValueError(f"the runs must have the same samples, got {len(baseline)} and {len(other)}")
    if not baseline:
        raise ValueError("there must be at least one sample")
    count = len(baseline)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(count, size=count) for _ in range(resamples))
    if statistic is None:
        first, second = np.asarray(baseline, dtype=float), np.asarray(other, dtype=float)
        values = [float(first.mean()), float(second.mean())]
        drawn = np.array([(first[draw].mean(), second[draw].mean()) for draw in draws])
        errors = [_error_of_mean(first), _error_of_mean(second)]
    else:
        values = [float(statistic(list(run))) for run in (baseline, other)]
        pairs = ([(baseline[i], other[i]) for i in draw] for draw in draws)
        drawn = np.array([[statistic(list(run)) for run in zip(*pair, strict=True)] for pair in pairs])
        errors = [_deviation(run) if count > 1 else None for run in drawn.T]
    interval, p_value = None, None
    if count > 1 and np.isfinite(drawn).all():
        differences = drawn[:, 1] - drawn[:, 0]
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(differences, [tail, 1 - tail])
        interval = (float(low), float(high))
        # One more than was drawn, in both places: no finite number of draws shows that p is 0.
        below = (int((differences <= 0).sum()) + 1) / (resamples + 1)
        above = (int((differences >= 0).sum()) + 1) / (resamples + 1)
        # All draws agree as soon as all samples do, which for few samples is no rare event: by chance,
        # that many differences have the same sign with the probability 2^(1 - count).
        p_value = min(1.0, max(2 * min(below, above), 2.0 ** (1 - count)))
    return PairedBootstrap(
        baseline=values[0],
        other=values[1],
        baseline_error=errors[0],
        other_error=errors[1],
        interval=interval,
        p_value=p_value,
    )


def _deviation(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1)) if np.isfinite(values).all() else None


def _error_of_mean(values: np.ndarray) -> float | None:
    """The standard error of the mean of ``values``; None where there is no such thing."""
    deviation = _deviation(values) if len(values) > 1 else None
    return None if deviation is None else deviation / math.sqrt(len(values))
