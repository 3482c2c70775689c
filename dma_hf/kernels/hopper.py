"""The attention kernel for Hopper, in Gluon: the portable kernel's function for 8-bit low tiles.

One warp is the producer: it asks the copy engine for every tile. Two consumers of four warps take 64
queries each. In the long loop a consumer starts QK^T of one block and PV of the block before, both
asynchronous, and computes the softmax while they run. PV is FP8, or 16 bits with V as given.

Gluon shows registers and shared memory as they are; a few things here are done in a certain way for the
assembler's sake, and say so.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..config import DMAConfig
from ..formats import FORMATS
from ..modifiers import LOG2_E
from .launching import Launches
from .quantize import QuantizedKey
from .quantize_value import QuantizedValue

BLOCK_M = gl.constexpr(128)
"""Queries of a program: two consumers of 64."""
LOW_N = gl.constexpr(128)
HIGH_N = gl.constexpr(64)
"""Keys of a step: an 8-bit block of 128 keys is as large as a 16-bit block of 64."""
STAGES = 3
"""Blocks in flight; two with 16-bit PV at head dimension 128, of which shared memory holds no more."""
LATE_MAXIMUM_DIM = 64
"""Head dimension at which a block's maximum is found after its exponentials, see `_late_maximum_softmax`.

At 64 a block has half the products for the same softmax, and this took FP8 PV from 484 to 524 TFLOP/s (INT8
scores) and from 480 to 528 (FP8 scores); at 128 it was 2 % slower.
"""
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24

HEAD_DIMS = (64, 128)

# names that changed between Triton 3.6 and 3.9
_sync_threads = getattr(gl, "barrier", None) or gl.thread_barrier
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

_DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float32: gl.float32,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def why_not_hopper(
    capability: int, config: DMAConfig, query: Tensor, key: Tensor, value: Tensor, causal: bool
) -> str | None:
    """Why this kernel cannot serve a call, or None. The portable kernel serves whatever it does not.

    Args:
        capability: of the device, 90 for sm_90.
        query, key, value: [B, H, M, D], [B, Hkv, N, D], [B, Hkv, N, Dv].
    """
    dim = query.shape[-1]
    if capability != 90:
        return f"it is made of Hopper's instructions, and this is sm_{capability}"
    if query.dtype != torch.bfloat16:
        return f"it takes bfloat16, not {query.dtype}"
    if dim not in HEAD_DIMS or value.shape[-1] != dim:
        return f"it has head dimensions 64 and 128, D = Dv, not {dim} and {value.shape[-1]}"
    highs = {"fp8": ("none", "fp8"), "int8": ("none", "int8"), "fp8_tile": ("none",), "int8_tile": ("none",)}
    if config.high not in highs.get(config.low, ()):
        return (
            "it has low=fp8 or int8 with high=none or the same, and fp8_tile or int8_tile with high=none, not"
            f" {config.low} and {config.high}"
        )
    if config.rotate:
        return "it does not rotate"
    if config.tile % BLOCK_M.value:
        return f"its blocks need tiles of a multiple of {BLOCK_M.value} tokens, not {config.tile}"
    if causal and config.high != config.low and config.diagonal == 0:
        return "it cuts the causal diagonal in high tiles only"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        # the copy engine reads in steps of 16 bytes
        if tensor.data_ptr() % 16 or any(stride % 8 for stride in tensor.stride()[:-1]):
            return f"{name} is not laid out in steps of 16 bytes"
    return None


@gluon.jit
def _exp2(x):
    """2^x with denormals flushed: one instruction where `gl.exp2` needs four."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _pack(p, FP8: gl.constexpr):
    """`p` (float32) rounded to E4M3 or bfloat16, int32 of the same shape.

    Every fourth (second) column holds a register with that column and the next three (one); the others are
    constants and cost nothing. Carried through a loop as 8-bit elements, each would take a register of its
    own, and 186 instructions would take registers apart and put them together again.
    """
    COUNT: gl.constexpr = 4 if FP8 else 2
    if FP8:
        packed = gl.inline_asm_elementwise(
            """
            {
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $5, $4;
            cvt.rn.satfinite.e4m3x2.f32 high, $7, $6;
            mov.b32 $0, {low, high};
            }
            """,
            "=r,=r,=r,=r,f,f,f,f", [p], dtype=gl.int32, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $3, $2;", "=r,=r,f,f", [p], dtype=gl.int32, is_pure=True, pack=2
        )
    columns = gl.arange(0, p.shape[1], gl.SliceLayout(0, p.type.layout))
    return gl.where((columns % COUNT == 0)[None, :], packed, 0)


@gluon.jit
def _unpack(packed, FP8: gl.constexpr):
    """What `_pack` made, as an operand."""
    if FP8:
        return gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r,r,r", [packed], dtype=gl.float8e4nv, is_pure=True, pack=4
        )
    else:
        return gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r", [packed], dtype=gl.bfloat16, is_pure=True, pack=2
        )


@gluon.jit
def _keep(packed, FP8: gl.constexpr):
    """Keep an operand in its registers up to here: wgmma reads them until it has been waited for.

    `warpgroup_mma_wait` does this for its `deps`, but these are packed.
    """
    if FP8:
        gl.inline_asm_elementwise("", "=r,r,r,r,r", [packed], dtype=gl.float8e4nv, is_pure=False, pack=4)
    else:
        gl.inline_asm_elementwise("", "=r,r,r", [packed], dtype=gl.bfloat16, is_pure=False, pack=2)


