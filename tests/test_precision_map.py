"""The precision map, against the definition applied to every single score."""

from __future__ import annotations

from itertools import pairwise

import oracles
import pytest
import torch

from dma_hf import DMAConfig
from dma_hf.precision_map import is_high, precision_map, precision_spans

NOT_VISITED, LOW, HIGH = 0, 1, 2

each_direction = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
each_setting = pytest.mark.parametrize(
    ("tile", "diagonal", "sink"),
    [(16, 1, 1), (16, 0, 0), (16, 3, 0), (16, 0, 2), (32, 2, 1), (64, 1, 3), (128, 1, 1)],
    ids=lambda n: str(n),
)


def config_of(tile: int, diagonal: int, sink: int) -> DMAConfig:
    return DMAConfig(tile=tile, diagonal=diagonal * tile, sink=sink * tile)


@each_direction
@each_setting
@pytest.mark.parametrize(("m", "n"), [(150, 150), (128, 128), (129, 200), (1, 130), (40, 128), (96, 50)])
def test_map_equals_the_definition_score_by_score(tile, diagonal, sink, m, n, causal):
    tiles = precision_map(m, n, config_of(tile, diagonal, sink), causal)
    first_row = (n - m) // tile
    for i in range(m):
        row = (i + n - m) // tile
        for j in range(n):
            if causal and j // tile > row:
                expected = NOT_VISITED
            else:
                high = oracles.precision_is_high(
                    i, j, m, n, tile=tile, diagonal=diagonal, sink=sink, causal=causal
                )
                expected = HIGH if high else LOW
            assert tiles[row - first_row, j // tile] == expected, (i, j)


@each_direction
@each_setting
@pytest.mark.parametrize("key_count", [1, 100, 128, 300])
def test_spans_cover_the_keys_once_each_in_the_precision_of_their_tile(
    tile, diagonal, sink, key_count, causal
):
    config = config_of(tile, diagonal, sink)
    for query_tile in (-1, 0, 1, 4, 9):
        spans = list(precision_spans(query_tile, key_count, config, causal))
        assert [s.start for s in spans] == [0, *(s.stop for s in spans[:-1])]
        assert spans[-1].stop == key_count
        for span in spans:
            for j in range(span.start, span.stop):
                assert span.high == is_high(query_tile, j // tile, config, causal)
        # the fewest: neighbours differ
        assert all(a.high != b.high for a, b in pairwise(spans))


def test_spans_of_no_keys():
    assert list(precision_spans(0, 0, DMAConfig(), causal=True)) == []


def test_the_papers_setting_on_four_tiles():
    expected = [[2, 0, 0, 0], [2, 2, 0, 0], [2, 1, 2, 0], [2, 1, 1, 2]]
    assert precision_map(512, 512, DMAConfig()).tolist() == expected
    expected = [[2, 1, 1, 1], [2, 2, 1, 1], [2, 1, 2, 1], [2, 1, 1, 2]]
    assert precision_map(512, 512, DMAConfig(), causal=False).tolist() == expected


def test_a_late_query_has_the_last_row_of_the_whole_prompt():
    config = DMAConfig(tile=16, diagonal=32, sink=16)
    whole = precision_map(100, 100, config)
    assert torch.equal(precision_map(1, 100, config), whole[-1:])
    assert torch.equal(precision_map(30, 100, config), whole[4:])  # positions 70 ... 99, tiles 4 ... 6
