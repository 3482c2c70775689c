from __future__ import annotations

import math

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

LOG2_E = math.log2(math.e)
# names that changed between Triton 3.6 and 3.9
_sync_threads = getattr(gl, "barrier", None) or gl.thread_barrier
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _exp2(x):
    """2^x, denormals flushed: one instruction where the general function needs four."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _pack(p, FP8: gl.constexpr):
    """`p` (float32) rounded to E4M3 or bfloat16, int32 of the same shape.

    Every fourth (second) column holds the register of that column and the next three (one); the others
    are constants and cost nothing. Carried through a loop as 8-bit elements, each would get a register
    of its own, and as many instructions to take registers apart and put them together again.
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
        )
    else:
        packed = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $3, $2;", "=r,=r,f,f", [p], dtype=gl.int32, is_pure=True, pack=2,
        )
    columns = gl.arange(0, p.shape[1], gl.SliceLayout(0, p.type.layout))
    return gl.where((columns % COUNT == 0)[None, :], packed, 0)


@gluon.jit
def _unpack(packed, FP8: gl.constexpr):
    """What `_pack` made, as the operand of a product."""
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
    """Keep a product's left operand in its registers up to here: wgmma reads them until it is waited for.

    `warpgroup_mma_wait` does the same, but not for 8-bit elements.
    """
    if FP8:
        gl.inline_asm_elementwise(
            "", "=r,r,r,r,r", [packed], dtype=gl.float8e4nv, is_pure=False, pack=4
        )
    else:
        gl.inline_asm_elementwise(
            "", "=r,r,r", [packed], dtype=gl.bfloat16, is_pure=False, pack=2
        )


@gluon.jit
def _ranges(block_m, query_length, key_length, first_token, count, BLOCK_M: gl.constexpr,
            CAUSAL: gl.constexpr, TILE: gl.constexpr, DIAGONAL: gl.constexpr, SINK: gl.constexpr):
    query_offset = key_length - query_length - first_token
    position0 = (query_offset & -BLOCK_M) + block_m * BLOCK_M
    limit = gl.minimum(count, position0 + BLOCK_M) if CAUSAL else count
    tile0 = position0 & -TILE
    diagonal_start = limit
    diagonal_stop = limit
    low_resume = limit
    if DIAGONAL > 0:
        diagonal_start = gl.minimum(gl.maximum(tile0 + TILE - DIAGONAL, SINK), limit)
        if not CAUSAL:
            diagonal_stop = gl.minimum(tile0 + DIAGONAL, limit)
            low_resume = gl.maximum(diagonal_stop, gl.minimum(SINK, limit))
    sink_stop = gl.minimum(SINK, limit)
    return query_offset, position0, limit, sink_stop, diagonal_start, diagonal_stop, low_resume


@gluon.jit
def _blocks(start, stop, BLOCK: gl.constexpr):
    return gl.maximum(stop - start + BLOCK - 1, 0) // BLOCK


@gluon.jit
def _first(block, blocks_a, start_a, start_b, BLOCK: gl.constexpr):
    return gl.where(block < blocks_a, start_a + block * BLOCK, start_b + (block - blocks_a) * BLOCK)


