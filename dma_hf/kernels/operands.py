"""Operands in registers: rows of Q or K, quantised and made what the tensor core multiplies.

The quantiser kernel uses these helpers on K, the attention kernel's prologue on Q: both operands of a
product go through the same code.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime.jit import constexpr_function

from ..formats import FORMATS
from .encoding import (
    e8m0_code,
    e8m0_inverse,
    e8m0_value,
    element_code,
    int8_code,
    is_finite,
    pack_pairs,
    round_element,
)
from .interpreter import divide, round_e4m3, to_e4m3

# An E4M3 number holds e2m1 * 2^6 * 2^-d exactly for d from 0 to 14 (dma.md, section 3): 6 is the largest
# power of two that leaves room for E2M1's largest number, 6 * 2^6 = 384 < 448.
MXFP4_SHIFT = tl.constexpr(6)
E4M3_SMALLEST = tl.constexpr(2.0**-9)
E4M3_MAX = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(2.0**-126)


TILE = 128
"""Stored tokens of K and V are padded with zeros to a multiple of this many.

So many tokens share a group of Blackwell's scale layout, and a scale of MXFP4 as E4M3.
"""

MIN_COLUMNS = 32
"""Columns of the smallest tile: a block of the MX formats, and the shortest product of FP8 operands."""


def padded_columns(head_dim: int) -> int:
    """Columns of a tile that holds rows of `head_dim` elements, filled up with zeros."""
    return max(MIN_COLUMNS, triton.next_power_of_2(head_dim))


def stored_rows(length: int) -> int:
    """Rows that hold `length` tokens: at least one tile."""
    return triton.cdiv(max(length, 1), TILE) * TILE


@constexpr_function
def element_of(format):
    return FORMATS[format].element


@constexpr_function
def element_max(format):
    return FORMATS[format].element_max


@constexpr_function
def element_emax(format):
    return FORMATS[format].element_emax


@constexpr_function
def element_mantissa(format):
    """The float32 mantissa bits of the largest element."""
    fmt = FORMATS[format]
    return int((fmt.element_max / 2.0**fmt.element_emax - 1.0) * 2**23)


@constexpr_function
def scale_of(format):
    return FORMATS[format].scale


@constexpr_function
def block_of(format, columns):
    """Elements under one block scale in a row of `columns`."""
    return FORMATS[format].block or columns


@constexpr_function
def scale_granularity(format, kind):
    """Which float32 scale multiplies the scores: "none", one a "token" or one a "tile" of tokens."""
    if kind != "raw" and (FORMATS[format].key_tokens > 1 or (kind == "e4m3" and format == "mxfp4")):
        return "tile"
    return "token" if kind != "raw" and FORMATS[format].scale != "e8m0" else "none"


@constexpr_function
def stored_width(format, kind, columns):
    """Stored elements (bytes, where two share one) of a row of `columns` values."""
    return columns // 2 if kind == "scaled" and FORMATS[format].packed else columns


@constexpr_function
def scale_count(format, kind, columns):
    """Block scales of a row of `columns` values, for operands that keep them."""
    return columns // FORMATS[format].block if kind == "scaled" else 0


@constexpr_function
def shares_scale(format):
    """Whether neighbouring keys share one float32 scale."""
    return FORMATS[format].key_tokens > 1


@triton.jit
def quantize_rows(
    x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FORMAT: tl.constexpr, CEIL: tl.constexpr
):  # fmt: skip
    """Quantise rows (tokens) of `x` [ROWS, COLUMNS], float32. The twin of `dma_hf.quantize`.

    Every row for itself, as queries are, and keys but where they share a scale (`quantize_tile`).

    Returns:
        scaled: [ROWS, COLUMNS / block, block] float32, values divided by their scales, not rounded yet.
        code: [ROWS, COLUMNS / block] int32, E8M0 codes; zeros where the format has none.
        scale: [ROWS, COLUMNS / block] float32, value of the block scales (NVFP4: E4M3; else E8M0, or 1).
        token_scale: [ROWS] float32, the scale of a whole token; ones where the format has none.
    """
    BLOCK: tl.constexpr = block_of(FORMAT, COLUMNS)
    blocks = tl.reshape(x, (ROWS, COLUMNS // BLOCK, BLOCK))
    # Magnitudes compare as integers just as they do as floats, and NaN and Inf come out largest: the
    # maximum carries them into the scale.
    magnitude = blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    block_max = tl.max(magnitude, 2).to(tl.float32, bitcast=True)
    code = tl.zeros((ROWS, COLUMNS // BLOCK), tl.int32)
    scale = tl.full((ROWS, COLUMNS // BLOCK), 1.0, tl.float32)
    token_scale = tl.full((ROWS,), 1.0, tl.float32)
    if scale_of(FORMAT) == "e8m0":
        code = e8m0_code(block_max, element_emax(FORMAT), element_mantissa(FORMAT), CEIL)
        scale = e8m0_value(code)
        scaled = blocks * tl.expand_dims(e8m0_inverse(code), 2)
        good = code != 255
    elif scale_of(FORMAT) == "e4m3":
        token_max = tl.max(tl.max(magnitude, 2), 1).to(tl.float32, bitcast=True)
        # div_rn: Triton's "/" is an approximation, and a scale one bit off is another quantisation
        token_scale = tl.maximum(tl.div_rn(token_max, element_max(FORMAT) * 448.0), SMALLEST_SCALE)
        per_token = tl.broadcast_to(tl.expand_dims(token_scale, 1), block_max.shape)
        scale = tl.div_rn(tl.div_rn(block_max, element_max(FORMAT) + tl.zeros_like(block_max)), per_token)
        scale = tl.maximum(round_element(scale, "e4m3"), E4M3_SMALLEST)
        divisor = scale * per_token
        inverse = tl.div_rn(1.0 + tl.zeros_like(divisor), divisor)
        scaled = divide(blocks, tl.expand_dims(divisor, 2), tl.expand_dims(inverse, 2))
        good = tl.broadcast_to(tl.expand_dims(is_finite(token_max), 1), block_max.shape)
        token_scale = tl.where(is_finite(token_max), token_scale, float("nan"))
        scale = tl.where(good, scale, float("nan"))
    else:
        token_max = tl.max(block_max, 1)
        token_scale = tl.maximum(tl.div_rn(token_max, element_max(FORMAT)), SMALLEST_SCALE)
        divisor = tl.expand_dims(token_scale, 1)
        inverse = tl.div_rn(1.0 + tl.zeros_like(divisor), divisor)
        scaled = divide(blocks, tl.expand_dims(divisor, 2), tl.expand_dims(inverse, 2))
        good = tl.expand_dims(is_finite(token_max), 1)
        token_scale = tl.where(is_finite(token_max), token_scale, float("nan"))
    scaled = tl.where(tl.expand_dims(good, 2), scaled, 0.0)  # the scale carries the NaN
    return scaled, code, scale, token_scale


@triton.jit
def round_number(x, ELEMENT: tl.constexpr):
    """`round_element`, for E4M3 with the hardware's conversion where there is one."""
    return round_e4m3(x) if ELEMENT == "e4m3" else round_element(x, ELEMENT)


