"""Which keys each query sees: padding, packed sequences, windows and chunks as ranges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dma_hf.masks import (
    POSITION,
    SEQUENCE,
    START,
    STOP,
    has_holes,
    key_ranges_of,
    padding_ranges,
    query_ranges,
)


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
def test_padding_between_real_tokens_is_found_and_counts_as_real(row):
    mask = torch.tensor([[1] * len(row), row])
    first, last = row.index(1), len(row) - row[::-1].index(1)
    assert has_holes(mask)
    assert padding_ranges(mask).tolist() == [[0, len(row)], [first, last]]


@pytest.mark.parametrize("row", [[1, 1, 1], [0, 1, 1, 0], [0, 0, 0], [0, 1], [1, 0]])
def test_padding_at_the_ends_is_no_hole(row):
    assert not has_holes(torch.tensor([[1] * len(row), row]))


def test_a_mask_that_is_not_two_dimensional_is_refused():
    with pytest.raises(ValueError, match=r"padding_mask has shape \[1, 1, 4, 4\]"):
        padding_ranges(torch.ones(1, 1, 4, 4))


# --- query ranges ------------------------------------------------------------------------------------------


def test_causal_queries_align_with_the_last_keys():
    ranges = query_ranges(3, 5, causal=True)
    assert ranges.dtype == torch.int32
    assert ranges.tolist() == [[[0, 3, 0, 2], [0, 4, 0, 3], [0, 5, 0, 4]]]


def test_left_padding_moves_the_start_of_the_sequence():
    ranges = query_ranges(4, 4, causal=True, key_ranges=torch.tensor([[2, 4]]))
    # the queries in the padding see nothing: their ranges are empty
    assert ranges[0, :, [START, STOP]].tolist() == [[1, 1], [2, 2], [2, 3], [2, 4]]
    assert ranges[0, :, SEQUENCE].tolist() == [2, 2, 2, 2]


def test_packed_sequences_see_themselves():
    ranges = query_ranges(5, 5, causal=True, sequence_ids=torch.tensor([[0, 0, 0, 1, 1]]))
    assert ranges[0, :, [START, STOP]].tolist() == [[0, 1], [0, 2], [0, 3], [3, 4], [3, 5]]
    assert ranges[0, :, SEQUENCE].tolist() == [0, 0, 0, 3, 3]


def test_a_window_and_a_chunk():
    window = query_ranges(5, 5, causal=True, left=1)
    assert window[0, :, [START, STOP]].tolist() == [[0, 1], [0, 2], [1, 3], [2, 4], [3, 5]]
    chunk = query_ranges(5, 5, causal=True, chunk=2, key_ranges=torch.tensor([[1, 5]]))
    assert chunk[0, 1:, [START, STOP]].tolist() == [[1, 2], [1, 3], [3, 4], [3, 5]]


def test_ranges_of_a_cache_that_dropped_its_first_tokens_count_from_its_first_key():
    ranges = query_ranges(2, 4, causal=True, query_offset=8, key_offset=6, left=2)
    assert ranges[0, :, [START, STOP, POSITION]].tolist() == [[0, 3, 2], [1, 4, 3]]


@settings(max_examples=60)
@given(
    queries=st.integers(1, 30),
    keys=st.integers(1, 40),
    causal=st.booleans(),
    left=st.none() | st.integers(0, 45),
    right=st.none() | st.integers(0, 45),
    key_offset=st.integers(0, 9),
    data=st.data(),
)
def test_query_ranges_are_the_definition(queries, keys, causal, left, right, key_offset, data):
    """Query i at position p sees key j at position q: real, not behind it if causal, not too far."""
    offset = data.draw(st.integers(0, key_offset + keys))
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, key_offset + keys)] * 2)))
    ranges = query_ranges(
        queries, keys, causal=causal, query_offset=offset, key_offset=key_offset, left=left, right=right,
        key_ranges=torch.tensor([[first, last]]),
    )[0]  # fmt: skip
    p = torch.arange(queries)[:, None] + offset
    q = torch.arange(keys)[None] + key_offset
    seen = ((q >= first) & (q < last)).expand(queries, keys)
    if causal:
        seen = seen & (q <= p)
    if left is not None:
        seen = seen & (p - q <= left)
    if right is not None:
        seen = seen & (q - p <= right)
    j = torch.arange(keys)[None]
    assert torch.equal((j >= ranges[:, START, None]) & (j < ranges[:, STOP, None]), seen)
    # what the kernels rely on: ranges never move backwards
    assert (ranges.diff(dim=0)[:, [START, STOP]] >= 0).all()


def test_key_ranges_are_what_any_query_sees():
    padding = torch.tensor([[2, 7], [0, 9], [0, 0]])
    assert key_ranges_of(query_ranges(9, 9, causal=True, key_ranges=padding)).tolist() == [
        [2, 7],
        [0, 9],
        [0, 0],
    ]
