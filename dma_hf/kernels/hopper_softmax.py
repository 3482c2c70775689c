"""The online softmax of the Hopper kernel: from wgmma's scores to the operand of PV, in registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def exp2(x):
    """2^x with denormals flushed: one instruction where `gl.exp2` needs four."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def probability_operand(p, FP8: gl.constexpr, LAYOUT: gl.constexpr):
    """Probabilities [64, N] as the left operand of PV, without moving between threads.

    For FP8 the tokens are taken in the order that `quantize_value.PERMUTATION` stores V in.
    """
    if FP8:
        p = gl.reshape(p, (p.shape[0], p.shape[1] // 16, 2, 4, 2))
        p = gl.reshape(gl.permute(p, (0, 1, 3, 2, 4)), (p.shape[0], p.shape[1] * 16))
    return gl.convert_layout(p, LAYOUT, assert_trivial=True).to(gl.float8e4nv if FP8 else gl.bfloat16)


@gluon.jit
def _joined(x, PARTS: gl.constexpr, MAX: gl.constexpr):
    """Columns of `x` [M, N] joined into [M, N / PARTS]; those joined lie N / PARTS apart, in one thread."""
    parts = gl.reshape(x, (x.shape[0], PARTS, x.shape[1] // PARTS))
    return gl.max(parts, 1) if MAX else gl.sum(parts, 1)


@gluon.jit
def joined_by_thread(x, MAX: gl.constexpr):
    """Columns of `x` [M, N] joined into [M, 8], which every thread does alone.

    In two steps, each of many short chains: one reduction of all columns would be one chain for each row,
    every instruction waiting for the last.
    """
    return _joined(_joined(x, 4, MAX), x.shape[1] // 32, MAX)


@gluon.jit
def softmax_step(
    scores, ordered, factor, offset, row_max, SHIFT: gl.constexpr, OFFSET: gl.constexpr, MASKED: gl.constexpr
):  # fmt: skip
    """One step of the online softmax; score = scores * factor - offset, in units of log2.

    `ordered` has the order of `scores`: the integers that they were made of, where no key has a scale of its
    own. The maximum of three integers is one instruction.

    Returns:
        probabilities * 2^SHIFT [M, N], the correction [M] of what was summed before, the new running
        maximum [M] (a whole number, see `reference`), and the sums [M, 8] of the probabilities.
    """
    block_max = gl.max(joined_by_thread(ordered, True), 1).to(gl.float32)
    block_max = gl.convert_layout(block_max, factor.type.layout) * factor
    if OFFSET:
        block_max -= offset
    new_max = gl.maximum(row_max, gl.ceil(block_max))
    shift = new_max
    if MASKED:
        shift = gl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen no key yet
    correction = exp2(row_max - shift)
    if OFFSET:
        shift += offset
    shift -= SHIFT
    p = exp2(scores * factor[:, None] - shift[:, None])
    return p, correction, new_max, joined_by_thread(p, False)


@gluon.jit
def cut_scores(scores, count):
    """`scores` [M, N] of each row's first `count` [M] keys, -Inf beyond."""
    columns = gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
    # A thread's columns differ from another's in bits 1 and 2 only: with these on the other side, what is
    # compared are constants, which take no registers.
    real = (columns & ~6)[None, :] < count[:, None] - (columns & 6)[None, :]
    return gl.where(real, scores, float("-inf"))


@gluon.jit
def rescaled(x, correction):
    """Rows of `x` [M, N] times `correction` [M]."""
    return x * gl.convert_layout(correction, gl.SliceLayout(1, x.type.layout))[:, None]