@triton.jit
def quantize_tile(x, FORMAT: tl.constexpr, KIND: tl.constexpr):
    """`quantize_rows` and `multiplicand` of keys `x` [ROWS, COLUMNS] that share one float32 scale.

    Returns:
        what the tensor core multiplies [ROWS, COLUMNS], zeros for tokens with a NaN or Inf; the scale of all
        the others, a float32 (0 where there are none); and whether there was such a token.
    """
    # Magnitudes compare as integers just as they do as floats, and NaN and Inf come out largest. Which token
    # has one is looked for only if there is one: the common case is one reduction, and no mask.
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.max(magnitude, 1), 0)
    bad = largest >= 0x7F800000
    if bad:
        token_max = tl.max(magnitude, 1)
        good = token_max < 0x7F800000
        largest = tl.max(tl.where(good, token_max, -1), 0)
        x = tl.where(good[:, None], x, 0.0)
    scale = tl.maximum(tl.div_rn(largest.to(tl.float32, bitcast=True), element_max(FORMAT)), SMALLEST_SCALE)
    x = divide(x, scale, tl.div_rn(tl.full((), 1.0, tl.float32), scale))
    if KIND == "16bit":
        tile = round_number(x, element_of(FORMAT)).to(tl.bfloat16)
    else:
        tile = int8_code(x) if KIND == "int8" else to_e4m3(x)
    return tile, tl.where(largest < 0, 0.0, scale), bad


