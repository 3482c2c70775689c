"""The attention kernel: sink, low and diagonal tiles of one block of queries, with an online softmax.

One program computes BLOCK_M queries of one head. Query blocks are aligned to positions, not to the first
query, and blocks of both sides divide the precision tile: so a block of scores lies in one precision
tile, and block sizes never show in the result.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..config import DMAConfig
from ..modifiers import LOG2_E, NO_MODIFIERS, Modifiers
from ..plan import Plan
from ..reference import FP8_PROBABILITY_SCALE
from ..transforms import hadamard_size
from .encoding import hadamard, is_finite
from .interpreter import dot, multiply, narrow, to_e4m3
from .launching import Launches
from .loading import load_rows, load_transposed, token_range
from .mask_tiles import visited_tiles
from .nonfinite import spoiled_rows
from .operands import TILE as SCALE_TILE
from .operands import (
    element_of,
    multiplicand,
    padded_columns,
    quantize_rows,
    scale_bytes,
    scale_count,
    scale_granularity,
    scale_of,
    shares_scale,
    stored_width,
)
from .quantize import KeyOperand, QuantizedKey
from .quantize_value import QuantizedValue
from .visibility import add_mask, mask_pointers, rows_and_limits, soft_cap

PROBABILITY_SCALE = tl.constexpr(FP8_PROBABILITY_SCALE)
# Triton 3.6 fails to compile a `tl.dot_scaled` for sm_100 that starts from constant zeros
NEEDS_START = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9))


@triton.jit
def _load_block_scales(
    block_scales, first_row, FORMAT: tl.constexpr, COUNT: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Block scales of BLOCK_N rows from `first_row` on, [BLOCK_N, COUNT], as `tl.dot_scaled` takes them."""
    GROUPS: tl.constexpr = (COUNT + 3) // 4
    if USE_TMA:
        # The stored layout is the one that Blackwell's tensor memory holds. Loaded by the copy engine and
        # turned by exactly these steps, scales go from shared to tensor memory in the hardware's scale
        # copy (tcgen05.cp); any other spelling goes through registers.
        packed = block_scales.load([(first_row // TILE).to(tl.int32), 0, 0, 0])
        packed = tl.reshape(packed, (1, GROUPS, 32, 4, 4))
        return tl.reshape(tl.permute(packed, (0, 3, 2, 1, 4)), (TILE, COUNT))
    else:
        r = (first_row % TILE + tl.arange(0, BLOCK_N))[:, None]
        c = tl.arange(0, COUNT)[None, :]
        within = (c // 4) * 512 + (r % 32) * 16 + (r // 32) * 4 + c % 4
        scales = tl.load(block_scales + (first_row // TILE) * (GROUPS * 512) + within)
        return _as_scale_type(scales, FORMAT)


@triton.jit
def _as_scale_type(scales, FORMAT: tl.constexpr):
    """uint8 bytes as the type that tells `tl.dot_scaled` their meaning."""
    if FORMAT == "nvfp4":
        return scales.to(tl.float8e4nv, bitcast=True)
    else:
        return scales


@triton.jit
def _query_operand(
    query, mean, scale_log2e, scratch, scratch_offsets, scratch_mask, raw_dtype: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FORMAT: tl.constexpr, KIND: tl.constexpr, CEIL: tl.constexpr,
    SMOOTH: tl.constexpr, ABSOLUTE: tl.constexpr, LOG2_ROTATION: tl.constexpr,
    ROTATION_NORM: tl.constexpr, VIA_MEMORY: tl.constexpr,
):  # fmt: skip
    """The query operand of one precision from `query` [ROWS, COLUMNS] float32.

    Returns:
        The operand, its block scales (KIND "scaled"; else a placeholder), the factor [ROWS] and the
        offset [ROWS] that turn products into scores: score = product * factor - offset.
    """
    offset = tl.zeros((ROWS,), tl.float32)
    block_scales = offset
    if KIND == "raw":
        factor = tl.zeros((ROWS,), tl.float32) + scale_log2e
        operand = query.to(raw_dtype)  # exact: it was loaded from that type
        if SMOOTH and not ABSOLUTE:
            # the other precision multiplies K - mean: give these tiles the same shift, which costs one
            # number a row, instead of rounding K - mean to 16 bits
            offset = tl.sum(query * mean[None, :], 1) * scale_log2e
    else:
        # rounded before the rotation adds: fused with its additions, queries of 40 channels in 4 bits were
        # 8e-3 off the reference
        x = multiply(query, tl.zeros_like(query) + scale_log2e)
        if SMOOTH and ABSOLUTE:
            offset = -tl.sum(x * mean[None, :], 1)  # puts back what smoothing took away
        if LOG2_ROTATION > 0:
            x = hadamard(x, ROWS, COLUMNS, LOG2_ROTATION, ROTATION_NORM)
        scaled, code, scale, token_scale = quantize_rows(x, ROWS, COLUMNS, FORMAT, CEIL)
        operand, factor = multiplicand(
            scaled, code, scale, token_scale, None, ROWS, COLUMNS, FORMAT, KIND, False
        )
        if KIND == "scaled":
            block_scales = _as_scale_type(scale_bytes(code, scale, FORMAT), FORMAT)
        elif VIA_MEMORY:
            operand = _through_memory(operand, scratch, scratch_offsets, scratch_mask, COLUMNS)
    return operand, block_scales, factor, offset


@triton.jit
def _through_memory(tile, scratch, row_offsets, mask, COLUMNS: tl.constexpr):
    """`tile` [rows, COLUMNS], stored to this program's own rows of `scratch` and loaded again.

    Triton hands Hopper's wgmma an operand that was computed in registers as registers, read anew from
    shared memory at every step, which makes the assembler serialise all wgmma of the loop; an operand
    that comes from a load stays in shared memory. The rows stay in L2, and are read once.
    """
    base = scratch.to(tl.pointer_type(tile.dtype), bitcast=True)
    step = scratch.dtype.element_ty.primitive_bitwidth // tile.dtype.primitive_bitwidth
    pointers = base + row_offsets[:, None] * step + tl.arange(0, COLUMNS)[None, :]
    tl.debug_barrier()  # the loads of what the rows held before are done
    tl.store(pointers, tile, mask=mask)
    tl.debug_barrier()
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _products(
    query, query_scales, key, key_scales, start, FORMAT: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """query [BLOCK_M, D] times key [BLOCK_N, D] transposed, float32 [BLOCK_M, BLOCK_N].

    `start` (zeros, or None) is what a "scaled" product is added to.
    """
    if KIND == "scaled":
        return tl.dot_scaled(
            query, query_scales, element_of(FORMAT), tl.trans(key), key_scales, element_of(FORMAT), start
        )
    elif KIND == "int8":
        return tl.dot(query, tl.trans(key), out_dtype=tl.int32).to(tl.float32)
    else:
        # Hopper adds FP8 products in about 14 bits. Per-token FP8 at head_dim 256 was 2.2e-3 off the
        # reference for it, at 128 0.7e-3 to 1.4e-3; MXFP4's products have two bits each and lose nothing.
        one_scale: tl.constexpr = KIND == "e4m3" and scale_of(FORMAT) == "float32"
        return dot(query, tl.trans(key), SPLIT_SUMS=128 if one_scale and key.shape[1] > 128 else None)


@triton.jit
def _walk(
    accumulator, row_max, row_sum,  # the online softmax's state
    query, query_scales, factor, offset, rows_seen, mask_rows, mask_n, tiles, softcap,
    key, key_block_scales, key_scale, value, raw_key,
    key_strides, value_strides, batch, kv_head, key_row0, scale_row0, first_token, count,
    start_a, stop_a, start_b, stop_b,
    FORMAT: tl.constexpr, KIND: tl.constexpr, KEY_WIDTH: tl.constexpr, KEY_COLUMNS: tl.constexpr,
    SCALE_COUNT: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr, SEEN: tl.constexpr, OFFSET: tl.constexpr, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, SCALE_TILE: tl.constexpr, KEY_TMA: tl.constexpr, SCALE_TMA: tl.constexpr,
    VALUE_TMA: tl.constexpr, FP8_VALUE: tl.constexpr, STAGES: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [start_a, stop_a) and [start_b, stop_b), all of one precision.

    With `tiles`, over the blocks of keys that are listed there instead.
    """
    row_start, row_stop, full_start, full_stop = rows_seen
    blocks_a = tl.cdiv(tl.maximum(stop_a - start_a, 0), BLOCK_N)
    blocks_b = tl.cdiv(tl.maximum(stop_b - start_b, 0), BLOCK_N)
    if tiles is not None:
        blocks_a = tl.load(tiles)
        blocks_b = 0
    GRANULARITY: tl.constexpr = scale_granularity(FORMAT, KIND) if KIND != "raw" else "none"
    # two ranges in one loop: one copy of the code, and no pipeline drained between them
    for block in tl.range(0, blocks_a + blocks_b, num_stages=STAGES):
        if tiles is not None:
            first = tl.load(tiles + 1 + block) * BLOCK_N
        else:
            first = tl.where(
                block < blocks_a, start_a + block * BLOCK_N, start_b + (block - blocks_a) * BLOCK_N
            )
        k = load_rows(
            key, key_strides[0], key_strides[1], key_strides[2], batch, kv_head, key_row0 + first,
            key_row0 + count, KEY_WIDTH, KEY_COLUMNS, BLOCK_N, KEY_TMA,
        )  # fmt: skip
        k_scales = None
        if KIND == "scaled":
            k_scales = _load_block_scales(
                key_block_scales, scale_row0 + first, FORMAT, SCALE_COUNT, BLOCK_N, SCALE_TILE,
                SCALE_TMA,
            )  # fmt: skip
        start = None
        if KIND == "scaled" and NEEDS_START:
            start = tl.zeros((factor.shape[0], BLOCK_N), tl.float32) + 0.0 * row_sum[:, None]
        scores = _products(query, query_scales, k, k_scales, start, FORMAT, KIND)

        row_factor = factor
        if GRANULARITY == "tile":
            # A power of two for the whole tile: joins the row factor, and costs nothing per element.
            # Adding 0 * row_sum (NaN only where the row is NaN already) puts the product in the layout of
            # the softmax's state; without it Triton moves the factors through shared memory every step.
            tile_scale = tl.load(key_scale + (scale_row0 + first) // SCALE_TILE)
            row_factor = (factor + 0.0 * row_sum) * tile_scale
        elif GRANULARITY == "token":
            scores = scores * tl.load(key_scale + scale_row0 + first + tl.arange(0, BLOCK_N))[None, :]
        columns = first + tl.arange(0, BLOCK_N)
        if SOFTCAP or MASK == "add":
            # what is not linear in the products, or added to them, needs them as scores
            scores = scores * row_factor[:, None]
            if OFFSET:
                scores -= offset[:, None]
            if SOFTCAP:
                scores = soft_cap(scores, softcap)
        if MASK != "none":
            scores = add_mask(scores, mask_rows, mask_n, first_token, columns, count, MASK)
        if SEEN == "all_rows":
            scores = tl.where(columns[None, :] < count, scores, float("-inf"))
        elif SEEN == "causal":
            scores = tl.where(columns[None, :] < row_stop[:, None], scores, float("-inf"))
        elif SEEN == "ranges":  # noqa: SIM102 - one condition is the compiler's, the other the GPU's
            # most tiles of a long range are seen by every row, and have nothing to compare
            if (first < full_start) | (first + BLOCK_N > full_stop):
                seen = (columns[None, :] >= row_start[:, None]) & (columns[None, :] < row_stop[:, None])
                scores = tl.where(seen, scores, float("-inf"))

        if REPAIR:
            # a key with a NaN or Inf is left out; the rows it spoils are known (see nonfinite.py)
            if KIND != "raw" and shares_scale(FORMAT):
                # it has no scale of its own to show it: its elements are zeros
                raw = load_rows(
                    raw_key[0], raw_key[1], raw_key[2], raw_key[3], batch, kv_head, first_token + first,
                    first_token + count, KEY_WIDTH, KEY_COLUMNS, BLOCK_N, False,
                )  # fmt: skip
                good = tl.min(tl.where(is_finite(raw.to(tl.float32)), 1, 0), 1) > 0
                scores = tl.where(good[None, :], scores, float("-inf"))
            scores = tl.where(scores != scores, float("-inf"), scores)

        # the factor is positive, so it commutes with the maximum and joins the subtraction as one FMA
        block_max = tl.max(scores, 1)
        if not (SOFTCAP or MASK == "add"):
            block_max = block_max * row_factor
            if OFFSET:
                block_max -= offset
        # Rounded up to a whole power of two: every correction is then exact, and the rounding of the
        # probabilities does not depend on which maximum was running (the reference does the same).
        new_max = tl.maximum(row_max, tl.ceil(block_max))
        shift = new_max
        if SEEN != "all" or MASK != "none":
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen no key yet
        correction = tl.exp2(row_max - shift)
        if SOFTCAP or MASK == "add":
            probabilities = tl.exp2(scores - shift[:, None])
        else:
            if OFFSET:
                shift += offset
            probabilities = tl.exp2(scores * row_factor[:, None] - shift[:, None])
        row_sum = row_sum * correction + tl.sum(probabilities, 1)
        accumulator = accumulator * correction[:, None]
        if FP8_VALUE:
            v = load_transposed(
                value, value_strides[0], value_strides[1], value_strides[2], batch, kv_head, first,
                VALUE_DIM, VALUE_COLUMNS, BLOCK_N, VALUE_TMA,
            )  # fmt: skip
            # added to the accumulator in float32: the tensor core's 14 bits were 1.8e-2 off at 8k tokens
            accumulator = dot(to_e4m3(probabilities * PROBABILITY_SCALE), v, accumulator, SPLIT_SUMS=BLOCK_N)
        else:
            v = load_rows(
                value, value_strides[0], value_strides[1], value_strides[2], batch, kv_head,
                first_token + first, first_token + count, VALUE_DIM, VALUE_COLUMNS, BLOCK_N, VALUE_TMA,
            )  # fmt: skip
            accumulator = dot(narrow(probabilities, v.dtype), v, accumulator)
        row_max = new_max
    return accumulator, row_max, row_sum


# lengths, and what follows from them, vary from call to call: a kernel for each divisibility, or for length
# 1, would be compiled in vain
@triton.jit(
    do_not_specialize=[
        "query_length", "key_length", "mask_b", "mask_h", "tiles_b", "tiles_h", "low_tiles_m", "high_tiles_m",
    ]
)  # fmt: skip
def _attention_kernel(
    query, low_value, high_value, out, scratch, key_ranges, query_ranges, mask, low_tiles, high_tiles, sinks,
    value_scale, value_mean, mean, bad_keys, key,
    low_key, low_block_scales, low_scale, high_key, high_block_scales, high_scale,
    query_length, key_length, scale_log2e, softcap, key_rows, mask_b, mask_h, mask_m, mask_n,
    tiles_b, tiles_h, low_tiles_m, high_tiles_m,
    query_b, query_h, query_n, value_b, value_h, value_n, out_b, out_h, out_n,
    scratch_b, scratch_h, scratch_n, key_b, key_h, key_n, low_b, low_h, low_n, high_b, high_h, high_n,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, LOW_FORMAT: tl.constexpr, LOW_KIND: tl.constexpr,
    HIGH_FORMAT: tl.constexpr, HIGH_KIND: tl.constexpr, CEIL: tl.constexpr, SMOOTH: tl.constexpr,
    LOG2_ROTATION: tl.constexpr, ROTATION_NORM: tl.constexpr, PRECISION_TILE: tl.constexpr,
    DIAGONAL: tl.constexpr, SINK: tl.constexpr, SEEN_LOW: tl.constexpr, SEEN_HIGH: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, SCALE_TILE: tl.constexpr,
    LOW_TMA: tl.constexpr, HIGH_TMA: tl.constexpr, VALUE_TMA: tl.constexpr,
    LOW_SCALE_TMA: tl.constexpr, HIGH_SCALE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, HIGH_STAGES: tl.constexpr,
    HIGH_BLOCK_N: tl.constexpr, VIA_MEMORY: tl.constexpr, REPAIR: tl.constexpr,
):  # fmt: skip
    # heads vary fastest and query blocks run from the last to the first: the longest rows of all heads
    # start together, and the short ones fill the gaps at the end
    head, batch = tl.program_id(0), tl.program_id(1)
    block_m = tl.num_programs(2) - 1 - tl.program_id(2)
    kv_head = head // GROUP
    kv_heads = tl.num_programs(0) // GROUP
    if bad_keys is not None:
        has_bad_keys = tl.load(bad_keys + batch * kv_heads + kv_head) > 0
        if has_bad_keys != REPAIR:
            return
    first_token, count = token_range(key_ranges, batch, key_length)

    # positions count from the row's first real token; & -BLOCK_M rounds down, negatives too
    query_offset = key_length - query_length - first_token
    if query_ranges is not None:
        query_ranges += batch.to(tl.int64) * query_length * 4
        query_offset = tl.load(query_ranges + 3) - first_token
    position0 = (query_offset & -BLOCK_M) + block_m * BLOCK_M
    positions = position0 + tl.arange(0, BLOCK_M)
    rows = positions - query_offset
    if (position0 - query_offset >= query_length) | (position0 - query_offset + BLOCK_M <= 0):
        return
    real_row = (rows >= 0) & (rows < query_length)

    columns = tl.arange(0, COLUMNS)
    query_base = query + batch.to(tl.int64) * query_b + head.to(tl.int64) * query_h
    query_pointers = query_base + rows.to(tl.int64)[:, None] * query_n + columns[None, :]
    query_mask = real_row[:, None] & (columns < HEAD_DIM)[None, :]
    scratch_base = scratch + batch.to(tl.int64) * scratch_b + head.to(tl.int64) * scratch_h
    scratch_offsets = rows.to(tl.int64) * scratch_n
    raw_dtype: tl.constexpr = query.dtype.element_ty
    channel_mean = tl.zeros((COLUMNS,), tl.float32)
    if SMOOTH:
        mean_base = mean + (batch * kv_heads + kv_head) * HEAD_DIM
        channel_mean = tl.load(mean_base + columns, mask=columns < HEAD_DIM, other=0.0)

    # the regions of this block's row of precision tiles, in tokens (design: sink, then low, then diagonal)
    tile0 = position0 & -PRECISION_TILE
    row_start, row_stop, first_seen, limit, full_start, full_stop = rows_and_limits(
        query_ranges, rows, real_row, positions, position0, first_token, count, BLOCK_M, CAUSAL
    )
    rows_seen = (row_start, row_stop, full_start, full_stop)
    sink_start = 0
    if query_ranges is not None:
        # the sink is where the sequence of the tile's first query begins
        tile_row = tl.minimum(tl.maximum(tile0 - query_offset, 0), query_length - 1)
        sequence = tl.load(query_ranges + tile_row.to(tl.int64) * 4 + 2) - first_token
        sink_start = tl.maximum(sequence, 0) & -PRECISION_TILE
    sink_stop = sink_start + SINK
    diagonal_start = limit
    diagonal_stop = limit
    low_resume = limit
    if DIAGONAL > 0:
        diagonal_start = tl.maximum(tile0 + PRECISION_TILE - DIAGONAL, sink_stop)
        if query_ranges is not None or not CAUSAL:
            diagonal_stop = tl.minimum(tile0 + DIAGONAL, limit)
            low_resume = tl.maximum(diagonal_stop, sink_stop)
    # blocks before the first key that any row sees are not visited
    high_first = first_seen & -HIGH_BLOCK_N
    low_first = first_seen & -BLOCK_N
    mask_rows = mask_pointers(mask, mask_b, mask_h, mask_m, batch, head, rows, real_row, MASK)
    if low_tiles is not None:
        row_of_tiles = batch.to(tl.int64) * tiles_b + head.to(tl.int64) * tiles_h
        low_tiles += (row_of_tiles + block_m) * low_tiles_m
        high_tiles += (row_of_tiles + block_m) * high_tiles_m

    accumulator = tl.zeros((BLOCK_M, VALUE_COLUMNS), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    ABSOLUTE: tl.constexpr = SOFTCAP or sinks is not None
    if sinks is not None:
        # a score that no value belongs to: the state of a softmax that has seen it already
        sink_score = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        row_max = tl.zeros_like(row_sum) + tl.ceil(sink_score)
        row_sum += tl.exp2(sink_score - tl.ceil(sink_score))
    value_strides = (value_b, value_h, value_n)
    raw_key = (key, key_b, key_h, key_n)
    scale_row0 = (batch * kv_heads + kv_head).to(tl.int64) * key_rows

    # High tiles first: the sink and the diagonal hold most rows' largest scores, so the running maximum
    # settles early. The query is loaded (from L2) and quantised once for each precision, so that only
    # one operand is alive in a loop.
    q = tl.load(query_pointers, mask=query_mask, other=0.0).to(tl.float32)
    operand, operand_scales, factor, offset = _query_operand(
        q, channel_mean, scale_log2e, scratch_base, scratch_offsets, query_mask, raw_dtype,
        BLOCK_M, COLUMNS, HIGH_FORMAT, HIGH_KIND, CEIL, SMOOTH, ABSOLUTE, LOG2_ROTATION, ROTATION_NORM,
        VIA_MEMORY,
    )  # fmt: skip
    accumulator, row_max, row_sum = _walk(
        accumulator, row_max, row_sum, operand, operand_scales, factor, offset, rows_seen, mask_rows, mask_n,
        high_tiles, softcap, high_key, high_block_scales, high_scale, high_value, raw_key,
        (high_b, high_h, high_n), value_strides,
        batch, kv_head, first_token if HIGH_KIND == "raw" else 0, scale_row0, first_token, count,
        tl.maximum(sink_start, high_first), tl.minimum(sink_stop, limit),
        tl.maximum(diagonal_start, high_first), diagonal_stop,
        HIGH_FORMAT, HIGH_KIND, stored_width(HIGH_FORMAT, HIGH_KIND, HEAD_DIM),
        stored_width(HIGH_FORMAT, HIGH_KIND, COLUMNS),
        scale_count(HIGH_FORMAT, HIGH_KIND, COLUMNS), VALUE_DIM, VALUE_COLUMNS,
        HIGH_BLOCK_N, SEEN_HIGH, SMOOTH and (HIGH_KIND == "raw") != ABSOLUTE, MASK, SOFTCAP, SCALE_TILE,
        HIGH_TMA, HIGH_SCALE_TMA, VALUE_TMA, value_scale is not None, HIGH_STAGES, REPAIR,
    )  # fmt: skip

    q = tl.load(query_pointers, mask=query_mask, other=0.0).to(tl.float32)
    operand, operand_scales, factor, offset = _query_operand(
        q, channel_mean, scale_log2e, scratch_base, scratch_offsets, query_mask, raw_dtype,
        BLOCK_M, COLUMNS, LOW_FORMAT, LOW_KIND, CEIL, SMOOTH, ABSOLUTE, LOG2_ROTATION, ROTATION_NORM,
        VIA_MEMORY,
    )  # fmt: skip
    accumulator, row_max, row_sum = _walk(
        accumulator, row_max, row_sum, operand, operand_scales, factor, offset, rows_seen, mask_rows, mask_n,
        low_tiles, softcap, low_key, low_block_scales, low_scale, low_value, raw_key,
        (low_b, low_h, low_n), value_strides,
        batch, kv_head, first_token if LOW_KIND == "raw" else 0, scale_row0, first_token, count,
        tl.maximum(sink_stop, low_first), tl.minimum(diagonal_start, limit),
        tl.maximum(low_resume, low_first), limit,
        LOW_FORMAT, LOW_KIND, stored_width(LOW_FORMAT, LOW_KIND, HEAD_DIM),
        stored_width(LOW_FORMAT, LOW_KIND, COLUMNS),
        scale_count(LOW_FORMAT, LOW_KIND, COLUMNS), VALUE_DIM, VALUE_COLUMNS,
        BLOCK_N, SEEN_LOW, SMOOTH and (LOW_KIND == "raw") != ABSOLUTE, MASK, SOFTCAP, SCALE_TILE,
        LOW_TMA, LOW_SCALE_TMA, VALUE_TMA, value_scale is not None, STAGES, REPAIR,
    )  # fmt: skip

    # a row that saw no key is zeros, as in SDPA; NaN sums stay NaN
    result = accumulator / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    if REPAIR:
        q = tl.load(query_pointers, mask=query_mask, other=0.0)
        spoiled = spoiled_rows(
            q, row_start, row_stop, mask_rows, mask_n, key, key_b, key_h, key_n, batch, kv_head, first_token,
            count, limit, HEAD_DIM, COLUMNS, MASK,
        )  # fmt: skip
        result = tl.where(spoiled[:, None], float("nan"), result)
    value_columns = tl.arange(0, VALUE_COLUMNS)
    if value_scale is not None:
        channel = value_scale + (batch * kv_heads + kv_head) * VALUE_DIM + value_columns
        scale = tl.load(channel, mask=value_columns < VALUE_DIM, other=0.0) * (1.0 / PROBABILITY_SCALE)
        result = result * scale[None, :]
        if value_mean is not None:
            channel = value_mean + (batch * kv_heads + kv_head) * VALUE_DIM + value_columns
            average = tl.load(channel, mask=value_columns < VALUE_DIM, other=0.0)
            result = tl.where((row_sum == 0.0)[:, None], 0.0, result + average[None, :])
    out_base = out + batch.to(tl.int64) * out_b + head.to(tl.int64) * out_h
    out_pointers = out_base + rows.to(tl.int64)[:, None] * out_n + value_columns[None, :]
    out_mask = real_row[:, None] & (value_columns < VALUE_DIM)[None, :]
    tl.store(out_pointers, narrow(result, out.dtype.element_ty), mask=out_mask)


def attend_quantized(
    query: Tensor,
    key: Tensor,
    value: Tensor | QuantizedValue,
    quantized: QuantizedKey,
    *,
    causal: bool,
    scale: float,
    config: DMAConfig,
    plan: Plan,
    modifiers: Modifiers = NO_MODIFIERS,
    key_ranges: Tensor | None = None,
    repair: Tensor | None = None,
    launches: Launches | None = None,
) -> Tensor:
    """Attention of `query` [B, H, M, D] to a quantised K and to `value` [B, Hkv, N, Dv], quantised or not.

    Args:
        key: the K that was quantised; read where an operand is "raw".
        quantized: what `quantize_key` made of it.
        causal, scale, config, modifiers: as in `reference_attention`.
        plan: what `plan.make_plan` decided.
        key_ranges: `masks.key_ranges_of` the query ranges, where there are any.
        repair: what another kernel computed, but for the heads in `quantized.bad_keys`: only they are
            computed, into this tensor.
        launches: where to launch.

    Returns:
        [B, H, M, Dv], stored as [B, M, H, Dv], which is how Transformers wants it next.
    """
    launches = Launches(query.device) if launches is None else launches
    blocks, use_tma, via_memory = plan.blocks, plan.use_tma, plan.via_memory
    batch, heads, query_length, head_dim = query.shape
    kv_heads, key_length = key.shape[1:3]
    value_scale, value_mean = None, None
    if isinstance(value, QuantizedValue):
        value_scale, value_mean = value.scale, value.mean
    values = value.elements if isinstance(value, QuantizedValue) else value
    value_dim = values.shape[2 if value_scale is not None else 3]
    columns = padded_columns(head_dim)
    value_columns = triton.next_power_of_2(value_dim)
    low, high = quantized.low, quantized.high
    ranges, mask = modifiers.query_ranges, modifiers.mask
    # with one format everywhere the map decides nothing but which loop masks: one diagonal tile
    same = low is high
    if same:
        config = replace(config, diagonal=config.tile, sink=0, layers=())

    out = repair
    if out is None:
        out = launches.output((batch, query_length, heads, value_dim), query.dtype).transpose(1, 2)
    # a program's own rows of the output are free until it writes them: no memory of its own is needed,
    # unless V's rows are shorter than K's
    scratch = out
    if via_memory and head_dim * 2 > value_dim * out.element_size():
        scratch = launches.empty((batch, query_length, heads, head_dim), query.dtype).transpose(1, 2)
    low_key, low_tma = _source(key if low.elements is None else low.elements, columns, blocks.n, use_tma)
    high_key, high_tma = _source(
        key if high.elements is None else high.elements, columns, blocks.high_n, use_tma
    )
    low_scales, low_scale_tma = _scale_source(low, columns, blocks.n, use_tma)
    high_scales, high_scale_tma = _scale_source(high, columns, blocks.high_n, use_tma)
    if value_scale is None:
        low_value, value_tma = _source(values, value_columns, blocks.n, use_tma)
        high_value, _ = _source(values, value_columns, blocks.high_n, use_tma)
    else:
        low_value, value_tma = _source(values, blocks.n, value_columns, use_tma)
        high_value, _ = _source(values, blocks.high_n, value_columns, use_tma)
    rotation = hadamard_size(head_dim) if config.rotate else 1
    if ranges is None:
        blocks_m = triton.cdiv((key_length - query_length) % blocks.m + query_length, blocks.m)
    else:  # where a row's first block starts is known on the device only
        blocks_m = triton.cdiv(query_length - 1, blocks.m) + 1
        ranges = ranges.contiguous()
    if ranges is not None:
        seen_low = seen_high = "ranges"
    elif causal:
        # a causal low tile lies wholly in the past, unless there is no diagonal
        seen_low, seen_high = ("causal" if config.diagonal == 0 else "all"), "causal"
    else:
        seen_low, seen_high = ("all_rows" if key_length % blocks.n else "all"), "all_rows"
    mask_kind = "none"
    tiles: tuple[Tensor | None, ...] = (None, None)
    mask_strides: tuple[int, ...] = (0,) * 4
    tile_strides: tuple[int, ...] = (0,) * 4
    if mask is not None:
        mask_kind = "bool" if mask.dtype == torch.bool else "add"
        mask_strides = tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True))
        if ranges is None:  # else the ranges say which tiles to visit, and the mask is a bias
            lists = tuple(
                visited_tiles(mask, config, causal=causal, high=is_high, block_m=blocks.m, block_n=n)
                for is_high, n in ((False, blocks.n), (True, blocks.high_n))
            )
            tiles = lists
            rows = lists[0].shape[2]
            by_batch, by_head = (rows if n > 1 else 0 for n in lists[0].shape[:2])
            tile_strides = (by_batch * lists[0].shape[1], by_head, *(t.shape[3] for t in lists))
        mask = mask.view(torch.uint8) if mask_kind == "bool" else mask
    softcap = 0.0 if modifiers.softcap is None else modifiers.softcap * LOG2_E
    first_operand = low.elements if low.elements is not None else high.elements
    key_rows = 0 if first_operand is None else first_operand.shape[2]
    # The second launch repairs heads whose K holds a NaN or Inf; where there is none, every program of it
    # returns at once.
    attend = (False,) if repair is None else ()
    for repairs in attend if quantized.bad_keys is None else (*attend, True):
        launches.launch(
            _attention_kernel, (heads, batch, blocks_m),
            query, low_value, high_value, out, scratch, key_ranges, ranges, mask, *tiles, modifiers.sinks,
            value_scale, value_mean, quantized.mean, quantized.bad_keys, key,
            low_key, low_scales, low.scale, high_key, high_scales, high.scale,
            query_length, key_length, scale * LOG2_E, softcap, key_rows, *mask_strides, *tile_strides,
            *query.stride()[:3], *values.stride()[:3], *out.stride()[:3], *scratch.stride()[:3],
            *key.stride()[:3],
            *(key if low.elements is None else low.elements).stride()[:3],
            *(key if high.elements is None else high.elements).stride()[:3],
            GROUP=heads // kv_heads, HEAD_DIM=head_dim, COLUMNS=columns,
            VALUE_DIM=value_dim, VALUE_COLUMNS=value_columns, CAUSAL=causal,
            LOW_FORMAT=low.format, LOW_KIND=low.kind, HIGH_FORMAT=high.format, HIGH_KIND=high.kind,
            CEIL=config.scale_rule == "ceil", SMOOTH=quantized.mean is not None,
            LOG2_ROTATION=rotation.bit_length() - 1, ROTATION_NORM=1.0 / math.sqrt(rotation),
            PRECISION_TILE=config.tile, DIAGONAL=config.diagonal, SINK=config.sink,
            SEEN_LOW=seen_low, SEEN_HIGH=seen_high, MASK=mask_kind, SOFTCAP=modifiers.softcap is not None,
            SCALE_TILE=SCALE_TILE, LOW_TMA=low_tma, HIGH_TMA=high_tma, VALUE_TMA=value_tma,
            LOW_SCALE_TMA=low_scale_tma, HIGH_SCALE_TMA=high_scale_tma,
            BLOCK_M=blocks.m, BLOCK_N=blocks.n, STAGES=blocks.stages,
            HIGH_STAGES=blocks.high_stages, HIGH_BLOCK_N=blocks.high_n,
            VIA_MEMORY=via_memory, REPAIR=repairs,
            num_warps=blocks.warps,
        )  # fmt: skip
    return out


def _source(tensor: Tensor, columns: int, rows: int, use_tma: bool) -> tuple[Tensor | TensorDescriptor, bool]:
    """`tensor` [B, H, rows, width] as the kernel reads it: a TMA descriptor where its layout allows one."""
    step = 16 // tensor.element_size()  # the copy engine wants 16-byte steps
    if (
        not use_tma
        or tensor.numel() == 0
        or tensor.data_ptr() % 16
        or any(stride % step for stride in tensor.stride()[:-1])
    ):
        return tensor, False
    packed = tensor.dtype == torch.uint8
    block_shape = [1, 1, rows, columns // 2 if packed else columns]
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block_shape), True


def _scale_source(
    operand: KeyOperand, columns: int, rows: int, use_tma: bool
) -> tuple[Tensor | TensorDescriptor | None, bool]:
    """Block scales as the kernel reads them: a TMA descriptor where a step takes whole groups of them."""
    scales = operand.block_scales
    if scales is None:
        return None, False
    if not use_tma or rows != SCALE_TILE or scale_count(operand.format, operand.kind, columns) % 4:
        return scales, False
    if operand.format == "nvfp4":
        scales = scales.view(torch.float8_e4m3fn)  # the type that tells `tl.dot_scaled` their meaning
    # two rows of 256 bytes: what the copy engine loads may have no longer side
    groups = scales.shape[3]
    scales = scales.view(-1, groups, 2, 256)
    return TensorDescriptor(scales, list(scales.shape), list(scales.stride()), [1, groups, 2, 256]), True
