"""The fused quantiser: one pass over K writes every operand the attention kernel multiplies.

Two small kernels find the mean of K over its tokens (for smoothing); the third reads each tile of K once,
smooths and rotates it in registers, and writes the low and the high operand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import DMAConfig
from ..formats import FORMATS, NONE
from ..policy import OperandKind
from ..transforms import hadamard_size
from .encoding import hadamard, is_finite
from .loading import load_rows, token_range
from .operands import (
    multiplicand,
    padded_columns,
    quantize_rows,
    scale_bytes,
    scale_count,
    scale_granularity,
    stored_width,
)

# Tokens that share a group of Blackwell's scale layout, and a scale of MXFP4 as E4M3.
TILE = 128
# Tokens of one program where no scale is shared: small programs, several to a multiprocessor, so that
# one's loads run beside another's arithmetic. `paper` on 268 MB of K: 86 % of the device's copy rate;
# 59 % with 128 tokens and 16 warps.
ROWS, WARPS = 32, 4
# The mean's partial sums: about this many programs for a call, so that every multiprocessor has some to
# overlap, each adding up tiles of this many elements.
MEAN_PROGRAMS, MEAN_ELEMENTS, MEAN_WARPS = 1024, 8192, 4
MIN_CHUNKS, MAX_CHUNKS = 16, 128

_ELEMENT_DTYPES = {
    "16bit": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}


@dataclass(frozen=True)
class KeyOperand:
    """K in one format, as the attention kernel reads it.

    Row r of a sequence is its r-th real token (padding on the left is left out), and rows are padded
    with zeros to a multiple of `TILE`.

    Attributes:
        format: the format's name.
        kind: what the tensor core multiplies, see `policy.OperandKind`.
        elements: [B, Hkv, rows, D] (packed E2M1: D / 2 bytes); None for kind "raw".
        block_scales: uint8 [B, Hkv, rows / 128, groups, 32, 4, 4], Blackwell's layout: the scale of row
            r and block c is at [r // 128, c // 4, r % 32, r % 128 // 32, c % 4]. None unless "scaled".
        scale: float32, multiplies the scores: [B, Hkv, rows] one a token, [B, Hkv, rows / 128] one a
            tile, or None.
    """

    format: str
    kind: OperandKind
    elements: Tensor | None = None
    block_scales: Tensor | None = None
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of extra memory."""
        parts = (self.elements, self.block_scales, self.scale)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


@dataclass(frozen=True)
class QuantizedKey:
    """K's low and high operand (one object where the formats are the same), and its mean.

    `mean` is float32 [B, Hkv, D]; None without smoothing. `bad_keys` is int32 [B, Hkv], 1 for heads whose
    K holds a NaN or Inf; None where nothing is quantised.
    """

    low: KeyOperand
    high: KeyOperand
    mean: Tensor | None
    bad_keys: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of extra memory."""
        operands = {id(o): o.nbytes for o in (self.low, self.high)}
        mean = 0 if self.mean is None else self.mean.numel() * self.mean.element_size()
        return sum(operands.values()) + mean


@triton.jit(do_not_specialize=["key_length"])
def _sum_kernel(
    key,
    partial_sums,
    ranges,
    key_length,
    stride_b,
    stride_h,
    stride_n,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Sum of one chunk of the tokens of one head: partial_sums [B, Hkv, CHUNKS, COLUMNS] float32."""
    chunk, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, count = token_range(ranges, batch, key_length)
    chunk_size = tl.cdiv(tl.cdiv(count, CHUNKS), ROWS) * ROWS
    last = tl.minimum((chunk + 1) * chunk_size, count)
    # a sum for each row of the tile, added up once after the loop: no reduction between the loads
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(chunk * chunk_size, last, ROWS):
        x = load_rows(
            key, stride_b, stride_h, stride_n, batch, head, start + first, start + last,
            HEAD_DIM, COLUMNS, ROWS, False,
        ).to(tl.float32)  # fmt: skip
        # NaN and Inf count as zeros, or one bad token would spoil every other
        sums += tl.where(is_finite(x), x, 0.0)
    heads = tl.num_programs(1)
    offset = ((batch * heads + head) * CHUNKS + chunk) * COLUMNS
    tl.store(partial_sums + offset + tl.arange(0, COLUMNS), tl.sum(sums, 0))


@triton.jit(do_not_specialize=["key_length"])
def _mean_kernel(
    partial_sums, mean, flags, ranges, key_length,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The mean of one head from its partial sums: mean [B, Hkv, HEAD_DIM] float32; and a flag set to 0."""
    head, batch = tl.program_id(0), tl.program_id(1)
    index = batch * tl.num_programs(0) + head
    _, count = token_range(ranges, batch, key_length)
    column = tl.arange(0, COLUMNS)
    offsets = (index * CHUNKS + tl.arange(0, CHUNKS))[:, None] * COLUMNS + column[None, :]
    total = tl.sum(tl.load(partial_sums + offsets), 0)
    result = tl.div_rn(total, tl.maximum(count, 1).to(tl.float32))
    tl.store(mean + index * HEAD_DIM + column, result, mask=column < HEAD_DIM)
    if flags is not None:
        tl.store(flags + index, 0)


@triton.jit
def _store_operand(
    x,
    valid,
    row0,
    elements_out,
    block_scales_out,
    scale_out,
    bad_key,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    FORMAT: tl.constexpr,
    KIND: tl.constexpr,
    CEIL: tl.constexpr,
):
    """Quantise ROWS tokens and write one operand. row0: the first one's row among those of all heads."""
    scaled, code, scale, token_scale = quantize_rows(x, ROWS, COLUMNS, FORMAT, CEIL, True)
    if bad_key is not None:
        bad = tl.max((code == 255).to(tl.int32), 1) | (token_scale != token_scale).to(tl.int32)
        if tl.max(bad, 0) > 0:
            tl.atomic_max(bad_key, 1)
    tile, token_scale = multiplicand(
        scaled, code, scale, token_scale, valid, ROWS, COLUMNS, FORMAT, KIND, True
    )
    WIDTH: tl.constexpr = stored_width(FORMAT, KIND, COLUMNS)
    STORED: tl.constexpr = stored_width(FORMAT, KIND, HEAD_DIM)
    row = row0 + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    pointers = elements_out + row[:, None] * STORED + column[None, :]
    tl.store(pointers, tile, mask=(column < STORED)[None, :])
    if KIND == "scaled":
        COUNT: tl.constexpr = scale_count(FORMAT, KIND, COLUMNS)
        GROUPS: tl.constexpr = (COUNT + 3) // 4
        r = (row % TILE).to(tl.int32)[:, None]
        c = tl.arange(0, COUNT)[None, :]
        within = (c // 4) * 512 + (r % 32) * 16 + (r // 32) * 4 + c % 4
        base = block_scales_out + (row0 // TILE) * (GROUPS * 512)
        tl.store(base + within, scale_bytes(code, scale, FORMAT))
    if scale_granularity(FORMAT, KIND) == "token":
        tl.store(scale_out + row, token_scale)
    elif scale_granularity(FORMAT, KIND) == "tile":
        tl.static_assert(ROWS == TILE)
        # a token with a NaN or Inf has NaN for its own scale
        tl.store(scale_out + row0 // TILE, tl.max(tl.where(token_scale == token_scale, token_scale, 0.0), 0))


@triton.jit(do_not_specialize=["key_length"])
def _quantize_kernel(
    key,
    ranges,
    mean,
    bad_keys,
    low_elements,
    low_block_scales,
    low_scale,
    high_elements,
    high_block_scales,
    high_scale,
    key_length,
    rows,
    stride_b,
    stride_h,
    stride_n,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    LOW_FORMAT: tl.constexpr,
    LOW_KIND: tl.constexpr,
    HIGH_FORMAT: tl.constexpr,
    HIGH_KIND: tl.constexpr,
    CEIL: tl.constexpr,
    LOG2_ROTATION: tl.constexpr,
    ROTATION_NORM: tl.constexpr,
):
    """ROWS tokens of one head: read once, smoothed, rotated, written in both formats."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    start, count = token_range(ranges, batch, key_length)
    first = block * ROWS
    valid = first + tl.arange(0, ROWS) < count
    x = load_rows(
        key, stride_b, stride_h, stride_n, batch, head, start + first, start + count,
        HEAD_DIM, COLUMNS, ROWS, False,
    ).to(tl.float32)  # fmt: skip
    if mean is not None:
        column = tl.arange(0, COLUMNS)
        mean_base = mean + (batch * heads + head) * HEAD_DIM
        channel_mean = tl.load(mean_base + column, mask=column < HEAD_DIM, other=0.0)
        # rows and columns that do not exist must stay zeros
        x = tl.where(valid[:, None], x - channel_mean[None, :], 0.0)
    if LOG2_ROTATION > 0:
        x = hadamard(x, ROWS, COLUMNS, LOG2_ROTATION, ROTATION_NORM)
    row0 = (batch * heads + head).to(tl.int64) * rows + first
    bad_key = bad_keys + batch * heads + head
    if LOW_KIND != "raw":
        _store_operand(
            x, valid, row0, low_elements, low_block_scales, low_scale, bad_key,
            HEAD_DIM, ROWS, COLUMNS, TILE, LOW_FORMAT, LOW_KIND, CEIL,
        )  # fmt: skip
    if HIGH_KIND != "raw":
        _store_operand(
            x, valid, row0, high_elements, high_block_scales, high_scale,
            bad_key if LOW_KIND == "raw" else None,  # both operands see the same bad tokens
            HEAD_DIM, ROWS, COLUMNS, TILE, HIGH_FORMAT, HIGH_KIND, CEIL,
        )  # fmt: skip


def quantize_key(
    key: Tensor,
    config: DMAConfig,
    low_kind: OperandKind,
    high_kind: OperandKind,
    key_ranges: Tensor | None = None,
) -> QuantizedKey:
    """Quantise K for the attention kernel, in three launches at most.

    Args:
        key: [B, Hkv, N, D], any strides with a contiguous last dimension.
        config: formats, smoothing, rotation, scale rule.
        low_kind, high_kind: what the tensor core multiplies, from `policy.operand_kind`.
        key_ranges: int32 [B, 2] ranges of real tokens, or None.
    """
    batch, heads, length, head_dim = key.shape
    columns = padded_columns(head_dim)
    rows = triton.cdiv(max(length, 1), TILE) * TILE
    low = _empty_operand(config.low, low_kind, key, rows)
    same = config.high == config.low
    high = low if same else _empty_operand(config.high, high_kind, key, rows)
    if low.kind == "raw" and high.kind == "raw":
        return QuantizedKey(low, high, None, None)

    mean = None
    new_flags = torch.empty if config.smooth_k else torch.zeros
    bad_keys = new_flags(batch, heads, dtype=torch.int32, device=key.device)
    if config.smooth_k:
        mean = token_mean(key, key_ranges, flags=bad_keys)  # the quantiser raises the flags
    rotation = hadamard_size(head_dim) if config.rotate else 1
    granularities = (scale_granularity(operand.format, operand.kind) for operand in (low, high))
    block_rows, warps = (TILE, 16) if "tile" in granularities else (ROWS, WARPS)
    _quantize_kernel[(rows // block_rows, heads, batch)](
        key, key_ranges, mean, bad_keys,
        low.elements, low.block_scales, low.scale,
        high.elements, high.block_scales, high.scale,
        length, rows, *key.stride()[:3],
        HEAD_DIM=head_dim, COLUMNS=columns, ROWS=block_rows, TILE=TILE,
        LOW_FORMAT=config.low, LOW_KIND=low.kind,
        HIGH_FORMAT=config.high, HIGH_KIND="raw" if same else high.kind,
        CEIL=config.scale_rule == "ceil",
        LOG2_ROTATION=rotation.bit_length() - 1, ROTATION_NORM=1.0 / math.sqrt(rotation),
        num_warps=warps,
    )  # fmt: skip
    return QuantizedKey(low, high, mean, bad_keys)


def token_mean(x: Tensor, key_ranges: Tensor | None, flags: Tensor | None = None) -> Tensor:
    """The mean of `x` [B, Hkv, N, D] over its tokens: float32 [B, Hkv, D]. Sets `flags` [B, Hkv] to 0."""
    batch, heads, length, dim = x.shape
    columns = padded_columns(dim)
    mean = x.new_empty(batch, heads, dim, dtype=torch.float32)
    wanted = triton.next_power_of_2(triton.cdiv(MEAN_PROGRAMS, batch * heads))
    chunks = min(max(wanted, MIN_CHUNKS), MAX_CHUNKS)
    partial_sums = x.new_empty(batch, heads, chunks, columns, dtype=torch.float32)
    _sum_kernel[(chunks, heads, batch)](
        x, partial_sums, key_ranges, length, *x.stride()[:3],
        HEAD_DIM=dim, COLUMNS=columns, ROWS=max(16, MEAN_ELEMENTS // columns), CHUNKS=chunks,
        num_warps=MEAN_WARPS,
    )  # fmt: skip
    # a launch of its own: summing the chunks anew in every program of the quantiser cost it more
    _mean_kernel[(heads, batch)](
        partial_sums, mean, flags, key_ranges, length,
        HEAD_DIM=dim, COLUMNS=columns, CHUNKS=chunks, num_warps=4,
    )  # fmt: skip
    return mean


def _empty_operand(format: str, kind: OperandKind, key: Tensor, rows: int) -> KeyOperand:
    if format == NONE:
        return KeyOperand(format, "raw")
    batch, heads, _, head_dim = key.shape
    fmt = FORMATS[format]
    dtype, block_scales = _ELEMENT_DTYPES.get(kind), None
    if kind == "scaled":
        e5m2 = fmt.element == "e5m2"
        dtype = torch.uint8 if fmt.packed else torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
        groups = triton.cdiv(scale_count(format, kind, padded_columns(head_dim)), 4)
        shape = (batch, heads, rows // TILE, groups, 32, 4, 4)
        block_scales = key.new_empty(shape, dtype=torch.uint8)
    assert dtype is not None
    scale = None
    granularity = scale_granularity(format, kind)
    if granularity != "none":
        scale_rows = rows // TILE if granularity == "tile" else rows
        scale = key.new_empty(batch, heads, scale_rows, dtype=torch.float32)
    width = stored_width(format, kind, head_dim)
    elements = key.new_empty(batch, heads, rows, width, dtype=dtype)
    return KeyOperand(format, kind, elements, block_scales, scale)
