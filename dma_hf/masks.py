"""Which keys each query sees, without a mask of M x N: one range of keys for each query.

Padding, packed sequences, sliding windows, chunks and half-filled static caches all show a query one
unbroken range of keys. Four numbers for a query say all that the kernels need to know.
"""

from __future__ import annotations

import torch
from torch import Tensor

START, STOP, SEQUENCE, POSITION = range(4)
"""Columns of query ranges: int32 [B, M, 4], in keys of the call.

A query sees the keys from START to STOP (exclusive; none where START >= STOP). SEQUENCE is the first key
of the query's own sequence, POSITION the key that stands where the query stands.
"""


def query_ranges(
    query_length: int,
    key_length: int,
    *,
    causal: bool,
    query_offset: int | Tensor | None = None,
    key_offset: int = 0,
    left: int | None = None,
    right: int | None = None,
    chunk: int | None = None,
    key_ranges: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    batch: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """Query ranges of a call with padding, packed sequences, a sliding window or chunks.

    Args:
        query_length, key_length: M and N.
        causal: no query sees keys behind it.
        query_offset: position of the first query; N - M (bottom-right alignment) when None. A tensor
            where only the device knows it (a static cache).
        key_offset: position of the first key (of a sliding cache that dropped its first tokens).
        left, right: how many keys before and behind itself a query sees, at most.
        chunk: queries see keys of their own chunk of so many tokens only, counted from the first real
            token of their sequence.
        key_ranges: integer [B, 2]: positions [start, stop) of each row's real tokens, as
            `padding_ranges` gives them.
        sequence_ids: integer [B, N] for M = N, not decreasing: tokens of packed sequences see tokens
            with the same number.
        batch, device: where neither `key_ranges` nor `sequence_ids` tells.

    Returns:
        int32 [B, M, 4], see `START`.
    """
    known = key_ranges if key_ranges is not None else sequence_ids
    if known is not None:
        batch, device = known.shape[0], known.device
    if query_offset is None:
        query_offset = key_offset + key_length - query_length
    position = (torch.arange(query_length, device=device) + query_offset).expand(batch, -1)
    sequence = torch.full_like(position, key_offset)
    stop = torch.full_like(position, key_offset + key_length)
    if key_ranges is not None:
        sequence = sequence.maximum(key_ranges[:, :1])
        stop = stop.minimum(key_ranges[:, 1:])
    if sequence_ids is not None:
        ids = sequence_ids.contiguous()
        sequence = sequence.maximum(torch.searchsorted(ids, ids))
        stop = stop.minimum(torch.searchsorted(ids, ids, right=True))
    start = sequence
    if causal:
        stop = stop.minimum(position + 1)
    if left is not None:
        start = start.maximum(position - left)
    if right is not None:
        stop = stop.minimum(position + right + 1)
    if chunk is not None:
        # chunks count from the sequence's first token, also where a sliding cache has dropped it
        origin = sequence if key_ranges is None or sequence_ids is not None else key_ranges[:, :1]
        if key_offset and key_ranges is None:
            origin = torch.zeros_like(sequence)
        first = position - (position - origin) % chunk
        start = start.maximum(first)
        stop = stop.minimum(first + chunk)
    start = start.minimum(stop)  # a query that sees nothing: an empty range
    return torch.stack((start, stop, sequence, position), dim=-1).sub(key_offset).to(torch.int32)


def key_ranges_of(ranges: Tensor) -> Tensor:
    """The keys that any query of a row may see: int32 [B, 2], (first, stop), from query ranges [B, M, 4].

    Ranges never move backwards from one query to the next, so the first and the last query tell.
    """
    return torch.stack((ranges[:, 0, SEQUENCE], ranges[:, -1, STOP]), dim=1)


def padding_ranges(padding_mask: Tensor) -> Tensor:
    """The ranges of the real tokens of a padded batch: int32 [B, 2], (start, stop); (0, 0) for none.

    Args:
        padding_mask: [B, N], bool or integer, non-zero where a token is real. Padding between real
            tokens counts as real: see `has_holes`.

    Raises:
        ValueError: `padding_mask` is not two-dimensional.
    """
    if padding_mask.ndim != 2:
        raise ValueError(
            f"padding_mask has shape {list(padding_mask.shape)}; accepted is [batch, key_length]"
        )
    real = padding_mask.to(torch.bool)
    length = real.shape[1]
    start = real.int().argmax(dim=1)  # the first maximum: 0 for a row without tokens
    stop = torch.where(real.any(dim=1), length - real.flip(1).int().argmax(dim=1), 0)
    return torch.stack((start, stop), dim=1).to(torch.int32)


def has_holes(padding_mask: Tensor) -> bool:
    """Whether a row of `padding_mask` [B, N] has padding between real tokens. Waits for the device."""
    real = padding_mask.to(torch.bool)
    ranges = padding_ranges(real)
    return bool((ranges[:, 1] - ranges[:, 0] != real.sum(dim=1)).any())
