"""The attention kernel for Hopper, in Gluon: the portable kernel's function for 8-bit low tiles.

As many programs as multiprocessors, each with one producer and three consumers. The producer, a warp, asks
the copy engine for K and V. A consumer, four warps, takes 64 of a tile's 192 queries and does one thing after
the other: scores, softmax, PV. While it waits for the tensor core, the other two have the rest of the
multiprocessor. PV is FP8, or 16 bits with V as given.

Gluon shows registers and shared memory as they are; a few things here are done in a certain way for the
assembler's sake, and say so.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..config import DMAConfig
from ..formats import FORMATS
from ..modifiers import LOG2_E
from ..policy import multiprocessors
from .gluon_names import record, reinterpret, sync_threads, tma_load
from .hopper_softmax import cut_scores, joined_by_thread, probability_operand, rescaled, softmax_step
from .hopper_work import (
    BLOCK_M,
    CONSUMER_M,
    CONSUMERS,
    HIGH_N,
    LOW_N,
    Setting,
    diagonal_keys,
    first_key,
    tile_count,
    tile_of,
    tile_work,
    visible_keys,
)
from .launching import Launches
from .quantize import QuantizedKey
from .quantize_value import QuantizedValue

STAGES = gl.constexpr(2)
"""Blocks in flight. Four were no faster at any length: 1 to 3 % slower at 16k."""
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(160), gl.constexpr(24)
"""Of a thread. Three consumers have no more, and head dimension 128 needs them all."""
CHUNK = gl.constexpr(16)
"""Queries that a consumer quantises at a time."""
LOAD = gl.constexpr(8)
"""Elements of 16 bits that a thread loads at once."""

# places of a consumer's arguments in shared memory, see `_get`
TILES, BATCHES, BLOCKS_M, QUERY_LENGTH, KEY_LENGTH = (gl.constexpr(i) for i in range(5))
QUERY_B, QUERY_H, QUERY_N, VALUE_SCALE, VALUE_MEAN = (gl.constexpr(i) for i in range(5, 10))
ARGUMENTS = gl.constexpr(10)

HEAD_DIMS = (64, 128)

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
    if config.tile % LOW_N.value:
        return f"its blocks need tiles of a multiple of {LOW_N.value} tokens, not {config.tile}"
    if causal and config.high != config.low and config.diagonal == 0:
        return "it cuts the causal diagonal in high tiles only"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        # the copy engine reads in steps of 16 bytes
        if tensor.data_ptr() % 16 or any(stride % 8 for stride in tensor.stride()[:-1]):
            return f"{name} is not laid out in steps of 16 bytes"
    return None


@record
class _Memory:
    """A program's shared memory and its barriers."""

    raw_query: gl.shared_memory_descriptor  # [CONSUMERS, 1, 1, 64, D]
    query: gl.shared_memory_descriptor  # quantised: [CONSUMERS * chunks, CHUNK, D]
    rows: gl.shared_memory_descriptor  # scales, then offsets, of queries: [2 * CONSUMERS * chunks, CHUNK]
    channels: gl.shared_memory_descriptor  # scales, then means, of V's channels: [2 * CONSUMERS, D]
    key: gl.shared_memory_descriptor  # [STAGES, 1, 1, N, D]
    key_scale: gl.shared_memory_descriptor  # [STAGES, 1, N]; not read where tiles have one scale
    value: gl.shared_memory_descriptor  # [STAGES, 1, 1, N, D], or [STAGES, 1, 1, D, N] in FP8
    arguments: gl.shared_memory_descriptor  # [ARGUMENTS, 1], see `_get`
    query_full: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@gluon.jit
def _put(arguments, place: gl.constexpr, number):
    """Leave a number or an address for `_get`."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    arguments.index(place).store(gl.full([1], 0, gl.int64, ONE) + number.to(gl.int64))


@gluon.jit
def _get(arguments, place: gl.constexpr, dtype: gl.constexpr):
    """A number or an address from shared memory.

    A consumer gets here what it needs between its loops only. As its arguments, these would take registers
    that the loops do not have: 14 loads and stores of spilt registers in every step of the long loop.
    """
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(arguments.index(place).load(ONE), 0).to(dtype)


@gluon.jit
def _stage_tile(smem, dtype: gl.constexpr, N: gl.constexpr, D: gl.constexpr):
    """A stage's memory as a tile [1, 1, N, D]."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, N, D], dtype)
    return reinterpret(smem, dtype, [1, 1, N, D], LAYOUT)


