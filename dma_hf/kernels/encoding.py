"""Element and scale encodings inside a kernel: the Triton twins of `dma_hf.rounding`, bit for bit.

Values are rounded and encoded by float32 arithmetic and bit operations, not by a hardware conversion
(`interpreter.to_e4m3` is the exception), because the conversions differ between architectures (E4M3 does
not exist below sm_89, E2M1 below sm_100) and Triton's interpreter loses NaN in its own.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to_minifloat(x, MANTISSA_BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr, LARGEST: tl.constexpr):
    """`x` (float32) rounded to the nearest number of a small float format, ties to even, saturating."""
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    # the power of two at or below |x|, which sets the size of a unit in the last place
    binade = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    binade = tl.maximum(binade, 2.0**MIN_EXPONENT)
    # adding and subtracting 1.5 * 2^23 such units leaves x rounded to them: the sum has no bits to spare
    # below, and float32 addition rounds to nearest even (fused or not: the products are exact)
    UNITS: tl.constexpr = 1.5 * 2.0 ** (23 - MANTISSA_BITS)
    return (x + binade * UNITS) - binade * UNITS


@triton.jit
def round_element(x, ELEMENT: tl.constexpr):
    """`x` (float32, already divided by its scale) rounded to element type ELEMENT, as float32."""
    if ELEMENT == "e2m1":
        return round_to_minifloat(x, 1, 0, 6.0)
    elif ELEMENT == "e4m3":
        return round_to_minifloat(x, 3, -6, 448.0)
    elif ELEMENT == "e5m2":
        return round_to_minifloat(x, 2, -14, 57344.0)
    else:
        tl.static_assert(ELEMENT == "int8")
        x = tl.minimum(tl.maximum(x, -127.0), 127.0)
        return (x + 12582912.0) - 12582912.0


@triton.jit
def int8_code(x):
    """`x` (float32, of magnitude below 127.5) rounded to the nearest whole number, ties to even, as INT8.

    Next to 1.5 * 2^23 a unit in the last place is one, so the sum's low byte is the number: one addition,
    where a conversion runs at an eighth of the rate.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def minifloat_code(
    value, unrounded, MANTISSA_BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr, BITS: tl.constexpr
):
    """The BITS-bit codes (uint8) of float32 values that are numbers of a small float format, or NaN.

    The sign is that of `unrounded`: a negative number that rounds to zero rounds to -0.
    """
    magnitude = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    # from 2^MIN_EXPONENT upwards, exponent and top mantissa bits are float32's with another bias
    normal = (magnitude >> (23 - MANTISSA_BITS)) - ((126 + MIN_EXPONENT) << MANTISSA_BITS)
    subnormal = (tl.abs(value) * (2.0 ** (MANTISSA_BITS - MIN_EXPONENT))).to(tl.int32)
    code = tl.where(normal >= (1 << MANTISSA_BITS), normal, subnormal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    sign = unrounded.to(tl.int32, bitcast=True) >> (32 - BITS)
    return (code | (sign & (1 << (BITS - 1)))).to(tl.uint8)


@triton.jit
def element_code(value, unrounded, ELEMENT: tl.constexpr):
    """Codes (uint8) of float32 values that are numbers of ELEMENT, a float type."""
    if ELEMENT == "e2m1":
        return minifloat_code(value, unrounded, 1, 0, 4)
    elif ELEMENT == "e4m3":
        return minifloat_code(value, unrounded, 3, -6, 8)
    else:
        tl.static_assert(ELEMENT == "e5m2")
        return minifloat_code(value, unrounded, 2, -14, 8)


@triton.jit
def pack_pairs(code, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pack 4-bit codes [ROWS, COLUMNS] into bytes [ROWS, COLUMNS / 2], even column in the low nibble."""
    even, odd = tl.split(tl.reshape(code, (ROWS, COLUMNS // 2, 2)))
    return even | (odd << 4)


@triton.jit
def e8m0_code(block_max, ELEMENT_EMAX: tl.constexpr, ELEMENT_MANTISSA: tl.constexpr, CEIL: tl.constexpr):
    """E8M0 codes (int32) of block maxima: OCP MX v1.0's floor rule, or the ceil rule; 255 for NaN, Inf.

    ELEMENT_MANTISSA: the float32 mantissa bits of the element type's largest number.
    """
    bits = block_max.to(tl.int32, bitcast=True)
    exponent = bits >> 23
    code = exponent - ELEMENT_EMAX
    if CEIL:
        code += ((bits & 0x7FFFFF) > ELEMENT_MANTISSA).to(tl.int32)
    code = tl.maximum(code, 0)
    return tl.where(exponent == 255, 255, code)


@triton.jit
def e8m0_value(code):
    """The float32 value 2^(code - 127) of E8M0 codes (int32); NaN for 255."""
    bits = tl.where(code == 0, 0x00400000, code << 23)
    bits = tl.where(code == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e8m0_inverse(code):
    """The float32 value 2^(127 - code), exactly; for codes up to 253, which is all that blocks can have."""
    return ((254 - code) << 23).to(tl.float32, bitcast=True)


@triton.jit
def is_finite(x):
    """Whether float32 `x` is neither NaN nor infinite."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000


@triton.jit
def hadamard(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOG2_SIZE: tl.constexpr, NORM: tl.constexpr):
    """Rows of `x` [ROWS, COLUMNS], in blocks of 2^LOG2_SIZE columns, times an orthonormal Hadamard matrix.

    A butterfly in float32 that adds in the same order as `dma_hf.transforms.rotate`, so that the two
    agree to the last bit. NORM is 2^(-LOG2_SIZE / 2) in float32.
    """
    SIZE: tl.constexpr = 1 << LOG2_SIZE
    for _ in tl.static_range(LOG2_SIZE):
        # Pairs neighbours, then moves the pair's bit of the index to the top: the next stage finds the
        # next bit at the bottom, and after LOG2_SIZE stages the order is the natural one again.
        even, odd = tl.split(tl.reshape(x, (ROWS, COLUMNS // SIZE, SIZE // 2, 2)))
        pairs = tl.join(even + odd, even - odd)
        x = tl.reshape(tl.permute(pairs, (0, 1, 3, 2)), (ROWS, COLUMNS))
    return x * NORM
