"""Padding masks as key ranges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dma_hf.masks import padding_ranges


def test_left_right_both_none_and_all_padding():
    mask = torch.tensor(
        [
            [0, 0, 1, 1, 1],  # left
            [1, 1, 1, 0, 0],  # right
            [0, 1, 1, 1, 0],  # both
            [1, 1, 1, 1, 1],
            [0, 0, 0, 0, 0],
        ]
    )
    expected = [[2, 5], [0, 3], [1, 4], [0, 5], [0, 0]]
    for dtype in (torch.bool, torch.int64, torch.int32, torch.uint8):
        ranges = padding_ranges(mask.to(dtype))
        assert ranges.dtype == torch.int32
        assert ranges.tolist() == expected


@given(length=st.integers(1, 40), data=st.data())
def test_any_range_is_found(length, data):
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[0, start:stop] = True
    assert padding_ranges(mask).tolist() == [[start, stop]]


@pytest.mark.parametrize("row", [[1, 0, 1], [0, 1, 0, 1, 0], [1, 1, 0, 0, 1]])
def test_padding_between_real_tokens_is_refused(row):
    with pytest.raises(NotImplementedError, match=r"padding_mask has padding between real tokens"):
        padding_ranges(torch.tensor([[1] * len(row), row]))


def test_a_mask_that_is_not_two_dimensional_is_refused():
    with pytest.raises(ValueError, match=r"padding_mask has shape \[1, 1, 4, 4\]"):
        padding_ranges(torch.ones(1, 1, 4, 4))
