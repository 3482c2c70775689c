"""The fused quantiser: one pass over K writes every operand the attention kernels multiply.

Two small kernels find what must be known of all tokens (`statistics`); the third reads each tile of K once,
smooths and rotates it in registers, and writes the low and the high operand. `quantize_value` does V.
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
from .encoding import hadamard
from .launching import Launches
from .loading import load_rows, token_range
from .operands import (
    TILE,
    multiplicand,
    padded_columns,
    quantize_rows,
    quantize_tile,
    scale_bytes,
    scale_count,
    scale_granularity,
    shares_scale,
    stored_rows,
    stored_width,
)
from .quantize_value import QuantizedValue, empty_value, fill_value
from .statistics import token_statistics

# Tokens of one program where no scale is shared: small programs, several to a multiprocessor, so that
# one's loads run beside another's arithmetic. `paper` on 268 MB of K: 86 % of the device's copy rate;
# 59 % with 128 tokens and 16 warps.
ROWS, WARPS = 32, 4
# Warps of a program that quantises a whole tile; few where the tile has one scale and little is kept of it:
# 16.6 us for 33 MB of K in INT8, 18.7 with 16.
TILE_WARPS, ONE_SCALE_WARPS = 16, 4

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
    if shares_scale(FORMAT):
        tl.static_assert(ROWS == TILE)
        tile, tile_scale, bad = quantize_tile(x, FORMAT, KIND)
        tl.store(scale_out + row0 // TILE, tile_scale)
    else:
        scaled, code, scale, token_scale = quantize_rows(x, ROWS, COLUMNS, FORMAT, CEIL)
        bad_tokens = tl.max((code == 255).to(tl.int32), 1) | (token_scale != token_scale).to(tl.int32)
        bad = tl.max(bad_tokens, 0) > 0
        tile, token_scale = multiplicand(
            scaled, code, scale, token_scale, valid, ROWS, COLUMNS, FORMAT, KIND, True
        )
        if scale_granularity(FORMAT, KIND) == "token":
            tl.store(scale_out + row0 + tl.arange(0, ROWS), token_scale)
        elif scale_granularity(FORMAT, KIND) == "tile":
            tl.static_assert(ROWS == TILE)
            tl.store(scale_out + row0 // TILE, tl.max(token_scale, 0))
    if bad_key is not None:  # noqa: SIM102 - one condition is the compiler's, the other the GPU's
        if bad:
            tl.atomic_max(bad_key, 1)
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


@triton.jit(do_not_specialize=["length"])
def _quantize_key_kernel(
    key, ranges, mean, bad_keys, low_elements, low_block_scales, low_scale,
    high_elements, high_block_scales, high_scale, length, rows, stride_b, stride_h, stride_n,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    LOW_FORMAT: tl.constexpr, LOW_KIND: tl.constexpr, HIGH_FORMAT: tl.constexpr, HIGH_KIND: tl.constexpr,
    CEIL: tl.constexpr, LOG2_ROTATION: tl.constexpr, ROTATION_NORM: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one head: read once, smoothed, rotated, written in both formats."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    index = batch * tl.num_programs(1) + head
    start, count = token_range(ranges, batch, length)
    first = block * ROWS
    valid = first + tl.arange(0, ROWS) < count
    x = load_rows(
        key, stride_b, stride_h, stride_n, batch, head, start + first, start + count,
        DIM, COLUMNS, ROWS, False,
    ).to(tl.float32)  # fmt: skip
    if mean is not None:
        column = tl.arange(0, COLUMNS)
        channel_mean = tl.load(mean + index * DIM + column, mask=column < DIM, other=0.0)
        x = x - channel_mean[None, :]
        if first + ROWS > count:  # what does not exist stays zero
            x = tl.where(valid[:, None], x, 0.0)
    if LOG2_ROTATION > 0:
        x = hadamard(x, ROWS, COLUMNS, LOG2_ROTATION, ROTATION_NORM)
    row0 = index.to(tl.int64) * rows + first
    bad_key = bad_keys + index
    if LOW_KIND != "raw":
        _store_operand(
            x, valid, row0, low_elements, low_block_scales, low_scale, bad_key,
            DIM, ROWS, COLUMNS, TILE, LOW_FORMAT, LOW_KIND, CEIL,
        )  # fmt: skip
    if HIGH_KIND != "raw":
        _store_operand(
            x, valid, row0, high_elements, high_block_scales, high_scale,
            bad_key if LOW_KIND == "raw" else None,  # both operands see the same bad tokens
            DIM, ROWS, COLUMNS, TILE, HIGH_FORMAT, HIGH_KIND, CEIL,
        )  # fmt: skip


def quantize_key(
    key: Tensor,
    config: DMAConfig,
    low_kind: OperandKind,
    high_kind: OperandKind,
    key_ranges: Tensor | None = None,
) -> QuantizedKey:
    """K alone, as `quantize_key_value` makes it."""
    return quantize_key_value(key, None, config, low_kind, high_kind, key_ranges)[0]


def quantize_key_value(
    key: Tensor,
    value: Tensor | None,
    config: DMAConfig,
    low_kind: OperandKind,
    high_kind: OperandKind,
    key_ranges: Tensor | None = None,
    *,
    smooth_value: bool = True,
    permuted: bool = False,
    launches: Launches | None = None,
) -> tuple[QuantizedKey, QuantizedValue | None]:
    """Quantise K, and V if it is given, for the attention kernels: four launches at most.

    Args:
        key: [B, Hkv, N, D], any strides with a contiguous last dimension.
        value: [B, Hkv, N, Dv] likewise, becomes E4M3 (see `quantize_value`); or None.
        config: formats, smoothing, rotation, scale rule of K.
        low_kind, high_kind: what the tensor core multiplies, from `policy.operand_kind`.
        key_ranges: int32 [B, 2] ranges of real tokens, or None.
        smooth_value: subtract V's mean over its tokens.
        permuted: store each group of 16 tokens of V in the order of `quantize_value.PERMUTATION`.
        launches: where to launch.
    """
    launches = Launches(key.device) if launches is None else launches
    batch, heads, length, dim = key.shape
    rows = stored_rows(length)
    low = _empty_operand(config.low, low_kind, key, rows, launches)
    same = config.high == config.low
    high = low if same else _empty_operand(config.high, high_kind, key, rows, launches)
    raw = low.kind == "raw" and high.kind == "raw"
    if raw and value is None:
        return QuantizedKey(low, high, None, None), None
    bad_keys = None if raw else launches.empty((batch, heads), torch.int32)
    smooth = config.smooth_k and not raw
    mean = launches.empty((batch, heads, dim), torch.float32) if smooth else None
    quantized_value = None if value is None else empty_value(value, smooth_value, permuted, launches)
    token_statistics(
        None if raw else key, value, key_ranges, launches,
        key_mean=mean,
        bad_keys=bad_keys,
        value_mean=None if quantized_value is None else quantized_value.mean,
        value_scale=None if quantized_value is None else quantized_value.scale,
    )  # fmt: skip
    # V first: it was read last, and part of it is still in the cache (3 us of 30 at 4 x 4k)
    if value is not None and quantized_value is not None:
        fill_value(value, quantized_value, key_ranges, launches)
    if not raw:
        rotation = hadamard_size(dim) if config.rotate else 1
        quantised = [operand for operand in (low, high) if operand.kind != "raw"]
        block_rows, warps = ROWS, WARPS
        if any(scale_granularity(operand.format, operand.kind) == "tile" for operand in quantised):
            one_scale = all(shares_scale(operand.format) for operand in quantised)
            block_rows, warps = TILE, ONE_SCALE_WARPS if one_scale else TILE_WARPS
        launches.launch(
            _quantize_key_kernel, (rows // block_rows, heads, batch),
            key, key_ranges, mean, bad_keys,
            low.elements, low.block_scales, low.scale,
            high.elements, high.block_scales, high.scale,
            length, rows, *key.stride()[:3],
            DIM=dim, COLUMNS=padded_columns(dim), ROWS=block_rows, TILE=TILE,
            LOW_FORMAT=config.low, LOW_KIND=low.kind,
            HIGH_FORMAT=config.high, HIGH_KIND="raw" if same else high.kind,
            CEIL=config.scale_rule == "ceil",
            LOG2_ROTATION=rotation.bit_length() - 1, ROTATION_NORM=1.0 / math.sqrt(rotation),
            num_warps=warps,
        )  # fmt: skip
    return QuantizedKey(low, high, mean, bad_keys), quantized_value


def _empty_operand(format: str, kind: OperandKind, key: Tensor, rows: int, launches: Launches) -> KeyOperand:
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
        block_scales = launches.empty(shape, torch.uint8)
    assert dtype is not None
    scale = None
    granularity = scale_granularity(format, kind)
    if granularity != "none":
        scale_rows = rows // TILE if granularity == "tile" else rows
        scale = launches.empty((batch, heads, scale_rows), torch.float32)
    width = stored_width(format, kind, head_dim)
    elements = launches.empty((batch, heads, rows, width), dtype)
    return KeyOperand(format, kind, elements, block_scales, scale)