@gluon.jit
def _probability_operand(p, FP8: gl.constexpr, LAYOUT: gl.constexpr):
    """Probabilities [64, N] as the packed left operand of PV, without moving between threads.

    For FP8 the tokens are taken in the order that `quantize_value.PERMUTATION` stores V in.
    """
    if FP8:
        p = gl.reshape(p, (p.shape[0], p.shape[1] // 16, 2, 4, 2))
        p = gl.reshape(gl.permute(p, (0, 1, 3, 2, 4)), (p.shape[0], p.shape[1] * 16))
    return _pack(gl.convert_layout(p, LAYOUT, assert_trivial=True), FP8)


@gluon.jit
def _joined(x, PARTS: gl.constexpr, MAX: gl.constexpr):
    """Columns of `x` [M, N] joined into [M, N / PARTS]; those joined lie N / PARTS apart, in one thread."""
    parts = gl.reshape(x, (x.shape[0], PARTS, x.shape[1] // PARTS))
    return gl.max(parts, 1) if MAX else gl.sum(parts, 1)


@gluon.jit
def _partial(x, MAX: gl.constexpr):
    """Columns of `x` [M, N] joined into [M, 8], which every thread does alone.

    In two steps, each of many short chains: one reduction of all columns would be one chain for each row,
    every instruction waiting for the last.
    """
    return _joined(_joined(x, 4, MAX), x.shape[1] // 32, MAX)


@gluon.jit
def _softmax(
    scores, ordered, factor, offset, row_max, SHIFT: gl.constexpr, OFFSET: gl.constexpr, MASKED: gl.constexpr
):  # fmt: skip
    """One step of the online softmax; score = scores * factor - offset, in units of log2.

    `ordered` has the order of `scores`: the integers that they were made of, where no key has a scale of its
    own. The maximum of three integers is one instruction.

    Returns:
        probabilities * 2^SHIFT [M, N], the correction [M] of what was summed before, the new running
        maximum [M] (a whole number, see `reference`), and the sums [M, 8] of the probabilities.
    """
    block_max = gl.max(_partial(ordered, True), 1).to(gl.float32)
    block_max = gl.convert_layout(block_max, factor.type.layout) * factor
    if OFFSET:
        block_max -= offset
    new_max = gl.maximum(row_max, gl.ceil(block_max))
    shift = new_max
    if MASKED:
        shift = gl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen no key yet
    correction = _exp2(row_max - shift)
    if OFFSET:
        shift += offset
    shift -= SHIFT
    p = _exp2(scores * factor[:, None] - shift[:, None])
    return p, correction, new_max, _partial(p, False)


@gluon.jit
def _late_maximum_softmax(scores, factor, row_max, SHIFT: gl.constexpr):
    """`_softmax` with the exponentials taken before this block's maximum is known, from the maximum before.

    The maximum is then found while the exponentials run, not ahead of them, and what it corrects is a power
    of two: the probabilities come out the same. A block that rises by more than 2^119 over everything
    before it makes the row's sum Inf or NaN; the caller looks for that.

    Returns:
        as `_softmax`, but the sums [M, 8] are those before the correction.
    """
    shift = row_max - SHIFT
    p = _exp2(scores * factor[:, None] - shift[:, None])
    # positive floats compare as integers do, of which the maximum of three is one instruction
    block_max = gl.max(_partial(p.to(gl.int32, bitcast=True), True), 1)
    # the smallest whole power of two that is no smaller
    exponent = (gl.convert_layout(block_max, factor.type.layout) + 0x7FFFFF) >> 23
    # at most 2^126, so that the correction is a normal number
    rise = gl.minimum(gl.maximum(exponent - (127 + SHIFT), 0), 126)
    correction = ((127 - rise) << 23).to(gl.float32, bitcast=True)
    return p * correction[:, None], correction, row_max + rise.to(gl.float32), _partial(p, False)


@gluon.jit
def _cut(scores, first, count):
    """`scores` [M, N] of the keys from `first` on, -Inf beyond the last of `count` keys."""
    if first + scores.shape[1] > count:
        columns = gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
        # A thread's columns differ from another's in bits 1 and 2 only: with these on the other side, what is
        # compared are constants, which take no registers.
        real = (columns & ~6) < count - first - (columns & 6)
        scores = gl.where(real[None, :], scores, float("-inf"))
    return scores


@gluon.jit
def _rescaled(x, correction):
    """Rows of `x` [M, N] times `correction` [M]."""
    return x * gl.convert_layout(correction, gl.SliceLayout(1, x.type.layout))[:, None]


@gluon.jit
def _block_count(start, stop, BLOCK: gl.constexpr):
    return gl.maximum(stop - start + BLOCK - 1, 0) // BLOCK


@gluon.jit
def _first_key(block, blocks_a, start_a, start_b, BLOCK: gl.constexpr):
    """First key of a block; the first `blocks_a` blocks start at `start_a`, the others at `start_b`."""
    return gl.where(block < blocks_a, start_a + block * BLOCK, start_b + (block - blocks_a) * BLOCK)


@gluon.jit
def _value_tile(smem, FP8: gl.constexpr):
    """V [N, D] of one block in shared memory."""
    if FP8:
        return smem.reshape((smem.shape[2], smem.shape[3])).permute((1, 0))  # stored transposed
    else:
        return smem.reshape((smem.shape[2], smem.shape[3]))


@gluon.jit
def _load_value(desc, batch, kv_head, row, bar, smem, pred, FP8: gl.constexpr):
    if FP8:
        _tma_load(desc, [batch, kv_head, 0, row], bar, smem, pred=pred)
    else:
        _tma_load(desc, [batch, kv_head, row, 0], bar, smem, pred=pred)


@gluon.jit
def _load_block(
    key_desc, scale_desc, value_desc, key_smem, scale_smem, value_smem,
    key_full, key_empty, value_full, value_empty,
    block, batch, kv_head, head_row, key_row, value_row, KEY_SCALE: gl.constexpr, FP8_PV: gl.constexpr,
):  # fmt: skip
    """Ask for the K and V of one block, as soon as both consumers have left their places."""
    STAGES: gl.constexpr = key_smem.shape[0]
    stage = block % STAGES
    phase = (block // STAGES) & 1
    bar = key_full.index(stage)
    mbarrier.wait(key_empty.index(stage), phase ^ 1)
    if KEY_SCALE:
        mbarrier.expect(bar, key_desc.block_type.nbytes + scale_desc.block_type.nbytes)
        _tma_load(scale_desc, [head_row, key_row], bar, scale_smem.index(stage))
    else:
        mbarrier.expect(bar, key_desc.block_type.nbytes)
    _tma_load(key_desc, [batch, kv_head, key_row, 0], bar, key_smem.index(stage))
    bar = value_full.index(stage)
    mbarrier.wait(value_empty.index(stage), phase ^ 1)
    mbarrier.expect(bar, value_desc.block_type.nbytes)
    _load_value(value_desc, batch, kv_head, value_row, bar, value_smem.index(stage), True, FP8_PV)


@gluon.jit
def _load_step(
    key_desc, scale_desc, value_desc, key_smem, scale_smem, value_smem, full, empty,
    step, steps, batch, kv_head, head_row, key_row, value_row, KEY_SCALE: gl.constexpr, FP8_PV: gl.constexpr,
):  # fmt: skip
    """Ask for K of one block and V of the block before, as soon as both consumers have left their places.

    These are what a consumer multiplies in the same step: one barrier for both.
    """
    STAGES: gl.constexpr = key_smem.shape[0]
    stage = step % STAGES
    bar = full.index(stage)
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    KEY_BYTES: gl.constexpr = key_desc.block_type.nbytes + (scale_desc.block_type.nbytes if KEY_SCALE else 0)
    VALUE_BYTES: gl.constexpr = value_desc.block_type.nbytes
    has_key, has_value = step < steps - 1, step > 0
    mbarrier.expect(bar, KEY_BYTES, pred=step == 0)
    mbarrier.expect(bar, KEY_BYTES + VALUE_BYTES, pred=has_key & has_value)
    mbarrier.expect(bar, VALUE_BYTES, pred=step == steps - 1)
    if KEY_SCALE:
        _tma_load(scale_desc, [head_row, key_row], bar, scale_smem.index(stage), pred=has_key)
    _tma_load(key_desc, [batch, kv_head, key_row, 0], bar, key_smem.index(stage), pred=has_key)
    _load_value(value_desc, batch, kv_head, value_row, bar, value_smem.index(stage), has_value, FP8_PV)


@gluon.jit
def _producer(
    query_desc, low_key_desc, high_key_desc, low_scale_desc, high_scale_desc, low_value_desc, high_value_desc,
    query_smem, low_key, low_scale, low_value, high_key, high_scale, high_value,
    query_full, low_full, low_empty,
    high_key_full, high_key_empty, high_value_full, high_value_empty,
    batch, head, kv_head, head_row, row0, first_token,
    high_a, high_blocks, diagonal_start, low_a, low_blocks, sink_stop, low_resume,
    HIGH_RAW: gl.constexpr, TILE_SCALE: gl.constexpr, FP8_PV: gl.constexpr,
):  # fmt: skip
    for consumer in gl.static_range(2):
        bar = query_full.index(consumer)
        mbarrier.expect(bar, query_desc.block_type.nbytes)
        _tma_load(query_desc, [batch, head, row0 + consumer * 64, 0], bar, query_smem.index(consumer))
    # quantised tensors start at the sequence's first real token, the given K and V at the padding
    high_token = first_token if HIGH_RAW else 0
    value_token = 0 if FP8_PV else first_token
    for block in range(high_blocks):
        first = _first_key(block, high_a, 0, diagonal_start, HIGH_N)
        _load_block(
            high_key_desc, high_scale_desc, high_value_desc, high_key, high_scale, high_value,
            high_key_full, high_key_empty, high_value_full, high_value_empty,
            block, batch, kv_head, head_row, high_token + first, value_token + first, not HIGH_RAW, FP8_PV,
        )  # fmt: skip
    last = 0
    if low_blocks > 0:
        for step in range(low_blocks + 1):
            first = _first_key(step, low_a, sink_stop, low_resume, LOW_N)
            _load_step(
                low_key_desc, low_scale_desc, low_value_desc, low_key, low_scale, low_value,
                low_full, low_empty, step, low_blocks + 1, batch, kv_head, head_row, first,
                value_token + last, not TILE_SCALE, FP8_PV,
            )  # fmt: skip
            last = first


@gluon.jit
def _low_query(
    raw_smem, smem, mean, scale_log2e, D: gl.constexpr, INT8: gl.constexpr, OFFSET: gl.constexpr,
    ROWS: gl.constexpr, HIGH_ROWS: gl.constexpr,
):  # fmt: skip
    """Quantise one consumer's queries [64, D] a token at a time, from shared memory to shared memory.

    Returns:
        What turns 8-bit products into scores, [64] in layout ROWS; with OFFSET the score [64] of every
        query with the mean of K, in layout HIGH_ROWS (see `attention._query_operand`), else zeros.
    """
    M: gl.constexpr = 64
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    LARGEST: gl.constexpr = 127.0 if INT8 else 448.0
    x = raw_smem.reshape((M, D)).load(LAYOUT).to(gl.float32)
    offset = gl.full([M], 0.0, gl.float32, HIGH_ROWS)
    if OFFSET:
        channel_mean = gl.load(mean + gl.arange(0, D, gl.SliceLayout(0, LAYOUT)))
        offset = gl.convert_layout(gl.sum(x * channel_mean[None, :], 1) * scale_log2e, HIGH_ROWS)
    x = x * scale_log2e
    # compared as integers, NaN and Inf are the largest, and the maximum carries them into the factor
    token_max = gl.max(x.to(gl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(gl.float32, bitcast=True)
    # Correctly rounded divisions, as in the reference: an element may lie halfway between two integers, and
    # often does in bfloat16. Each is an approximation and what its remainder says; `gl.div_rn` would be two
    # calls a row, which every program waits for.
    guess = token_max * (1.0 / LARGEST)
    scale = gl.maximum(gl.fma(gl.fma(guess, -LARGEST, token_max), 1.0 / LARGEST, guess), 2.0**-126)
    inverse = 1.0 / scale
    inverse = gl.fma(gl.fma(-scale, inverse, 1.0), inverse, inverse)
    scaled = x * inverse[:, None]
    remainder = gl.fma(-scaled, gl.broadcast(scale[:, None], x)[0], x)
    scaled = gl.fma(remainder, gl.broadcast(inverse[:, None], x)[0], scaled)
    if INT8:
        # adding and taking away 1.5 * 2^23 rounds to a whole number, ties to even
        smem.store(((scaled + 12582912.0) - 12582912.0).to(gl.int8))
    else:
        smem.store(scaled.to(gl.float8e4nv))
    fence_async_shared()
    _sync_threads()
    finite = token_max.to(gl.int32, bitcast=True) < 0x7F800000
    return gl.convert_layout(gl.where(finite, scale, float("nan")), ROWS), offset


@gluon.jit
def _consumer(
    INDEX: gl.constexpr,
    query_smem, low_query, low_key, low_scale, low_value, high_key, high_scale, high_value,
    query_full, low_full, low_empty,
    high_key_full, high_key_empty, high_value_full, high_value_empty,
    out, mean, value_scale, value_mean, tile_scale, bad_keys, scale_log2e, out_b, out_h, out_n,
    batch, head, head_row, row0, position0, query_length, count, active,
    high_a, high_blocks, diagonal_start, low_a, low_blocks, sink_stop, low_resume,
    D: gl.constexpr, CAUSAL: gl.constexpr, SMOOTH: gl.constexpr, INT8: gl.constexpr,
    HIGH_RAW: gl.constexpr, MASK_LOW: gl.constexpr, TILE_SCALE: gl.constexpr,
    FP8_PV: gl.constexpr, SMOOTH_VALUE: gl.constexpr, LATE_MAXIMUM: gl.constexpr,
):  # fmt: skip
    """64 queries of the program's 128."""
    M: gl.constexpr = 64
    # E4M3 holds 448; probabilities times 2^8 use its range (`reference.FP8_PROBABILITY_SCALE`)
    SHIFT: gl.constexpr = 8 if FP8_PV else 0
    STAGES: gl.constexpr = low_key.shape[0]
    OFFSET: gl.constexpr = SMOOTH and HIGH_RAW
    LOW: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LOW_N, 32])
    HIGH: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HIGH_N, 16 if HIGH_RAW else 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32 if FP8_PV else 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 4 if FP8_PV else 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, LOW)
    HIGH_ROWS: gl.constexpr = gl.SliceLayout(1, HIGH)
    PRODUCTS: gl.constexpr = gl.int32 if INT8 else gl.float32
    raw_query = query_smem.index(INDEX).reshape((M, D))
    query = low_query.index(INDEX)
    mbarrier.wait(query_full.index(INDEX), 0)
    low_factor, offset = _low_query(
        query_smem.index(INDEX), query, mean + head_row * D, scale_log2e, D, INT8, OFFSET, ROWS, HIGH_ROWS
    )

    # High tiles first: they hold most rows' largest scores, so the running maximum settles early.
    row_max = gl.full([M], float("-inf"), gl.float32, HIGH_ROWS)
    row_sum = gl.full([M], 0.0, gl.float32, HIGH_ROWS)
    accumulator = gl.full([M, D], 0.0, gl.float32, OUT)
    first_position = position0 + INDEX * M
    positions = first_position + gl.arange(0, M, HIGH_ROWS)
    if HIGH_RAW:
        factor = gl.full([M], 1.0, gl.float32, HIGH_ROWS) * scale_log2e
    else:
        factor = gl.convert_layout(low_factor, HIGH_ROWS)
    for block in range(high_blocks):
        first = _first_key(block, high_a, 0, diagonal_start, HIGH_N)
        stage = block % STAGES
        phase = (block // STAGES) & 1
        mbarrier.wait(high_key_full.index(stage), phase)
        k = high_key.index(stage).reshape((HIGH_N, D)).permute((1, 0))
        if HIGH_RAW:
            start = gl.full([M, HIGH_N], 0.0, gl.float32, HIGH)
            token = warpgroup_mma(raw_query, k, start, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[token])
        else:
            start = gl.full([M, HIGH_N], 0, PRODUCTS, HIGH)
            token = warpgroup_mma(query, k, start, use_acc=False, is_async=True)
            key_scale = high_scale.index(stage).reshape((HIGH_N,)).load(gl.SliceLayout(0, HIGH))
            scores = warpgroup_mma_wait(0, deps=[token]).to(gl.float32) * key_scale[None, :]
        mbarrier.arrive(high_key_empty.index(stage), count=1)
        visible_to_all = first + HIGH_N <= count
        if CAUSAL:
            visible_to_all = visible_to_all & (first + HIGH_N <= first_position + 1)
        if not visible_to_all:
            columns = first + gl.arange(0, HIGH_N, gl.SliceLayout(0, HIGH))
            visible = (columns < count)[None, :]
            if CAUSAL:
                visible = visible & (columns[None, :] <= positions[:, None])
            scores = gl.where(visible, scores, float("-inf"))
        p, correction, row_max, sums = _softmax(scores, scores, factor, offset, row_max, SHIFT, OFFSET, True)
        row_sum = row_sum * correction + gl.convert_layout(gl.sum(sums, 1), HIGH_ROWS)
        packed = _probability_operand(p, FP8_PV, P)
        mbarrier.wait(high_value_full.index(stage), phase)
        v = _value_tile(high_value.index(stage), FP8_PV)
        token = warpgroup_mma(_unpack(packed, FP8_PV), v, _rescaled(accumulator, correction), is_async=True)
        accumulator = warpgroup_mma_wait(0, deps=[token])
        _keep(packed, FP8_PV)
        mbarrier.arrive(high_value_empty.index(stage), count=1)

    # Low tiles, each with at least one key, which every row sees. Around the loop go the probabilities of
    # the block before (packed), the correction they came with, and, in each thread, the sums of the columns
    # it holds.
    row_max = gl.convert_layout(row_max, ROWS)
    row_sum = gl.convert_layout(row_sum, ROWS)
    start = gl.full([M, LOW_N], 0, PRODUCTS, LOW)
    zeros = gl.full([M, D], 0.0, gl.float32, OUT)
    no_offset = gl.full([M], 0.0, gl.float32, ROWS)
    if low_blocks > 0:
        mbarrier.wait(low_full.index(0), 0)
        k = low_key.index(0).reshape((LOW_N, D)).permute((1, 0))
        score_token = warpgroup_mma(query, k, start, use_acc=False, is_async=True)
        products = warpgroup_mma_wait(0, deps=[score_token])
        scores = products.to(gl.float32)
        block_factor = low_factor
        if TILE_SCALE:
            first = _first_key(0, low_a, sink_stop, low_resume, LOW_N)
            block_factor = low_factor * gl.load(tile_scale + first // LOW_N)
        else:
            key_scale = low_scale.index(0).reshape((LOW_N,)).load(gl.SliceLayout(0, LOW))
            scores = scores * key_scale[None, :]
        mbarrier.arrive(low_empty.index(0), count=1)
        if MASK_LOW:
            scores = _cut(scores, _first_key(0, low_a, sink_stop, low_resume, LOW_N), count)
        ORDERED: gl.constexpr = INT8 and TILE_SCALE and not MASK_LOW
        ordered = products if ORDERED else scores
        p, correction, row_max, sums = _softmax(
            scores, ordered, block_factor, no_offset, row_max, SHIFT, False, False
        )
        row_sum = row_sum * correction
        packed = _probability_operand(p, FP8_PV, P)
        stage = 1
        phase = 0
        mbarrier.wait(low_full.index(stage), phase)
        for block in range(1, low_blocks):
            if not FP8_PV:
                accumulator = _rescaled(accumulator, correction)
            k = low_key.index(stage).reshape((LOW_N, D)).permute((1, 0))
            score_token = warpgroup_mma(query, k, start, use_acc=False, is_async=True)
            if TILE_SCALE:  # one number, loaded while the tensor core works: it joins the rows' factors
                first = _first_key(block, low_a, sink_stop, low_resume, LOW_N)
                block_scale = gl.load(tile_scale + first // LOW_N)
            v = _value_tile(low_value.index(stage), FP8_PV)
            # The tensor core adds FP8 products in about 14 bits, so each block is added up for itself: over
            # 8,192 tokens one accumulator was 1.8e-2 off, and the more tokens the more.
            addend = zeros if FP8_PV else accumulator
            value_token = warpgroup_mma(_unpack(packed, FP8_PV), v, addend, use_acc=not FP8_PV, is_async=True)
            products = warpgroup_mma_wait(1, deps=[score_token])
            scores = products.to(gl.float32)
            block_factor = low_factor
            if TILE_SCALE:
                block_factor = low_factor * block_scale
            else:
                key_scale = low_scale.index(stage).reshape((LOW_N,)).load(gl.SliceLayout(0, LOW))
                scores = scores * key_scale[None, :]
            if MASK_LOW:
                scores = _cut(scores, _first_key(block, low_a, sink_stop, low_resume, LOW_N), count)
            last_correction = correction
            if LATE_MAXIMUM:
                p, correction, row_max, more = _late_maximum_softmax(scores, block_factor, row_max, SHIFT)
                sums = _rescaled(sums + more, correction)
            else:
                ordered = products if ORDERED else scores
                p, correction, row_max, more = _softmax(
                    scores, ordered, block_factor, no_offset, row_max, SHIFT, False, False
                )
                sums = _rescaled(sums, correction) + more
            row_sum = row_sum * correction
            # The wait for the next keys stands here so that there is a branch between the softmax and the
            # wait for PV. With 16-bit PV, which takes twice as long, the assembler then leaves the
            # exponentials before that wait. FP8 PV is done by then, and most variants have them behind it,
            # beside the accumulator's additions.
            next_stage = gl.where(stage == STAGES - 1, 0, stage + 1)
            phase ^= (next_stage == 0).to(gl.int32)
            mbarrier.wait(low_full.index(next_stage), phase)
            product = warpgroup_mma_wait(0, deps=[value_token])
            _keep(packed, FP8_PV)
            mbarrier.arrive(low_empty.index(stage), count=1)
            stage = next_stage
            accumulator = (_rescaled(accumulator, last_correction) + product) if FP8_PV else product
            # Not before the wait: writing registers that a product will read while another one runs makes
            # the assembler serialise them all (note C7513).
            packed = _probability_operand(p, FP8_PV, P)
        v = _value_tile(low_value.index(stage), FP8_PV)
        addend = zeros if FP8_PV else _rescaled(accumulator, correction)
        value_token = warpgroup_mma(_unpack(packed, FP8_PV), v, addend, use_acc=not FP8_PV, is_async=True)
        product = warpgroup_mma_wait(0, deps=[value_token])
        accumulator = (_rescaled(accumulator, correction) + product) if FP8_PV else product
        _keep(packed, FP8_PV)
        row_sum += gl.convert_layout(gl.sum(sums, 1), ROWS)
        if LATE_MAXIMUM:
            # the exponentials overflowed, or the query holds a NaN: the repair does the head again
            flag = gl.full([M], 1, gl.int32, ROWS)
            gl.store(bad_keys + head_row + 0 * flag, flag, mask=~(row_sum < float("inf")))

    if active:
        # a row that saw no key is zeros, as in SDPA; NaN sums stay NaN
        accumulator = _rescaled(accumulator, 1.0 / gl.where(row_sum == 0.0, 1.0, row_sum))
        column = gl.arange(0, D, gl.SliceLayout(0, OUT))
        if FP8_PV:
            accumulator = accumulator * gl.load(value_scale + head_row * D + column)[None, :]
        if SMOOTH_VALUE:
            average = accumulator + gl.load(value_mean + head_row * D + column)[None, :]
            empty = gl.convert_layout(row_sum == 0.0, gl.SliceLayout(1, OUT))
            accumulator = gl.where(empty[:, None], 0.0, average)
        # Through the query's own shared memory, which is free now, rows become contiguous. They are not
        # stored by the copy engine: a store that starts at a negative row is an illegal instruction.
        raw_query.store(accumulator.to(raw_query.dtype))
        _sync_threads()
        TILE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
        row = row0 + INDEX * M + gl.arange(0, M, gl.SliceLayout(1, TILE))
        base = out + batch.to(gl.int64) * out_b + head.to(gl.int64) * out_h
        pointers = (
            base + row.to(gl.int64)[:, None] * out_n + gl.arange(0, D, gl.SliceLayout(0, TILE))[None, :]
        )
        real = (row >= 0) & (row < query_length)
        gl.store(pointers, raw_query.load(TILE), mask=gl.broadcast(real[:, None], pointers)[0])


@gluon.jit
def _tiles(desc, COUNT: gl.constexpr):
    """Shared memory for COUNT of the tiles that `desc` loads."""
    shape: gl.constexpr = [COUNT] + desc.block_type.shape  # noqa: RUF005 - Triton has no starred lists
    return gl.allocate_shared_memory(desc.dtype, shape, desc.layout)


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each complete after ARRIVALS arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


# lengths vary from call to call: a kernel for each divisibility, or for length 1, would be compiled in vain
@gluon.jit(do_not_specialize=["query_length", "key_length"])
def _hopper_kernel(
    query_desc, low_key_desc, high_key_desc, low_scale_desc, high_scale_desc, low_value_desc, high_value_desc,
    out, mean, value_scale, value_mean, tile_scale, tiles, bad_keys, ranges, query_length, key_length,
    scale_log2e, out_b, out_h, out_n,
    GROUP: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr, SMOOTH: gl.constexpr, INT8: gl.constexpr,
    HIGH_RAW: gl.constexpr, MASK_LOW: gl.constexpr, TILE_SCALE: gl.constexpr,
    FP8_PV: gl.constexpr, SMOOTH_VALUE: gl.constexpr, LATE_MAXIMUM: gl.constexpr,
    PRECISION_TILE: gl.constexpr, DIAGONAL: gl.constexpr, SINK: gl.constexpr,
    STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    # heads vary fastest and query blocks run from the last to the first: the longest rows of all heads
    # start together, and the short ones fill the gaps at the end
    head, batch = gl.program_id(0), gl.program_id(1)
    block_m = gl.num_programs(2) - 1 - gl.program_id(2)
    kv_head = head // GROUP
    head_row = batch * (gl.num_programs(0) // GROUP) + kv_head
    first_token = 0
    count = key_length
    if ranges is not None:
        first_token = gl.load(ranges + batch * 2)
        count = gl.load(ranges + batch * 2 + 1) - first_token

    # positions count from the sequence's first real token; & -BLOCK_M rounds down, negatives too
    query_offset = key_length - query_length - first_token
    position0 = (query_offset & -BLOCK_M) + block_m * BLOCK_M
    row0 = position0 - query_offset
    # a head whose K holds a NaN or Inf is left to the portable kernel's repair
    active = (row0 < query_length) & (row0 + BLOCK_M > 0) & (gl.load(bad_keys + head_row) == 0)

    # the regions of this block's row of precision tiles, in tokens (design: sink, then low, then diagonal)
    tile0 = position0 & -PRECISION_TILE
    limit = gl.minimum(count, position0 + BLOCK_M) if CAUSAL else count
    limit = gl.where(active, limit, 0)
    sink_stop = gl.minimum(SINK, limit)
    diagonal_start = limit
    diagonal_stop = limit
    low_resume = limit
    if DIAGONAL > 0:
        diagonal_start = gl.minimum(gl.maximum(tile0 + PRECISION_TILE - DIAGONAL, SINK), limit)
        if not CAUSAL:
            diagonal_stop = gl.minimum(tile0 + DIAGONAL, limit)
            low_resume = gl.maximum(diagonal_stop, sink_stop)
    high_a = _block_count(0, sink_stop, HIGH_N)
    high_blocks = high_a + _block_count(diagonal_start, diagonal_stop, HIGH_N)
    low_a = _block_count(sink_stop, diagonal_start, LOW_N)
    low_blocks = low_a + _block_count(low_resume, limit, LOW_N)

    query_smem = _tiles(query_desc, 2)
    low_query = gl.allocate_shared_memory(low_key_desc.dtype, [2, 64, D], gl.NVMMASharedLayout(D, 8, 2))
    low_key, high_key = _tiles(low_key_desc, STAGES), _tiles(high_key_desc, STAGES)
    if TILE_SCALE:
        low_scale, high_scale = low_key, high_key  # not read
    else:
        low_scale, high_scale = _tiles(low_scale_desc, STAGES), _tiles(high_scale_desc, STAGES)
    low_value, high_value = _tiles(low_value_desc, STAGES), _tiles(high_value_desc, STAGES)
    query_full = _barriers(2, 1)
    low_full, low_empty = _barriers(STAGES, 1), _barriers(STAGES, 2)
    high_key_full, high_key_empty = _barriers(STAGES, 1), _barriers(STAGES, 2)
    high_value_full, high_value_empty = _barriers(STAGES, 1), _barriers(STAGES, 2)
    fence_async_shared()

    # The arguments are spelt out: a tuple in a variable would lose what is known at compile time.
    gl.warp_specialize(
        [
            (_consumer, (
                0,
                query_smem, low_query, low_key, low_scale, low_value, high_key, high_scale, high_value,
                query_full, low_full, low_empty,
                high_key_full, high_key_empty, high_value_full, high_value_empty,
                out, mean, value_scale, value_mean, tile_scale + head_row * tiles, bad_keys,
                scale_log2e, out_b, out_h, out_n,
                batch, head, head_row, row0, position0, query_length, count, active,
                high_a, high_blocks, diagonal_start, low_a, low_blocks, sink_stop, low_resume,
                D, CAUSAL, SMOOTH, INT8, HIGH_RAW, MASK_LOW, TILE_SCALE, FP8_PV, SMOOTH_VALUE, LATE_MAXIMUM,
            )),
            (_consumer, (
                1,
                query_smem, low_query, low_key, low_scale, low_value, high_key, high_scale, high_value,
                query_full, low_full, low_empty,
                high_key_full, high_key_empty, high_value_full, high_value_empty,
                out, mean, value_scale, value_mean, tile_scale + head_row * tiles, bad_keys,
                scale_log2e, out_b, out_h, out_n,
                batch, head, head_row, row0, position0, query_length, count, active,
                high_a, high_blocks, diagonal_start, low_a, low_blocks, sink_stop, low_resume,
                D, CAUSAL, SMOOTH, INT8, HIGH_RAW, MASK_LOW, TILE_SCALE, FP8_PV, SMOOTH_VALUE, LATE_MAXIMUM,
            )),
            (_producer, (
                query_desc, low_key_desc, high_key_desc, low_scale_desc, high_scale_desc,
                low_value_desc, high_value_desc,
                query_smem, low_key, low_scale, low_value, high_key, high_scale, high_value,
                query_full, low_full, low_empty,
                high_key_full, high_key_empty, high_value_full, high_value_empty,
                batch, head, kv_head, head_row, row0, first_token,
                high_a, high_blocks, diagonal_start, low_a, low_blocks, sink_stop, low_resume,
                HIGH_RAW, TILE_SCALE, FP8_PV,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def attend_hopper(
    query: Tensor,
    key: Tensor,
    quantized: QuantizedKey,
    value: Tensor | QuantizedValue,
    *,
    causal: bool,
    scale: float,
    config: DMAConfig,
    key_ranges: Tensor | None = None,
    launches: Launches | None = None,
) -> Tensor:
    """Attention of `query` [B, H, M, D] to a quantised K and V; `why_not_hopper` says when it can.

    Args:
        key: the K that was quantised, [B, Hkv, N, D]; read where the high operand is "raw".
        quantized: what `quantize_key` made of K, for the operand kinds of sm_90.
        value: for 16-bit PV, V as given [B, Hkv, N, D]; for FP8 PV, what
            `quantize_value(value, key_ranges, permuted=True)` made of it.
        causal, scale, config: as in `reference_attention`.
        key_ranges: int32 [B, 2] ranges of real tokens, or None.
        launches: where to launch.

    Returns:
        [B, H, M, D], stored as [B, M, H, D]. Rows of heads that `quantized.bad_keys` flags are not to be
        used: the portable kernel's repair does them. The kernel flags further heads (see LATE_MAXIMUM_DIM),
        so the repair is launched afterwards.
    """
    batch, heads, query_length, dim = query.shape
    kv_heads, key_length = key.shape[1:3]
    low, high = quantized.low, quantized.high
    assert low.elements is not None
    assert low.scale is not None
    # with one format everywhere the map decides nothing but which loop masks: one diagonal tile
    diagonal, sink = (config.tile, 0) if low is high else (config.diagonal, config.sink)
    launches = Launches(query.device) if launches is None else launches
    out = launches.output((batch, query_length, heads, dim), query.dtype).transpose(1, 2)
    high_key = key if high.elements is None else high.elements
    scales = low.scale.flatten(0, 1)
    tile_scale = FORMATS[low.format].key_tokens > 1
    low_n, high_n, block_m = LOW_N.value, HIGH_N.value, BLOCK_M.value
    # without padding, a causal low tile lies wholly in the past: only these cases cut one
    mask_low = key_ranges is not None or (not causal and key_length % low_n != 0)
    if isinstance(value, QuantizedValue):
        values, value_scale, value_mean = value.elements, value.scale, value.mean
        value_blocks = [1, 1, dim, low_n], [1, 1, dim, high_n]
    else:
        values, value_scale, value_mean = value, None, None
        value_blocks = [1, 1, low_n, dim], [1, 1, high_n, dim]
    low_key = _descriptor(low.elements, [1, 1, low_n, dim])
    # the copy engine brings in the scales of single keys; a partition takes no None: any descriptor or
    # tensor stands for what is not read
    low_scales = low_key if tile_scale else _descriptor(scales, [1, low_n])
    high_scales = low_key if tile_scale else _descriptor(scales, [1, high_n])
    if key_ranges is None:
        blocks_m = triton.cdiv((key_length - query_length) % block_m + query_length, block_m)
    else:  # where a row's first block starts is known on the device only
        blocks_m = triton.cdiv(query_length - 1, block_m) + 1
    launches.launch(
        _hopper_kernel, (heads, batch, blocks_m),
        _descriptor(query, [1, 1, 64, dim]),
        low_key, _descriptor(high_key, [1, 1, high_n, dim]), low_scales, high_scales,
        _descriptor(values, value_blocks[0]), _descriptor(values, value_blocks[1]),
        out,
        scales if quantized.mean is None else quantized.mean,
        scales if value_scale is None else value_scale, scales if value_mean is None else value_mean,
        scales, scales.shape[1],
        quantized.bad_keys, key_ranges, query_length, key_length, scale * LOG2_E, *out.stride()[:3],
        GROUP=heads // kv_heads, D=dim, CAUSAL=causal, SMOOTH=quantized.mean is not None,
        INT8=low.kind == "int8", HIGH_RAW=high.elements is None, MASK_LOW=mask_low, TILE_SCALE=tile_scale,
        FP8_PV=value_scale is not None, SMOOTH_VALUE=value_mean is not None,
        LATE_MAXIMUM=dim == LATE_MAXIMUM_DIM,
        PRECISION_TILE=config.tile, DIAGONAL=diagonal, SINK=sink,
        STAGES=2 if value_scale is None and dim == 128 else STAGES,
        CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=4,
    )  # fmt: skip
    return out


def _descriptor(tensor: Tensor, block_shape: list[int]) -> TensorDescriptor:
    """How the copy engine reads blocks of `tensor`, with the swizzle that wgmma wants."""
    dtype = _DTYPES[tensor.dtype]
    if tensor.dtype == torch.float32:  # scales, which ordinary loads read
        layout = gl.NVMMASharedLayout(0, 32, len(block_shape))
    else:
        layout = gl.NVMMASharedLayout.get_default_for(block_shape, dtype)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block_shape, layout)
