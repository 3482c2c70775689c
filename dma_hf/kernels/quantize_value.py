"""The quantiser of V for FP8 PV: E4M3 with one float32 scale a channel, stored with tokens contiguous.

Hopper's FP8 wgmma wants both operands contiguous along the dimension that is summed, which for PV is the
tokens: so V is stored transposed. One kernel finds the largest magnitude of each channel, a second reads
each tile of V once, scales, rounds and transposes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .encoding import is_finite
from .interpreter import divide, to_e4m3
from .loading import token_range
from .operands import SMALLEST_SCALE
from .quantize import token_mean

TILE = 128
"""Stored tokens are padded with zeros to a multiple of this many."""

E4M3_MAX = tl.constexpr(448.0)
# Channel maxima: about this many programs for a call, each reading tiles of this many elements.
MAX_PROGRAMS, MAX_ELEMENTS = 1024, 8192


@dataclass(frozen=True)
class QuantizedValue:
    """V as E4M3, as an FP8 second product reads it.

    Attributes:
        elements: float8_e4m3fn [B, Hkv, Dv, rows], rows the number of tokens rounded up to `TILE`; row r of
            a sequence is its r-th real token (padding on the left is left out), zeros beyond the last.
        scale: float32 [B, Hkv, Dv], multiplies the elements.
        mean: float32 [B, Hkv, Dv], was subtracted from V; None where it was not. Weights sum to one, so it
            passes attention as it is, and what is left is smaller: on the built-in model it took the
            divergence of FP8 PV from 0.25 to 0.22 of what MXFP8 everywhere costs.
        permuted: whether each group of 16 tokens is stored in the order of `PERMUTATION`.
    """

    elements: Tensor
    scale: Tensor
    mean: Tensor | None
    permuted: bool

    @property
    def nbytes(self) -> int:
        """Bytes of extra memory."""
        means = 0 if self.mean is None else self.mean.numel()
        return self.elements.numel() + 4 * (self.scale.numel() + means)


PERMUTATION = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
"""Token at each place of a permuted group of 16.

