"""Which tile of the score matrix is computed in which precision.

A pure function of token positions, the tile size and the configuration: no kernel's block sizes enter,
so that every backend has the same map.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .config import DMAConfig


class Span(NamedTuple):
    """Keys [start, stop) that one query tile multiplies in one precision."""

    start: int
    stop: int
    high: bool


def is_high(query_tile: int, key_tile: int, config: DMAConfig, causal: bool, sink_tile: int = 0) -> bool:
    """Whether tile (query_tile, key_tile) is computed in the high format.

    sink_tile: the tile in which the sequence of the query tile's first query begins (packed sequences).
    """
    distance = query_tile - key_tile
    near = distance < config.diagonal_tiles if causal else abs(distance) < config.diagonal_tiles
    return 0 <= key_tile - sink_tile < config.sink_tiles or near


def precision_spans(
    query_tile: int, key_count: int, config: DMAConfig, causal: bool, sink_tile: int = 0
) -> Iterator[Span]:
    """The keys [0, key_count) seen by `query_tile`, as the fewest spans of one precision each."""
    tiles = -(-key_count // config.tile)
    start = 0
    while start < tiles:
        high = is_high(query_tile, start, config, causal, sink_tile)
        stop = start + 1
        while stop < tiles and is_high(query_tile, stop, config, causal, sink_tile) == high:
            stop += 1
        yield Span(start * config.tile, min(stop * config.tile, key_count), high)
        start = stop


def precision_map(query_length: int, key_length: int, config: DMAConfig, causal: bool = True) -> Tensor:
    """The tile map of a whole call: int8 [query tiles, key tiles], 2 = high, 1 = low, 0 = not visited.

    Queries are aligned to the last keys (bottom-right), so row 0 is the tile of the first query's
    position. For looking at and for tests; no kernel reads it.
    """
    first_position = key_length - query_length
    first_tile, last_tile = first_position // config.tile, (key_length - 1) // config.tile
    key_tiles = -(-key_length // config.tile)
    rows = []
    for query_tile in range(first_tile, last_tile + 1):
        visible = query_tile + 1 if causal else key_tiles
        rows.append(
            [
                0 if j >= visible else 2 if is_high(query_tile, j, config, causal) else 1
                for j in range(key_tiles)
            ]
        )
    return torch.tensor(rows, dtype=torch.int8)