@gluon.jit
def _value_tile(smem, FP8: gl.constexpr, N: gl.constexpr, D: gl.constexpr):
    """A stage's memory for V as a tile [1, 1, N, D], or, in FP8, [1, 1, D, N]."""
    if FP8:
        return _stage_tile(smem, smem.dtype, D, N)
    else:
        return _stage_tile(smem, smem.dtype, N, D)


@gluon.jit
def _load_block(
    key_desc, scale_desc, value_desc, memory, step, work, kv_head, key_row, value_row,
    N: gl.constexpr, KEY_SCALE: gl.constexpr, setting,
):  # fmt: skip
    """Ask for K and V of one block, as soon as all consumers have left its place."""
    SCALE_BYTES: gl.constexpr = scale_desc.block_type.nbytes if KEY_SCALE else 0
    stage = step % STAGES
    bar = memory.full.index(stage)
    mbarrier.wait(memory.empty.index(stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(bar, key_desc.block_type.nbytes + value_desc.block_type.nbytes + SCALE_BYTES)
    key_smem = _stage_tile(memory.key.index(stage), key_desc.dtype, N, setting.D)
    tma_load(key_desc, [work.batch, kv_head, key_row, 0], bar, key_smem)
    if KEY_SCALE:
        tma_load(scale_desc, [work.head_row, key_row], bar, memory.key_scale.index(stage))
    value_smem = _value_tile(memory.value.index(stage), setting.FP8_PV, N, setting.D)
    if setting.FP8_PV:
        tma_load(value_desc, [work.batch, kv_head, 0, value_row], bar, value_smem)
    else:
        tma_load(value_desc, [work.batch, kv_head, value_row, 0], bar, value_smem)


@gluon.jit
def _producer(
    low_key_desc, high_key_desc, scale_desc, low_value_desc, high_value_desc, memory,
    batches, blocks_m, ranges, query_length, key_length, setting,
):  # fmt: skip
    step = 0
    for round in range(tile_count(setting.HEADS * batches * blocks_m)):
        work = tile_work(tile_of(round), batches, blocks_m, ranges, query_length, key_length, setting)
        kv_head = work.head // setting.GROUP
        # quantised tensors start at the sequence's first real token, the given K and V at the padding
        high_token = work.first_token if setting.HIGH_RAW else 0
        value_token = 0 if setting.FP8_PV else work.first_token
        for block in range(work.high_blocks):
            first = first_key(block, work.high_a, 0, work.diagonal_start, HIGH_N)
            _load_block(
                high_key_desc, scale_desc, high_value_desc, memory, step, work, kv_head,
                high_token + first, value_token + first, HIGH_N, not setting.HIGH_RAW, setting,
            )  # fmt: skip
            step += 1
        for block in range(work.low_blocks):
            first = first_key(block, work.low_a, setting.SINK, work.low_resume, LOW_N)
            _load_block(
                low_key_desc, scale_desc, low_value_desc, memory, step, work, kv_head,
                first, value_token + first, LOW_N, not setting.TILE_SCALE, setting,
            )  # fmt: skip
            step += 1


@gluon.jit
def _low_query(
    query, query_n, first_real, stop_real, mean, scale_log2e, memory,
    INDEX: gl.constexpr, OFFSET: gl.constexpr, ROWS: gl.constexpr, HIGH_ROWS: gl.constexpr, setting,
):  # fmt: skip
    """Quantise one consumer's queries [64, D] a token at a time, from global to shared memory.

    In a loop over 16 queries at a time: all at once was 1,100 instructions, which every tile waited for
    12,000 cycles, half of them for the instruction cache.

    Args:
        query: address of the first of 64 queries, of which those in [first_real, stop_real) exist.

    Returns:
        What turns 8-bit products into scores, [64] in layout ROWS; with OFFSET the score [64] of every query
        with the mean of K, in layout HIGH_ROWS (see `attention._query_operand`), else zeros.
    """
    CHUNKS: gl.constexpr = CONSUMER_M // CHUNK
    D: gl.constexpr = setting.D
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    LARGEST: gl.constexpr = 127.0 if setting.INT8 else 448.0
    column = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    row = gl.arange(0, CHUNK, gl.SliceLayout(1, LAYOUT))
    if OFFSET:
        channel_mean = gl.load(mean + column)
    pointers = query + row[:, None] * query_n + column[None, :]
    real = gl.broadcast(((row >= first_real) & (row < stop_real))[:, None], pointers)[0]
    following = gl.load(pointers, mask=real, other=0.0)
    for chunk in range(CHUNKS):
        x = following.to(gl.float32)
        # the next chunk's queries arrive meanwhile
        row += CHUNK
        pointers += CHUNK * query_n
        real = gl.broadcast(
            ((row >= first_real) & (row < gl.minimum(stop_real, CONSUMER_M)))[:, None], pointers
        )[0]
        following = gl.load(pointers, mask=real, other=0.0)
        if OFFSET:
            offset = gl.sum(x * channel_mean[None, :], 1) * scale_log2e
            memory.rows.index(CONSUMERS * CHUNKS + INDEX * CHUNKS + chunk).store(offset)
        x = x * scale_log2e
        # compared as integers, NaN and Inf are the largest, and the maximum carries them into the factor
        token_max = gl.max(x.to(gl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(gl.float32, bitcast=True)
        # Correctly rounded divisions, as in the reference: an element may lie halfway between two integers,
        # and often does in bfloat16. Each is an approximation and what its remainder says; `gl.div_rn` would
        # be a call.
        guess = token_max * (1.0 / LARGEST)
        scale = gl.maximum(gl.fma(gl.fma(guess, -LARGEST, token_max), 1.0 / LARGEST, guess), 2.0**-126)
        inverse = 1.0 / scale
        inverse = gl.fma(gl.fma(-scale, inverse, 1.0), inverse, inverse)
        scaled = x * inverse[:, None]
        remainder = gl.fma(scaled, gl.broadcast(-scale[:, None], x)[0], x)
        scaled = gl.fma(remainder, gl.broadcast(inverse[:, None], x)[0], scaled)
        if setting.INT8:
            # adding 1.5 * 2^23 rounds to a whole number, ties to even, and leaves it in the last byte
            elements = (scaled + 12582912.0).to(gl.int32, bitcast=True).to(gl.int8)
        else:
            elements = scaled.to(gl.float8e4nv)
        memory.query.index(INDEX * CHUNKS + chunk).store(elements)
        finite = token_max.to(gl.int32, bitcast=True) < 0x7F800000
        memory.rows.index(INDEX * CHUNKS + chunk).store(gl.where(finite, scale, float("nan")))
    fence_async_shared()
    sync_threads()
    row_values = reinterpret(memory.rows, gl.float32, [2 * CONSUMERS, CONSUMER_M], memory.rows.type.layout)
    offset = gl.full([CONSUMER_M], 0.0, gl.float32, HIGH_ROWS)
    if OFFSET:
        offset = row_values.index(CONSUMERS + INDEX).load(HIGH_ROWS)
    return row_values.index(INDEX).load(ROWS), offset


@gluon.jit
def _accumulate(p, correction, value_smem, accumulator, FP8: gl.constexpr):
    """`accumulator` [M, D] times the correction, plus PV of one block."""
    OUT: gl.constexpr = accumulator.type.layout
    operand = probability_operand(p, FP8, gl.DotOperandLayout(0, OUT, 4 if FP8 else 2))
    v = _value_tile(value_smem, FP8, p.shape[1], accumulator.shape[1])
    v = v.reshape((v.shape[2], v.shape[3]))
    if FP8:
        # The tensor core adds FP8 products in about 14 bits, so each block is added up for itself: over
        # 8,192 tokens one accumulator was 1.8e-2 off, and the more tokens the more.
        zeros = gl.full(accumulator.shape, 0.0, gl.float32, OUT)
        product = warpgroup_mma(operand, v.permute((1, 0)), zeros, use_acc=False)  # stored transposed
        return rescaled(accumulator, correction) + product
    else:
        return warpgroup_mma(operand, v, rescaled(accumulator, correction))


@gluon.jit
def _consumer(
    INDEX: gl.constexpr, memory, query_desc, query, out, mean, tile_scale, scale_log2e, ranges, setting
):  # fmt: skip
    """64 queries of each tile's 192."""
    M: gl.constexpr = CONSUMER_M
    D: gl.constexpr = setting.D
    FP8: gl.constexpr = setting.FP8_PV
    # E4M3 holds 448; probabilities times 2^8 use its range (`reference.FP8_PROBABILITY_SCALE`)
    SHIFT: gl.constexpr = 8 if FP8 else 0
    OFFSET: gl.constexpr = setting.SMOOTH and setting.HIGH_RAW
    LOW: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LOW_N, 32])
    HIGH_K: gl.constexpr = 16 if setting.HIGH_RAW else 32
    HIGH: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HIGH_N, HIGH_K])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32 if FP8 else 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, LOW)
    HIGH_ROWS: gl.constexpr = gl.SliceLayout(1, HIGH)
    PRODUCTS: gl.constexpr = gl.int32 if setting.INT8 else gl.float32
    LOW_DTYPE: gl.constexpr = gl.int8 if setting.INT8 else gl.float8e4nv
    HIGH_DTYPE: gl.constexpr = gl.bfloat16 if setting.HIGH_RAW else LOW_DTYPE
    CHANNELS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    FLOATS: gl.constexpr = gl.pointer_type(gl.float32)
    raw_query = memory.raw_query.index(INDEX).reshape((M, D))
    low_queries = reinterpret(memory.query, LOW_DTYPE, [CONSUMERS, M, D], gl.NVMMASharedLayout(D, 8, 2))
    low_operand = low_queries.index(INDEX)
    arguments = memory.arguments
    step = 0
    for round in range(_get(arguments, TILES, gl.int32)):
        query_length = _get(arguments, QUERY_LENGTH, gl.int32)
        key_length = _get(arguments, KEY_LENGTH, gl.int32)
        work = tile_work(
            tile_of(round), _get(arguments, BATCHES, gl.int32), _get(arguments, BLOCKS_M, gl.int32),
            ranges, query_length, key_length, setting,
        )  # fmt: skip
        first_row = work.row + INDEX * M
        first_position = work.position + INDEX * M
        if setting.HIGH_RAW:
            bar = memory.query_full.index(INDEX)
            mbarrier.expect(bar, query_desc.block_type.nbytes)
            tma_load(query_desc, [work.batch, work.head, first_row, 0], bar, memory.raw_query.index(INDEX))
        query_n = _get(arguments, QUERY_N, gl.int64) * LOAD
        queries = query + first_row * query_n
        queries += work.batch * (_get(arguments, QUERY_B, gl.int64) * LOAD)
        queries += work.head * (_get(arguments, QUERY_H, gl.int64) * LOAD)
        # read here, long before the end, where they are needed
        channel = work.head_row * D + gl.arange(0, D, CHANNELS)
        if FP8:
            memory.channels.index(INDEX).store(gl.load(_get(arguments, VALUE_SCALE, FLOATS) + channel))
        if setting.SMOOTH_VALUE:
            memory.channels.index(CONSUMERS + INDEX).store(
                gl.load(_get(arguments, VALUE_MEAN, FLOATS) + channel)
            )
        low_factor, offset = _low_query(
            queries, query_n, -first_row, query_length - first_row, mean + work.head_row * D, scale_log2e,
            memory, INDEX, OFFSET, ROWS, HIGH_ROWS, setting,
        )  # fmt: skip
        if setting.HIGH_RAW:
            mbarrier.wait(memory.query_full.index(INDEX), round & 1)

        my_start, my_stop = diagonal_keys(first_position, setting)
        limit = visible_keys(first_row, first_position, M, query_length, work.count, setting)

        # High tiles first: they hold most rows' largest scores, so the running maximum settles early.
        row_max = gl.full([M], float("-inf"), gl.float32, HIGH_ROWS)
        row_sum = gl.full([M], 0.0, gl.float32, HIGH_ROWS)
        accumulator = gl.full([M, D], 0.0, gl.float32, OUT)
        visible = gl.full([M], 0, gl.int32, HIGH_ROWS) + work.count  # keys that each row sees
        if setting.CAUSAL:
            visible = gl.minimum(visible, first_position + 1 + gl.arange(0, M, HIGH_ROWS))
        if setting.HIGH_RAW:
            factor = gl.full([M], 1.0, gl.float32, HIGH_ROWS) * scale_log2e
        else:
            factor = gl.convert_layout(low_factor, HIGH_ROWS)
        for block in range(work.high_blocks):
            first = first_key(block, work.high_a, 0, work.diagonal_start, HIGH_N)
            stage = step % STAGES
            mbarrier.wait(memory.full.index(stage), (step // STAGES) & 1)
            if (first < limit) & ((first < setting.SINK) | ((first >= my_start) & (first < my_stop))):
                k = _stage_tile(memory.key.index(stage), HIGH_DTYPE, HIGH_N, D).reshape((HIGH_N, D))
                if setting.HIGH_RAW:
                    start = gl.full([M, HIGH_N], 0.0, gl.float32, HIGH)
                    scores = warpgroup_mma(raw_query, k.permute((1, 0)), start, use_acc=False)
                else:
                    start = gl.full([M, HIGH_N], 0, PRODUCTS, HIGH)
                    products = warpgroup_mma(low_operand, k.permute((1, 0)), start, use_acc=False)
                    scales = memory.key_scale.index(stage).reshape((LOW_N,)).slice(0, HIGH_N)
                    scores = products.to(gl.float32) * scales.load(gl.SliceLayout(0, HIGH))[None, :]
                visible_to_all = gl.minimum(work.count, first_position + 1) if setting.CAUSAL else work.count
                if first + HIGH_N > visible_to_all:
                    scores = cut_scores(scores, visible - first)
                p, correction, row_max, sums = softmax_step(
                    scores, scores, factor, offset, row_max, SHIFT, OFFSET, True
                )
                row_sum = row_sum * correction + gl.convert_layout(gl.sum(sums, 1), HIGH_ROWS)
                accumulator = _accumulate(p, correction, memory.value.index(stage), accumulator, FP8)
            mbarrier.arrive(memory.empty.index(stage), count=1)
            step += 1

        # Low tiles, each with at least one key, which every row sees. A thread keeps the sums of the columns
        # that it holds to itself; those of the high tiles join the first column.
        row_max = gl.convert_layout(row_max, ROWS)
        sums = joined_by_thread(gl.full([M, LOW_N], 0.0, gl.float32, LOW), False)
        first_column = gl.arange(0, sums.shape[1], gl.SliceLayout(0, sums.type.layout)) == 0
        row_sum = gl.convert_layout(row_sum, gl.SliceLayout(1, sums.type.layout))
        sums = gl.where(first_column[None, :], row_sum[:, None], sums)
        start = gl.full([M, LOW_N], 0, PRODUCTS, LOW)
        no_offset = gl.full([M], 0.0, gl.float32, ROWS)
        low_stop = gl.minimum(my_start, limit)
        head_scales = tile_scale + work.head_row * ((key_length + LOW_N - 1) // LOW_N)
        for block in range(work.low_blocks):
            first = first_key(block, work.low_a, setting.SINK, work.low_resume, LOW_N)
            stage = step % STAGES
            mbarrier.wait(memory.full.index(stage), (step // STAGES) & 1)
            mine = first < low_stop
            if not setting.CAUSAL:
                mine |= (first >= my_stop) & (first < limit)
            if mine:
                k = _stage_tile(memory.key.index(stage), LOW_DTYPE, LOW_N, D).reshape((LOW_N, D))
                products = warpgroup_mma(low_operand, k.permute((1, 0)), start, use_acc=False)
                scores = products.to(gl.float32)
                if setting.TILE_SCALE:  # one number: it joins the rows' factors
                    block_factor = low_factor * gl.load(head_scales + first // LOW_N)
                else:
                    block_factor = low_factor
                    key_scale = memory.key_scale.index(stage).reshape((LOW_N,)).load(gl.SliceLayout(0, LOW))
                    scores = scores * key_scale[None, :]
                if setting.MASK_LOW:  # noqa: SIM102 - one condition is the compiler's, the other the GPU's
                    if first + LOW_N > work.count:
                        scores = cut_scores(scores, gl.full([M], 0, gl.int32, ROWS) + (work.count - first))
                ordered = products if setting.INT8 and setting.TILE_SCALE and not setting.MASK_LOW else scores
                p, correction, row_max, more = softmax_step(
                    scores, ordered, block_factor, no_offset, row_max, SHIFT, False, False
                )
                sums = rescaled(sums, correction) + more
                accumulator = _accumulate(p, correction, memory.value.index(stage), accumulator, FP8)
            mbarrier.arrive(memory.empty.index(stage), count=1)
            step += 1

        # a row that saw no key is zeros, as in SDPA; NaN sums stay NaN
        row_sum = gl.convert_layout(gl.sum(sums, 1), ROWS)
        accumulator = rescaled(accumulator, 1.0 / gl.where(row_sum == 0.0, 1.0, row_sum))
        if FP8:
            channel_scale = memory.channels.index(INDEX).load(gl.SliceLayout(0, OUT))
            accumulator = accumulator * channel_scale[None, :]
        if setting.SMOOTH_VALUE:
            channel_mean = memory.channels.index(CONSUMERS + INDEX).load(gl.SliceLayout(0, OUT))
            empty_row = gl.convert_layout(row_sum == 0.0, gl.SliceLayout(1, OUT))
            accumulator = gl.where(empty_row[:, None], 0.0, accumulator + channel_mean[None, :])
        # Through the query's own shared memory, which is free now, rows become contiguous. They are not
        # stored by the copy engine: a store that starts at a negative row is an illegal instruction.
        raw_query.store(accumulator.to(raw_query.dtype))
        sync_threads()
        TILE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
        row = first_row + gl.arange(0, M, gl.SliceLayout(1, TILE))
        query_length = _get(arguments, QUERY_LENGTH, gl.int32)
        row_out = (work.batch.to(gl.int64) * query_length + row) * setting.HEADS + work.head
        pointers = out + row_out[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, TILE))[None, :]
        real = (row >= 0) & (row < query_length)
        gl.store(pointers, raw_query.load(TILE), mask=gl.broadcast(real[:, None], pointers)[0])
        # the copy engine writes there next
        fence_async_shared()
        sync_threads()


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
@gluon.jit(do_not_specialize=["batches", "blocks_m", "query_length", "key_length"])
def _hopper_kernel(
    query_desc, low_key_desc, high_key_desc, scale_desc, low_value_desc, high_value_desc,
    query, out, mean, value_scale, value_mean, tile_scale, ranges,
    batches, blocks_m, query_length, key_length, scale_log2e, query_b, query_h, query_n,
    HEADS: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr, SMOOTH: gl.constexpr,
    INT8: gl.constexpr, HIGH_RAW: gl.constexpr, MASK_LOW: gl.constexpr, TILE_SCALE: gl.constexpr,
    FP8_PV: gl.constexpr, SMOOTH_VALUE: gl.constexpr,
    RANGES: gl.constexpr, PRECISION_TILE: gl.constexpr, DIAGONAL: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    setting = Setting(  # type: ignore[call-arg]  # see `record`
        HEADS, GROUP, D, CAUSAL, SMOOTH, INT8, HIGH_RAW, MASK_LOW, TILE_SCALE, FP8_PV, SMOOTH_VALUE, RANGES,
        PRECISION_TILE, DIAGONAL, SINK,
    )  # fmt: skip
    CHUNKS: gl.constexpr = BLOCK_M // CHUNK
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    query_layout: gl.constexpr = gl.NVMMASharedLayout(D, 8, 2)
    raw_query = _tiles(query_desc, CONSUMERS)
    low_query = gl.allocate_shared_memory(low_key_desc.dtype, [CHUNKS, CHUNK, D], query_layout)
    rows = gl.allocate_shared_memory(gl.float32, [2 * CHUNKS, CHUNK], PLAIN)
    channels = gl.allocate_shared_memory(gl.float32, [2 * CONSUMERS, D], PLAIN)
    key = _tiles(low_key_desc, STAGES)
    key_scale = key  # not read
    if not TILE_SCALE:
        key_scale = _tiles(scale_desc, STAGES)
    value = _tiles(low_value_desc, STAGES)
    arguments = gl.allocate_shared_memory(gl.int64, [ARGUMENTS, 1], PLAIN)
    _put(arguments, TILES, tile_count(HEADS * batches * blocks_m))
    _put(arguments, BATCHES, batches)
    _put(arguments, BLOCKS_M, blocks_m)
    _put(arguments, QUERY_LENGTH, query_length)
    _put(arguments, KEY_LENGTH, key_length)
    # in whole loads, so that the compiler sees that rows start at one
    _put(arguments, QUERY_B, query_b // LOAD)
    _put(arguments, QUERY_H, query_h // LOAD)
    _put(arguments, QUERY_N, query_n // LOAD)
    _put(arguments, VALUE_SCALE, value_scale)
    _put(arguments, VALUE_MEAN, value_mean)
    query_full = _barriers(CONSUMERS, 1)
    full, empty = _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS)
    memory = _Memory(  # type: ignore[call-arg]  # see `record`
        raw_query, low_query, rows, channels, key, key_scale, value, arguments, query_full, full, empty
    )
    fence_async_shared()

    # The arguments are spelt out: a tuple in a variable would lose what is known at compile time.
    gl.warp_specialize(
        [
            (_consumer, (
                0, memory, query_desc, query, out, mean, tile_scale, scale_log2e, ranges, setting
            )),
            (_consumer, (
                1, memory, query_desc, query, out, mean, tile_scale, scale_log2e, ranges, setting
            )),
            (_consumer, (
                2, memory, query_desc, query, out, mean, tile_scale, scale_log2e, ranges, setting
            )),
            (_producer, (
                low_key_desc, high_key_desc, scale_desc, low_value_desc, high_value_desc, memory,
                batches, blocks_m, ranges, query_length, key_length, setting,
            )),
        ],
        [4, 4, 1],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
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
        used: the portable kernel's repair does them.
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
    scales = low.scale.flatten(0, 1)
    tile_scale = FORMATS[low.format].key_tokens > 1
    low_n, high_n, block_m, consumer_m = LOW_N.value, HIGH_N.value, BLOCK_M.value, CONSUMER_M.value
    # without padding, a causal low tile lies wholly in the past: only these cases cut one
    mask_low = key_ranges is not None or (not causal and key_length % low_n != 0)
    if isinstance(value, QuantizedValue):
        values, value_scale, value_mean = value.elements, value.scale, value.mean
        value_blocks = [1, 1, dim, low_n], [1, 1, dim, high_n]
    else:
        values, value_scale, value_mean = value, None, None
        value_blocks = [1, 1, low_n, dim], [1, 1, high_n, dim]
    low_key = _descriptor(low.elements, [1, 1, low_n, dim])
    if key_ranges is None:
        rows = (key_length - query_length) % consumer_m + query_length
    else:  # where a row's first block starts is known on the device only
        rows = consumer_m - 1 + query_length
    blocks_m = triton.cdiv(rows, block_m)
    launches.launch(
        _hopper_kernel, (min(multiprocessors(query.device), heads * batch * blocks_m),),
        _descriptor(query, [1, 1, consumer_m, dim]),
        low_key, _descriptor(key if high.elements is None else high.elements, [1, 1, high_n, dim]),
        # the copy engine brings in the scales of single keys; a partition takes no None: any descriptor or
        # tensor stands for what is not read
        low_key if tile_scale else _descriptor(scales, [1, low_n]),
        _descriptor(values, value_blocks[0]), _descriptor(values, value_blocks[1]),
        query, out,
        scales if quantized.mean is None else quantized.mean,
        scales if value_scale is None else value_scale, scales if value_mean is None else value_mean,
        scales, scales if key_ranges is None else key_ranges,
        batch, blocks_m, query_length, key_length, scale * LOG2_E, *query.stride()[:3],
        HEADS=heads, GROUP=heads // kv_heads, D=dim, CAUSAL=causal, SMOOTH=quantized.mean is not None,
        INT8=low.kind == "int8", HIGH_RAW=high.elements is None, MASK_LOW=mask_low, TILE_SCALE=tile_scale,
        FP8_PV=value_scale is not None, SMOOTH_VALUE=value_mean is not None, RANGES=key_ranges is not None,
        PRECISION_TILE=config.tile, DIAGONAL=diagonal, SINK=sink,
        num_warps=4,
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
