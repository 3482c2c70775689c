"""V for FP8 PV: E4M3 with one float32 scale a channel, stored with tokens contiguous.

Hopper's FP8 wgmma wants both operands contiguous along the dimension that is summed, which for PV is the
tokens: so V is stored transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpreter import divide, to_e4m3
from .launching import Launches
from .loading import token_range
from .operands import stored_rows
from .statistics import token_statistics

# Tokens of one program: small programs of 62 registers a thread, so that 32 warps share a multiprocessor.
# With 128 tokens and more arithmetic it was 172 registers, 8 warps and 30 us for 33 MB.
ROWS, WARPS = 64, 8


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


@triton.jit(do_not_specialize=["length"])
def _quantize_value_kernel(
    value, mean, scale, elements, ranges, length, rows, stride_b, stride_h, stride_n,
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
    x = tl.load(base + (start + token).to(tl.int64)[:, None] * stride_n, mask=mask, other=0.0).to(tl.float32)
    if mean is not None:
        channel_mean = tl.load(mean + index * DIM + column, mask=column < DIM, other=0.0)
        x = x - channel_mean[None, :]
        if (block + 1) * ROWS > count:  # what does not exist stays zero
            x = tl.where(mask, x, 0.0)
    divisor = tl.load(scale + index * DIM + column, mask=column < DIM, other=1.0)
    inverse = tl.div_rn(1.0 + tl.zeros_like(divisor), divisor)
    scaled = divide(x, divisor[None, :], inverse[None, :])
    tile = to_e4m3(scaled)  # an Inf is a NaN by now: E4M3 has no Inf
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
    launches = Launches(value.device)
    quantized = empty_value(value, smooth, permuted, launches)
    token_statistics(
        None, value, key_ranges, launches,
        key_mean=None, bad_keys=None, value_mean=quantized.mean, value_scale=quantized.scale,
    )  # fmt: skip
    fill_value(value, quantized, key_ranges, launches)
    return quantized


def empty_value(value: Tensor, smooth: bool, permuted: bool, launches: Launches) -> QuantizedValue:
    """Memory for a quantised `value`."""
    batch, heads, length, dim = value.shape
    rows = stored_rows(length)
    return QuantizedValue(
        launches.empty((batch, heads, dim, rows), torch.float8_e4m3fn),
        launches.empty((batch, heads, dim), torch.float32),
        launches.empty((batch, heads, dim), torch.float32) if smooth else None,
        permuted,
    )


def fill_value(
    value: Tensor, quantized: QuantizedValue, key_ranges: Tensor | None, launches: Launches
) -> None:
    """Write the elements; the scale, and the mean where there is one, are known."""
    dim, rows = quantized.elements.shape[2:]
    launches.launch(
        _quantize_value_kernel, (rows // ROWS, *value.shape[1::-1]),
        value, quantized.mean, quantized.scale, quantized.elements, key_ranges, value.shape[2], rows,
        *value.stride()[:3],
        DIM=dim, COLUMNS=triton.next_power_of_2(dim), ROWS=ROWS, PERMUTED=quantized.permuted, num_warps=WARPS,
    )  # fmt: skip