@triton.jit
def multiplicand(
    scaled,
    code,
    scale,
    token_scale,
    valid,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    KIND: tl.constexpr,
    SHARED_SCALE: tl.constexpr,
):
    """What the tensor core multiplies for quantised rows, and the float32 scale left to the scores.

    Args:
        scaled, code, scale, token_scale: from `quantize_rows`.
        valid: [ROWS] bool, rows that exist.
        SHARED_SCALE: MXFP4 as E4M3 only: one scale for all rows (K) or one a row (Q).

    Returns:
        ([ROWS, COLUMNS] bfloat16, E4M3 or INT8; or packed E2M1 and E4M3 for KIND "scaled"),
        and the scale: [ROWS] float32, the same in every row where it is shared.
    """
    ELEMENT: tl.constexpr = element_of(FORMAT)
    if KIND == "scaled":
        tile = element_code(round_element(scaled, ELEMENT), scaled, ELEMENT)
        tile = tl.reshape(tile, (ROWS, COLUMNS))
        if ELEMENT == "e2m1":
            tile = pack_pairs(tile, ROWS, COLUMNS)
        elif ELEMENT == "e5m2":
            tile = tile.to(tl.float8e5, bitcast=True)
        else:
            tile = tile.to(tl.float8e4nv, bitcast=True)
    elif KIND == "16bit":
        # token scales stay out: they are no powers of two, so the product would need rounding
        rounded = round_number(scaled, ELEMENT)
        tile = tl.reshape(rounded * tl.expand_dims(scale, 2), (ROWS, COLUMNS)).to(tl.bfloat16)
    elif KIND == "int8":
        # no clamp: a scale is the largest magnitude / 127, and its rounding takes no quotient to 127.5
        tile = int8_code(tl.reshape(scaled, (ROWS, COLUMNS)))
    elif scale_of(FORMAT) == "float32":
        tile = to_e4m3(tl.reshape(scaled, (ROWS, COLUMNS)))
    else:
        tl.static_assert(FORMAT == "mxfp4")
        # E2M1 times 2^(block exponent - largest block exponent) is an E4M3 number: no block scales left
        largest = tl.max(tl.where(code == 255, 0, code), 1)
        if SHARED_SCALE:
            largest = tl.zeros_like(largest) + tl.max(tl.where(valid, largest, 0), 0)
        shift = tl.maximum(code - tl.expand_dims(largest, 1) + MXFP4_SHIFT, -126)
        factor = ((shift + 127) << 23).to(tl.float32, bitcast=True)
        factor = tl.where(code == 255, float("nan"), factor)  # 0 times NaN: a bad block becomes NaN
        elements = round_element(scaled, ELEMENT) * tl.expand_dims(factor, 2)
        tile = to_e4m3(tl.reshape(elements, (ROWS, COLUMNS)))
        token_scale = e8m0_value(largest) * (0.5**MXFP4_SHIFT)
    return tile, token_scale


@triton.jit
def scale_bytes(code, scale, FORMAT: tl.constexpr):
    """Block scales as the bytes that `tl.dot_scaled` reads: E8M0 codes, or E4M3 bits for NVFP4."""
    if scale_of(FORMAT) == "e8m0":
        return code.to(tl.uint8)
    else:
        return element_code(scale, scale, "e4m3")
