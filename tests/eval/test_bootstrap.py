"""Confidence intervals of a mean by the block bootstrap."""

from __future__ import annotations

import pytest
import torch
from dma_hf_eval.bootstrap import Bootstrap


def test_independent_values_have_the_interval_of_the_normal_distribution() -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(3))
    low, high = Bootstrap(block=1, resamples=4000).interval(values)
    half_width = 1.96 * (values.std() / 4000**0.5).item()
    assert (high - low) / 2 == pytest.approx(half_width, rel=0.05)
    assert (high + low) / 2 == pytest.approx(values.mean().item(), abs=0.1 * half_width)


def test_values_that_come_in_clusters_need_blocks() -> None:
    clusters = torch.randn(200, generator=torch.Generator().manual_seed(3)).repeat_interleave(50)
    single = Bootstrap(block=1).interval(clusters)
    blocks = Bootstrap(block=50).interval(clusters)
    assert (blocks[1] - blocks[0]) / (single[1] - single[0]) == pytest.approx(50**0.5, rel=0.15)


def test_the_same_values_give_the_same_interval() -> None:
    values = torch.arange(1000.0)
    assert Bootstrap().interval(values) == Bootstrap().interval(values)
    assert Bootstrap().interval(values) != Bootstrap(seed=1).interval(values)


def test_a_constant_has_no_width_and_a_short_text_still_has_blocks() -> None:
    assert Bootstrap().interval(torch.full((77,), 0.25)) == (0.25, 0.25)
    low, high = Bootstrap(block=256).interval(torch.arange(60.0))
    assert low < 29.5 < high


def test_more_confidence_is_wider() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(3))
    (low90, high90), (low99, high99) = (Bootstrap(confidence=c).interval(values) for c in (0.9, 0.99))
    assert low99 < low90 < high90 < high99


def test_no_values_no_interval() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        Bootstrap().interval(torch.empty(0))
