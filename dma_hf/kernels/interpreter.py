"""Operations that Triton's interpreter computes otherwise than a GPU, put right in one place.

Compiled kernels use the hardware's instructions. Under TRITON_INTERPRET=1, which the tests on CPU use,
these helpers keep the interpreter from multiplying bfloat16 as if its bits were integers, from truncating
where a GPU rounds, from losing NaN in E4M3, and from rounding a fused multiply-add twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .encoding import element_code, round_element

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def widen(x):
    """An operand of a matrix product: as it is on a GPU, float32 in the interpreter."""
    if INTERPRETED:
        wide = x.to(tl.float32)
        if x.dtype == tl.float8e4nv:
            nan = (x.to(tl.uint8, bitcast=True) & 0x7F) == 0x7F
            wide = tl.where(nan, float("nan"), wide)
        return wide
    else:
        return x


@triton.jit
def dot(a, b, accumulator=None, SPLIT_SUMS: tl.constexpr = None):
    """a @ b in float32; `accumulator` is added. float32 operands keep float32's accuracy.

    SPLIT_SUMS: how many FP8 products the tensor core adds up at most; the rest is added in float32.
    """
    # tf32x3: three TF32 products give float32's accuracy; 16- and 8-bit operands ignore it
    return tl.dot(
        widen(a),
        widen(b),
        accumulator,
        input_precision="tf32x3",
        max_num_imprecise_acc=SPLIT_SUMS,
    )


@triton.jit
def multiply(a, b):
    """a * b, rounded. A compiler may fuse an ordinary product with the addition that follows it."""
    if INTERPRETED:
        return a * b
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """`x` (float32) rounded to nearest even in `dtype`, a 16-bit float type or float32."""
    if INTERPRETED:  # noqa: SIM102 - "and" does not short-cut at compile time
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def to_e4m3(x):
    """`x` (float32) as E4M3: round to nearest even, saturating, NaN kept; sm_89 and later."""
    if INTERPRETED:
        code = element_code(round_element(x, "e4m3"), x, "e4m3")
        return tl.where(x == x, code, 0x7F).to(tl.float8e4nv, bitcast=True)
    else:
        return x.to(tl.float8e4nv)


@triton.jit
def round_e4m3(x):
    """`x` (float32) rounded to E4M3, as float32, with the hardware's conversion where there is one."""
    if INTERPRETED:
        return round_element(x, "e4m3")
    elif tl.target_info.cuda_capability_geq(8, 9):
        return x.to(tl.float8e4nv).to(tl.float32)
    else:
        return round_element(x, "e4m3")


@triton.jit
def divide(x, divisor, inverse):
    """x / divisor, correctly rounded, given the correctly rounded inverse = 1 / divisor.

    Three multiply-adds instead of a division's ten or so instructions and branch: the remainder of the
    first guess is exact in a fused multiply-add, and corrects it (Markstein's theorem). Inf gives NaN.
    """
    if INTERPRETED:
        infinite = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) == 0x7F800000
        return tl.where(infinite, float("nan"), tl.div_rn(x, divisor))
    else:
        guess = x * inverse
        remainder = tl.fma(guess, -divisor, x)  # with -guess the assembler multiplies once more
        return tl.fma(remainder, inverse, guess)
