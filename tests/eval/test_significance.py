"""Paired tests: against exact values, against lm-eval's standard error, and at their limits."""

from __future__ import annotations

import math
import random

import pytest
from dma_hf_eval.significance import flips, is_right_or_wrong, mcnemar, paired_bootstrap
from lm_eval.api.metrics import mean_stderr


def perplexity(log_likelihoods: list[float]) -> float:
    return math.exp(-sum(log_likelihoods) / len(log_likelihoods))


def test_mcnemar_is_the_binomial_test_of_the_changed_answers() -> None:
    # 8 lost, 1 gained, 11 the same: 2 (C(9,0) + C(9,1)) / 2^9
    baseline = [1] * 8 + [0] + [1] * 6 + [0] * 5
    other = [0] * 8 + [1] + [1] * 6 + [0] * 5
    assert mcnemar(baseline, other) == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar(other, baseline) == mcnemar(baseline, other)
    assert mcnemar(baseline, baseline) == 1.0


def test_flips_are_the_samples_that_changed() -> None:
    assert flips([1, 1, 0, 0, 1.0], [0, True, 0, 1, 0.0]) == ([0, 4], [3])


@pytest.mark.parametrize("values", [[0, 0.5], [1, 2], [0, "1"], [float("nan")]])
def test_other_values_are_neither_right_nor_wrong(values: list[object]) -> None:
    assert not is_right_or_wrong(values)
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar(values, [0] * len(values))  # type: ignore[arg-type]


def test_the_standard_error_of_a_mean_is_that_of_lm_eval() -> None:
    rng = random.Random(0)
    baseline = [rng.random() for _ in range(50)]
    other = [value + rng.gauss(0, 0.1) for value in baseline]
    result = paired_bootstrap(baseline, other)
    assert result.baseline_error == pytest.approx(mean_stderr(baseline))
    assert result.other_error == pytest.approx(mean_stderr(other))


def test_pairs_show_what_two_separate_runs_would_hide() -> None:
    rng = random.Random(1)
    baseline = [rng.gauss(0, 10) for _ in range(40)]
    worse = [value + 0.1 + rng.gauss(0, 0.1) for value in baseline]
    noise = [value + rng.gauss(0, 0.1) for value in baseline]
    result = paired_bootstrap(baseline, worse)
    assert result.baseline_error is not None
    assert result.other - result.baseline < result.baseline_error / 10
    assert result.interval is not None
    assert 0 < result.interval[0] < result.other - result.baseline < result.interval[1] < 0.2
    assert result.p_value is not None
    assert result.p_value < 0.01
    assert (paired_bootstrap(baseline, noise).p_value or 0) > 0.05
    assert paired_bootstrap(baseline, baseline).p_value == 1.0


def test_the_mean_may_be_any_statistic() -> None:
    rng = random.Random(2)
    baseline = [rng.gauss(-2, 0.5) for _ in range(30)]
    other = [value - 0.2 + rng.gauss(0, 0.05) for value in baseline]
    result = paired_bootstrap(baseline, other, perplexity, resamples=200)
    assert result.baseline == pytest.approx(perplexity(baseline))
    assert result.interval is not None
    assert result.interval[0] < result.other - result.baseline < result.interval[1]
    # the error of exp(-m) is exp(-m) times that of m
    expected = perplexity(other) * mean_stderr(other)
    assert result.other_error == pytest.approx(expected, rel=0.2)
    mean = paired_bootstrap(baseline, other, lambda values: sum(values) / len(values))
    fast = paired_bootstrap(baseline, other)
    assert (mean.interval, mean.p_value) == (pytest.approx(fast.interval), fast.p_value)


def test_few_samples_prove_nothing() -> None:
    result = paired_bootstrap([1.0, 2.0, 3.0], [1.1, 2.2, 3.1])
    assert result.p_value == 0.25  # all three changed the same way: once in four by chance
    single = paired_bootstrap([1.0], [2.0])
    assert (single.baseline, single.other) == (1.0, 2.0)
    assert (single.baseline_error, single.interval, single.p_value) == (None, None, None)


def test_what_is_not_finite_has_no_test() -> None:
    result = paired_bootstrap([0.0, 1.0], [math.inf, 1.0])
    assert (result.interval, result.p_value) == (None, None)


def test_the_same_samples_are_needed() -> None:
    with pytest.raises(ValueError, match="the same samples, got 2 and 1"):
        paired_bootstrap([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="at least one sample"):
        paired_bootstrap([], [])