@gluon.jit
def _load_block(
    key_desc, value_desc, scale_desc, key_smem, value_smem, scale_smem, key_full, value_full, key_empty,
    value_empty, block, batch, kv_head, head_row, key_row, value_row,
    KEY_RAW: gl.constexpr, VALUE_RAW: gl.constexpr, STAGES: gl.constexpr,
):
    stage = block % STAGES
    phase = (block // STAGES) & 1
    bar = key_full.index(stage)
    mbarrier.wait(key_empty.index(stage), phase ^ 1)
    if KEY_RAW:
        mbarrier.expect(bar, key_desc.block_type.nbytes)
        _tma_load(key_desc, [batch, kv_head, key_row, 0], bar, key_smem.index(stage))
    else:
        mbarrier.expect(bar, key_desc.block_type.nbytes + scale_desc.block_type.nbytes)
        _tma_load(key_desc, [batch, kv_head, key_row, 0], bar, key_smem.index(stage))
        _tma_load(scale_desc, [head_row, key_row], bar, scale_smem.index(stage))
    bar = value_full.index(stage)
    mbarrier.wait(value_empty.index(stage), phase ^ 1)
    mbarrier.expect(bar, value_desc.block_type.nbytes)
    if VALUE_RAW:
        _tma_load(value_desc, [batch, kv_head, value_row, 0], bar, value_smem.index(stage))
    else:
        _tma_load(value_desc, [batch, kv_head, 0, value_row], bar, value_smem.index(stage))


@gluon.jit
def _producer(
    query_desc, low_key_desc, low_scale_desc, low_value_desc, high_key_desc, high_scale_desc, high_value_desc,
    q_smem, low_key, low_scale, low_value, high_key, high_scale, high_value,
    q_full, low_key_full, low_value_full, low_key_empty, low_value_empty,
    high_key_full, high_value_full, high_key_empty, high_value_empty,
    batch, head, kv_head, head_row, row0, first_token,
    low_a, low_start_a, low_blocks, low_start_b, high_a, high_start_a, high_blocks, high_start_b,
    VALUE_RAW: gl.constexpr, HIGH_RAW: gl.constexpr,
    LOW_N: gl.constexpr, HIGH_N: gl.constexpr, STAGES: gl.constexpr, HIGH_STAGES: gl.constexpr,
):
    for wg in gl.static_range(2):
        mbarrier.expect(q_full.index(wg), query_desc.block_type.nbytes)
        _tma_load(
            query_desc, [batch, head, row0 + wg * 64, 0], q_full.index(wg), q_smem.index(wg)
        )
    value_token = first_token if VALUE_RAW else 0
    high_token = first_token if HIGH_RAW else 0
    for block in range(high_blocks):
        first = _first(block, high_a, high_start_a, high_start_b, HIGH_N)
        _load_block(
            high_key_desc, high_value_desc, high_scale_desc, high_key, high_value, high_scale,
            high_key_full, high_value_full, high_key_empty, high_value_empty,
            block, batch, kv_head, head_row, high_token + first, value_token + first,
            HIGH_RAW, VALUE_RAW, HIGH_STAGES,
        )
    for block in range(low_blocks):
        first = _first(block, low_a, low_start_a, low_start_b, LOW_N)
        _load_block(
            low_key_desc, low_value_desc, low_scale_desc, low_key, low_value, low_scale,
            low_key_full, low_value_full, low_key_empty, low_value_empty,
            block, batch, kv_head, head_row, first, value_token + first,
            False, VALUE_RAW, STAGES,
        )


@gluon.jit
def _probability_operand(p, FP8: gl.constexpr, LAYOUT: gl.constexpr):
    """Probabilities [64, N] as the left operand of the second product, in registers."""
    M: gl.constexpr = p.shape[0]
    N: gl.constexpr = p.shape[1]
    if FP8:
        p = gl.reshape(p, (M, N // 16, 2, 4, 2))
        p = gl.permute(p, (0, 1, 3, 2, 4))
        p = gl.reshape(p, (M, N))
    return _pack(gl.convert_layout(p, LAYOUT, assert_trivial=True), FP8)


@gluon.jit
def _value_tile(value_smem, DIM: gl.constexpr, N: gl.constexpr, VALUE_RAW: gl.constexpr):
    if VALUE_RAW:
        return value_smem.reshape((N, DIM))
    else:
        return value_smem.reshape((DIM, N)).permute((1, 0))


@gluon.jit
def _softmax(scores, factor, offset, row_max, row_sum, SHIFT: gl.constexpr, OFFSET: gl.constexpr, MASKED: gl.constexpr):
    block_max = gl.max(scores, 1) * factor
    if OFFSET:
        block_max -= offset
    new_max = gl.maximum(row_max, gl.ceil(block_max))
    shift = new_max
    if MASKED:
        shift = gl.where(new_max == float("-inf"), 0.0, new_max)
    correction = _exp2(row_max - shift)
    if OFFSET:
        shift += offset
    shift -= SHIFT
    p = _exp2(scores * factor[:, None] - shift[:, None])
    row_sum = row_sum * correction + gl.sum(p, 1)
    return p, correction, new_max, row_sum


@gluon.jit
def _consumer(
    WG: gl.constexpr,
    q_smem, q8_smem, out_desc, mean, value_scale, scale_log2e,
    low_key, low_scale, low_value, high_key, high_scale, high_value,
    q_full, low_key_full, low_value_full, low_key_empty, low_value_empty,
    high_key_full, high_value_full, high_key_empty, high_value_empty,
    active, batch, head, head_row, row0, position0, count,
    low_a, low_start_a, low_blocks, low_start_b, high_a, high_start_a, high_blocks, high_start_b,
    D: gl.constexpr, DV: gl.constexpr, CAUSAL: gl.constexpr, SMOOTH: gl.constexpr, INT8: gl.constexpr,
    HIGH_RAW: gl.constexpr, VALUE_RAW: gl.constexpr, MASK_LOW: gl.constexpr,
    LOW_N: gl.constexpr, HIGH_N: gl.constexpr, STAGES: gl.constexpr, HIGH_STAGES: gl.constexpr,
    EXACT_SUMS: gl.constexpr,
):
    M: gl.constexpr = 64
    FP8_PV: gl.constexpr = not VALUE_RAW
    SHIFT: gl.constexpr = 8.0 if FP8_PV else 0.0
    K_RAW: gl.constexpr = 16
    K_LOW: gl.constexpr = 32
    K_PV: gl.constexpr = 32 if FP8_PV else 16
    LOW: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LOW_N, K_LOW])
    HIGH: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HIGH_N, K_RAW if HIGH_RAW else K_LOW])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, K_PV])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 4 if FP8_PV else 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, LOW)
    HIGH_ROWS: gl.constexpr = gl.SliceLayout(1, HIGH)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    # threads along a row: 8 lanes of 16 bytes (128 bytes), 4 rows a warp
    QUERY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    QUERY_ROWS: gl.constexpr = gl.SliceLayout(1, QUERY)
    QUERY_COLUMNS: gl.constexpr = gl.SliceLayout(0, QUERY)
    ACC: gl.constexpr = gl.int32 if INT8 else gl.float32
    LOW_MAX: gl.constexpr = 127.0 if INT8 else 448.0
    raw_dtype: gl.constexpr = q_smem.dtype

    # the low query: quantised here, once
    q_raw = q_smem.index(WG).reshape((M, D))
    q8 = q8_smem.index(WG)
    mbarrier.wait(q_full.index(WG), 0)
    x = q_raw.load(QUERY).to(gl.float32)
    offset = gl.full([M], 0.0, gl.float32, QUERY_ROWS)
    if SMOOTH and HIGH_RAW:
        m = gl.load(mean + head_row * D + gl.arange(0, D, QUERY_COLUMNS))
        offset = gl.sum(x * m[None, :], 1) * scale_log2e
    x = x * scale_log2e
    token_max = gl.max(gl.abs(x), 1)
    token_scale = gl.maximum(gl.div_rn(token_max, gl.full([M], LOW_MAX, gl.float32, QUERY_ROWS)), 2.0**-126)
    inverse = gl.div_rn(gl.full([M], 1.0, gl.float32, QUERY_ROWS), token_scale)
    divisor = token_scale[:, None]
    guess = x * inverse[:, None]
    remainder = gl.fma(-guess, gl.broadcast(divisor, guess)[0], x)
    scaled = gl.fma(remainder, gl.broadcast(inverse[:, None], guess)[0], guess)
    if INT8:
        # adding and taking away 1.5 * 2^23 rounds to a whole number, ties to even
        elements = (scaled + 12582912.0) - 12582912.0
        q8.store(elements.to(gl.int8))
    else:
        q8.store(scaled.to(gl.float8e4nv))
    fence_async_shared()
    _sync_threads()
    offset = gl.convert_layout(offset, HIGH_ROWS)
    low_factor = gl.convert_layout(token_scale, ROWS)

    row_max = gl.full([M], float("-inf"), gl.float32, HIGH_ROWS)
    row_sum = gl.full([M], 0.0, gl.float32, HIGH_ROWS)
    out = gl.full([M, DV], 0.0, gl.float32, OUT)
    position = position0 + WG * M

    if HIGH_RAW:
        factor = gl.full([M], 1.0, gl.float32, HIGH_ROWS) * scale_log2e
    else:
        factor = gl.convert_layout(low_factor, HIGH_ROWS)
    rows = position + gl.arange(0, M, HIGH_ROWS)
    for block in range(high_blocks):
        first = _first(block, high_a, high_start_a, high_start_b, HIGH_N)
        stage = block % HIGH_STAGES
        phase = (block // HIGH_STAGES) & 1
        mbarrier.wait(high_key_full.index(stage), phase)
        k = high_key.index(stage).reshape((HIGH_N, D)).permute((1, 0))
        if HIGH_RAW:
            zeros = gl.full([M, HIGH_N], 0.0, gl.float32, HIGH)
            token = warpgroup_mma(q_raw, k, zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[token])
        else:
            zeros = gl.full([M, HIGH_N], 0, ACC, HIGH)
            token = warpgroup_mma(q8, k, zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[token]).to(gl.float32)
            s = high_scale.index(stage).reshape((HIGH_N,)).load(gl.SliceLayout(0, HIGH))
            scores = scores * s[None, :]
        mbarrier.arrive(high_key_empty.index(stage), count=1)
        columns = first + gl.arange(0, HIGH_N, gl.SliceLayout(0, HIGH))
        visible = (columns < count)[None, :]
        if CAUSAL:
            visible = visible & (columns[None, :] <= rows[:, None])
        scores = gl.where(visible, scores, float("-inf"))
        p, correction, row_max, row_sum = _softmax(
            scores, factor, offset, row_max, row_sum, SHIFT, SMOOTH and HIGH_RAW, True
        )
        p = _probability_operand(p, FP8_PV, P)
        mbarrier.wait(high_value_full.index(stage), phase)
        v = _value_tile(high_value.index(stage), DV, HIGH_N, VALUE_RAW)
        out = out * gl.convert_layout(correction, OUT_ROWS)[:, None]
        token = warpgroup_mma(_unpack(p, FP8_PV), v, out, is_async=True)
        out = warpgroup_mma_wait(0, deps=[token])
        _keep(p, FP8_PV)
        mbarrier.arrive(high_value_empty.index(stage), count=1)

    row_max = gl.convert_layout(row_max, ROWS)
    row_sum = gl.convert_layout(row_sum, ROWS)
    zeros = gl.full([M, LOW_N], 0, ACC, LOW)
    none = gl.full([M], 0.0, gl.float32, ROWS)
    if low_blocks > 0:
        mbarrier.wait(low_key_full.index(0), 0)
        k = low_key.index(0).reshape((LOW_N, D)).permute((1, 0))
        token = warpgroup_mma(q8, k, zeros, use_acc=False, is_async=True)
        products = warpgroup_mma_wait(0, deps=[token])
        s = low_scale.index(0).reshape((LOW_N,)).load(gl.SliceLayout(0, LOW))
        mbarrier.arrive(low_key_empty.index(0), count=1)
        scores = products.to(gl.float32) * s[None, :]
        if MASK_LOW:
            first = _first(0, low_a, low_start_a, low_start_b, LOW_N)
            columns = first + gl.arange(0, LOW_N, gl.SliceLayout(0, LOW))
            scores = gl.where((columns < count)[None, :], scores, float("-inf"))
        p, correction, row_max, row_sum = _softmax(scores, low_factor, none, row_max, row_sum, SHIFT, False, MASK_LOW)
        operand = _probability_operand(p, FP8_PV, P)
        if not EXACT_SUMS:
            out = out * gl.convert_layout(correction, OUT_ROWS)[:, None]
        mbarrier.wait(low_key_full.index(1 % STAGES), 1 // STAGES, pred=low_blocks > 1)
        for block in range(1, low_blocks):
            stage = block % STAGES
            phase = (block // STAGES) & 1
            last_stage = (block - 1) % STAGES
            last_phase = ((block - 1) // STAGES) & 1
            k = low_key.index(stage).reshape((LOW_N, D)).permute((1, 0))
            score_token = warpgroup_mma(q8, k, zeros, use_acc=False, is_async=True)
            mbarrier.wait(low_value_full.index(last_stage), last_phase)
            v = _value_tile(low_value.index(last_stage), DV, LOW_N, VALUE_RAW)
            if EXACT_SUMS:
                out_token = warpgroup_mma(
                    _unpack(operand, FP8_PV), v, gl.full([M, DV], 0.0, gl.float32, OUT), use_acc=False, is_async=True
                )
            else:
                out_token = warpgroup_mma(_unpack(operand, FP8_PV), v, out, is_async=True)
            products = warpgroup_mma_wait(1, deps=[score_token])
            s = low_scale.index(stage).reshape((LOW_N,)).load(gl.SliceLayout(0, LOW))
            mbarrier.arrive(low_key_empty.index(stage), count=1)
            scores = products.to(gl.float32) * s[None, :]
            if MASK_LOW:
                first = _first(block, low_a, low_start_a, low_start_b, LOW_N)
                columns = first + gl.arange(0, LOW_N, gl.SliceLayout(0, LOW))
                scores = gl.where((columns < count)[None, :], scores, float("-inf"))
            last_correction = correction
            p, correction, row_max, row_sum = _softmax(
                scores, low_factor, none, row_max, row_sum, SHIFT, False, MASK_LOW
            )
            # Waiting for the next keys here keeps the assembler from waiting for the second product
            # before the softmax: it does not move instructions over the branch.
            mbarrier.wait(
                low_key_full.index((block + 1) % STAGES), ((block + 1) // STAGES) & 1,
                pred=block + 1 < low_blocks,
            )
            product = warpgroup_mma_wait(0, deps=[out_token])
            _keep(operand, FP8_PV)
            mbarrier.arrive(low_value_empty.index(last_stage), count=1)
            if EXACT_SUMS:
                out = out * gl.convert_layout(last_correction, OUT_ROWS)[:, None] + product
            else:
                out = product * gl.convert_layout(correction, OUT_ROWS)[:, None]
            # Not before the wait: registers that a product will read, written while another one runs,
            # make the assembler serialise all of them (C7513).
            operand = _probability_operand(p, FP8_PV, P)
        last_stage = (low_blocks - 1) % STAGES
        last_phase = ((low_blocks - 1) // STAGES) & 1
        mbarrier.wait(low_value_full.index(last_stage), last_phase)
        v = _value_tile(low_value.index(last_stage), DV, LOW_N, VALUE_RAW)
        if EXACT_SUMS:
            out_token = warpgroup_mma(
                _unpack(operand, FP8_PV), v, gl.full([M, DV], 0.0, gl.float32, OUT), use_acc=False, is_async=True
            )
            product = warpgroup_mma_wait(0, deps=[out_token])
            _keep(operand, FP8_PV)
            out = out * gl.convert_layout(correction, OUT_ROWS)[:, None] + product
        else:
            out_token = warpgroup_mma(_unpack(operand, FP8_PV), v, out, is_async=True)
            out = warpgroup_mma_wait(0, deps=[out_token])
            _keep(operand, FP8_PV)

    if active:
        total = gl.convert_layout(row_sum, OUT_ROWS)
        out = out * (1.0 / gl.where(total == 0.0, 1.0, total))[:, None]
        if FP8_PV:
            channel_scale = gl.load(value_scale + head_row * DV + gl.arange(0, DV, gl.SliceLayout(0, OUT)))
            out = out * channel_scale[None, :]
        # the query's own shared memory is free now
        tile = q_smem.index(WG)
        tile.reshape((M, DV)).store(out.to(raw_dtype))
        fence_async_shared()
        _sync_threads()
        _tma_store(out_desc, [batch, head, row0 + WG * M, 0], tile)
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["query_length", "key_length"])
def _hopper_kernel(
    query_desc, low_key_desc, low_scale_desc, low_value_desc, high_key_desc, high_scale_desc, high_value_desc,
    out_desc, mean, value_scale, bad_keys, ranges, query_length, key_length, scale_log2e,
    GROUP: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, CAUSAL: gl.constexpr, SMOOTH: gl.constexpr,
    INT8: gl.constexpr, HIGH_RAW: gl.constexpr, VALUE_RAW: gl.constexpr, MASK_LOW: gl.constexpr,
    TILE: gl.constexpr, DIAGONAL: gl.constexpr, SINK: gl.constexpr,
    LOW_N: gl.constexpr, HIGH_N: gl.constexpr, STAGES: gl.constexpr, HIGH_STAGES: gl.constexpr,
    EXACT_SUMS: gl.constexpr, REGISTERS: gl.constexpr,
):
    BLOCK_M: gl.constexpr = 128
    head, batch = gl.program_id(0), gl.program_id(1)
    block_m = gl.num_programs(2) - 1 - gl.program_id(2)
    kv_head = head // GROUP
    head_row = batch * (gl.num_programs(0) // GROUP) + kv_head
    first_token = 0
    count = key_length
    if ranges is not None:
        first_token = gl.load(ranges + batch * 2)
        count = gl.load(ranges + batch * 2 + 1) - first_token
    query_offset, position0, limit, sink_stop, diagonal_start, diagonal_stop, low_resume = _ranges(
        block_m, query_length, key_length, first_token, count, BLOCK_M, CAUSAL, TILE, DIAGONAL, SINK
    )
    row0 = position0 - query_offset
    active = (row0 < query_length) & (row0 + BLOCK_M > 0)
    if bad_keys is not None:
        active = active & (gl.load(bad_keys + head_row) == 0)
    some = gl.where(active, 1, 0)
    high_a = _blocks(0, sink_stop, HIGH_N) * some
    high_blocks = high_a + _blocks(diagonal_start, diagonal_stop, HIGH_N) * some
    low_a = _blocks(sink_stop, diagonal_start, LOW_N) * some
    low_blocks = low_a + _blocks(low_resume, limit, LOW_N) * some

    q_smem = gl.allocate_shared_memory(query_desc.dtype, [2] + query_desc.block_type.shape, query_desc.layout)
    Q8: gl.constexpr = gl.NVMMASharedLayout(D, 8, 2)
    q8_smem = gl.allocate_shared_memory(gl.int8 if INT8 else gl.float8e4nv, [2, 64, D], Q8)
    low_key = gl.allocate_shared_memory(low_key_desc.dtype, [STAGES] + low_key_desc.block_type.shape, low_key_desc.layout)
    low_scale = gl.allocate_shared_memory(gl.float32, [STAGES] + low_scale_desc.block_type.shape, low_scale_desc.layout)
    low_value = gl.allocate_shared_memory(low_value_desc.dtype, [STAGES] + low_value_desc.block_type.shape, low_value_desc.layout)
    high_key = gl.allocate_shared_memory(high_key_desc.dtype, [HIGH_STAGES] + high_key_desc.block_type.shape, high_key_desc.layout)
    high_scale = gl.allocate_shared_memory(gl.float32, [HIGH_STAGES] + high_scale_desc.block_type.shape, high_scale_desc.layout)
    high_value = gl.allocate_shared_memory(high_value_desc.dtype, [HIGH_STAGES] + high_value_desc.block_type.shape, high_value_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    low_key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    low_value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    low_key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    low_value_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    high_key_full = gl.allocate_shared_memory(gl.int64, [HIGH_STAGES, 1], mbarrier.MBarrierLayout())
    high_value_full = gl.allocate_shared_memory(gl.int64, [HIGH_STAGES, 1], mbarrier.MBarrierLayout())
    high_key_empty = gl.allocate_shared_memory(gl.int64, [HIGH_STAGES, 1], mbarrier.MBarrierLayout())
    high_value_empty = gl.allocate_shared_memory(gl.int64, [HIGH_STAGES, 1], mbarrier.MBarrierLayout())
    for wg in gl.static_range(2):
        mbarrier.init(q_full.index(wg), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(low_key_full.index(stage), count=1)
        mbarrier.init(low_value_full.index(stage), count=1)
        mbarrier.init(low_key_empty.index(stage), count=2)
        mbarrier.init(low_value_empty.index(stage), count=2)
    for stage in gl.static_range(HIGH_STAGES):
        mbarrier.init(high_key_full.index(stage), count=1)
        mbarrier.init(high_value_full.index(stage), count=1)
        mbarrier.init(high_key_empty.index(stage), count=2)
        mbarrier.init(high_value_empty.index(stage), count=2)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_consumer, (
                0,
                    q_smem, q8_smem, out_desc, mean, value_scale, scale_log2e,
                    low_key, low_scale, low_value, high_key, high_scale, high_value,
                    q_full, low_key_full, low_value_full, low_key_empty, low_value_empty,
                    high_key_full, high_value_full, high_key_empty, high_value_empty,
                    active, batch, head, head_row, row0, position0, count,
                    low_a, sink_stop, low_blocks, low_resume, high_a, 0, high_blocks, diagonal_start,
                    D, DV, CAUSAL, SMOOTH, INT8, HIGH_RAW, VALUE_RAW, MASK_LOW, LOW_N, HIGH_N, STAGES, HIGH_STAGES, EXACT_SUMS,
            )),
            (_consumer, (
                1,
                    q_smem, q8_smem, out_desc, mean, value_scale, scale_log2e,
                    low_key, low_scale, low_value, high_key, high_scale, high_value,
                    q_full, low_key_full, low_value_full, low_key_empty, low_value_empty,
                    high_key_full, high_value_full, high_key_empty, high_value_empty,
                    active, batch, head, head_row, row0, position0, count,
                    low_a, sink_stop, low_blocks, low_resume, high_a, 0, high_blocks, diagonal_start,
                    D, DV, CAUSAL, SMOOTH, INT8, HIGH_RAW, VALUE_RAW, MASK_LOW, LOW_N, HIGH_N, STAGES, HIGH_STAGES, EXACT_SUMS,
            )),
            (_producer, (
                    query_desc, low_key_desc, low_scale_desc, low_value_desc, high_key_desc, high_scale_desc, high_value_desc,
                    q_smem, low_key, low_scale, low_value, high_key, high_scale, high_value,
                    q_full, low_key_full, low_value_full, low_key_empty, low_value_empty,
                    high_key_full, high_value_full, high_key_empty, high_value_empty,
                    batch, head, kv_head, head_row, row0, first_token,
                    low_a, sink_stop, low_blocks, low_resume, high_a, 0, high_blocks, diagonal_start,
                    VALUE_RAW, HIGH_RAW, LOW_N, HIGH_N, STAGES, HIGH_STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


def _descriptor(tensor: Tensor, block_shape: list[int]) -> TensorDescriptor:
    dtype = {
        torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32,
        torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv,
    }[tensor.dtype]
    layout = gl.NVMMASharedLayout.get_default_for(block_shape, dtype)
    if tensor.dtype == torch.float32:
        layout = gl.NVMMASharedLayout(0, 32, len(block_shape))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block_shape, layout)


def attend_hopper(
    query, key, value, quantized, value_elements, value_scale, *, causal, scale, config, key_ranges=None,
    low_n=128, high_n=64, stages=3, high_stages=2, exact_sums=True, registers=240,
):
    batch, heads, query_length, head_dim = query.shape
    kv_heads, key_length, value_dim = value.shape[1:]
    low, high = quantized.low, quantized.high
    same = low is high
    diagonal, sink = (config.tile, 0) if same else (config.diagonal, config.sink)
    out = query.new_empty(batch, query_length, heads, value_dim).transpose(1, 2)
    value_raw = value_elements is None
    v = value if value_raw else value_elements
    high_key = key if high.elements is None else high.elements
    low_scale = low.scale.view(batch * kv_heads, -1)
    args = (
        _descriptor(query, [1, 1, 64, head_dim]),
        _descriptor(low.elements, [1, 1, low_n, head_dim]),
        _descriptor(low_scale, [1, low_n]),
        _descriptor(v, [1, 1, low_n, value_dim] if value_raw else [1, 1, value_dim, low_n]),
        _descriptor(high_key, [1, 1, high_n, head_dim]),
        _descriptor(low_scale, [1, high_n]),
        _descriptor(v, [1, 1, high_n, value_dim] if value_raw else [1, 1, value_dim, high_n]),
        _descriptor(out, [1, 1, 64, value_dim]),
    )
    block_m = 128
    if key_ranges is None:
        blocks_m = triton.cdiv((key_length - query_length) % block_m + query_length, block_m)
    else:
        blocks_m = triton.cdiv(query_length - 1, block_m) + 1
    _hopper_kernel[(heads, batch, blocks_m)](
        *args, quantized.mean if quantized.mean is not None else low_scale, low_scale if value_raw else value_scale,
        quantized.bad_keys, key_ranges,
        query_length, key_length, scale * LOG2_E,
        GROUP=heads // kv_heads, D=head_dim, DV=value_dim, CAUSAL=causal, SMOOTH=quantized.mean is not None,
        INT8=low.kind == "int8", HIGH_RAW=high.elements is None, VALUE_RAW=value_raw,
        MASK_LOW=not causal and key_length % low_n != 0,
        TILE=config.tile, DIAGONAL=diagonal, SINK=sink, LOW_N=low_n, HIGH_N=high_n, STAGES=stages,
        HIGH_STAGES=high_stages, EXACT_SUMS=exact_sums, REGISTERS=registers,
        num_warps=4,
    )
    return out