A thread that holds the scores of wgmma has, of each row, the tokens 2t, 2t + 1, 2t + 8 and 2t + 9; the same
thread must give four neighbours of the FP8 operand. Storing V's tokens in this order makes the first the
second, so that the probabilities never leave their registers.
"""


@triton.jit
def _permuted(place):
    """`PERMUTATION` of whole numbers: the bits 3 2 1 0 of a place are the bits 2 1 3 0 of its token."""
    return (place & -15) | ((place & 12) >> 1) | ((place & 2) << 2)


@triton.jit
def _channel_mean(mean, index, column, DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """The mean of one head, [COLUMNS]; zeros where `mean` is None."""
    if mean is not None:
        return tl.load(mean + index * DIM + column, mask=column < DIM, other=0.0)
    else:
        return tl.zeros((COLUMNS,), tl.float32)


@triton.jit(do_not_specialize=["length"])
def _channel_max_kernel(
    value, mean, channel_max, ranges, length, stride_b, stride_h, stride_n,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Largest magnitude of each channel in one chunk of the tokens, joined into channel_max [B, Hkv, DIM].

    Magnitudes are joined as the bits of a float32, which compare as the floats do.
    """
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, count = token_range(ranges, batch, length)
    chunk_size = tl.cdiv(tl.cdiv(count, CHUNKS), ROWS) * ROWS
    last = tl.minimum((chunk + 1) * chunk_size, count)
    column = tl.arange(0, COLUMNS)
    base = value + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + column[None, :]
    largest = tl.zeros((ROWS, COLUMNS), tl.int32)
    channel_mean = _channel_mean(mean, batch * tl.num_programs(1) + head, column, DIM, COLUMNS)
    for first in tl.range(chunk * chunk_size, last, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & (column < DIM)[None, :]
        x = tl.load(base + (start + row).to(tl.int64)[:, None] * stride_n, mask=mask, other=0.0)
        x = tl.where(mask, x.to(tl.float32) - channel_mean[None, :], 0.0)
        # a NaN or Inf does not count, or one bad token would spoil its channel for every row
        magnitude = tl.where(is_finite(x), x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        largest = tl.maximum(largest, magnitude)
    # whoever comes first, the maximum is the same: the result does not depend on the order
    out = channel_max + (batch * tl.num_programs(1) + head) * DIM + column
    tl.atomic_max(out, tl.max(largest, 0), mask=column < DIM)


@triton.jit(do_not_specialize=["length"])
def _quantize_value_kernel(
    value, mean, channel_max, scale, elements, ranges, length, rows, stride_b, stride_h, stride_n,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one head: read, scaled, rounded, stored as [DIM, ROWS]."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    index = batch * tl.num_programs(1) + head
    start, count = token_range(ranges, batch, length)
    column = tl.arange(0, COLUMNS)
    place = block * ROWS + tl.arange(0, ROWS)
    # reading the tokens in another order costs nothing: a row is read whole wherever it is
    token = _permuted(place) if PERMUTED else place
    base = value + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + column[None, :]
    mask = (token < count)[:, None] & (column < DIM)[None, :]
    x = tl.load(base + (start + token).to(tl.int64)[:, None] * stride_n, mask=mask, other=0.0)
    channel_mean = _channel_mean(mean, index, column, DIM, COLUMNS)
    x = tl.where(mask, x.to(tl.float32) - channel_mean[None, :], 0.0)

    largest = tl.load(channel_max + index * DIM + column, mask=column < DIM, other=0)
    # div_rn: Triton's "/" is an approximation, and a scale one bit off is another quantisation
    divisor = tl.maximum(tl.div_rn(largest.to(tl.float32, bitcast=True), E4M3_MAX), SMALLEST_SCALE)
    inverse = tl.div_rn(1.0 + tl.zeros_like(divisor), divisor)
    if block == 0:
        tl.store(scale + index * DIM + column, divisor, mask=column < DIM)
    scaled = divide(x, divisor[None, :], inverse[None, :])
    tile = to_e4m3(tl.where(is_finite(x), scaled, float("nan")))  # E4M3 has no Inf
    out = elements + index.to(tl.int64) * DIM * rows
    pointers = out + column.to(tl.int64)[:, None] * rows + place[None, :]
    tl.store(pointers, tl.trans(tile), mask=(column < DIM)[:, None])


def quantize_value(
    value: Tensor, key_ranges: Tensor | None = None, *, smooth: bool = True, permuted: bool = False
) -> QuantizedValue:
    """V [B, Hkv, N, Dv] as E4M3, each channel's largest finite magnitude at E4M3's largest number.

    A NaN stays NaN and an Inf becomes NaN: E4M3 has none.

    Args:
        value: any strides with a contiguous last dimension.
        key_ranges: int32 [B, 2] ranges of real tokens, or None.
        smooth: subtract V's mean over its tokens.
        permuted: store each group of 16 tokens in the order of `PERMUTATION`.
    """
    batch, heads, length, dim = value.shape
    columns = triton.next_power_of_2(dim)
    rows = triton.cdiv(max(length, 1), TILE) * TILE
    elements = value.new_empty(batch, heads, dim, rows, dtype=torch.float8_e4m3fn)
    scale = value.new_empty(batch, heads, dim, dtype=torch.float32)
    mean = token_mean(value, key_ranges) if smooth else None
    channel_max = value.new_zeros(batch, heads, dim, dtype=torch.int32)
    tokens = max(16, MAX_ELEMENTS // columns)
    wanted = triton.cdiv(MAX_PROGRAMS, batch * heads)
    chunks = triton.next_power_of_2(min(wanted, triton.cdiv(max(length, 1), tokens)))
    _channel_max_kernel[(chunks, heads, batch)](
        value, mean, channel_max, key_ranges, length, *value.stride()[:3],
        DIM=dim, COLUMNS=columns, ROWS=tokens, CHUNKS=chunks, num_warps=4,
    )  # fmt: skip
    _quantize_value_kernel[(rows // TILE, heads, batch)](
        value, mean, channel_max, scale, elements, key_ranges, length, rows, *value.stride()[:3],
        DIM=dim, COLUMNS=columns, ROWS=TILE, PERMUTED=permuted, num_warps=8,
    )  # fmt: skip
    return QuantizedValue(elements, scale, mean, permuted)
