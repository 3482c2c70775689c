"""What each row of a block of queries sees, and what is done to its scores before the softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import modifiers

LOG2_E = tl.constexpr(modifiers.LOG2_E)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def rows_and_limits(
    query_ranges, rows, real_row, positions, position0, first_token, count,
    BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The keys of each row and of the whole block, counted from `first_token`.

    query_ranges: int32 [M, 4] of this sequence (`dma_hf.masks.START`), or None.

    Returns:
        row_start, row_stop: [BLOCK_M], the keys that a row sees.
        first_seen, limit: the keys that any row sees.
        full_start, full_stop: the keys that every row sees; only with query ranges.
    """
    if query_ranges is not None:
        pointers = query_ranges + rows.to(tl.int64) * 4
        row_start = tl.load(pointers, mask=real_row, other=0) - first_token
        row_stop = tl.minimum(tl.load(pointers + 1, mask=real_row, other=0) - first_token, count)
        sees = real_row & (row_start < row_stop)
        first_seen = tl.maximum(tl.min(tl.where(sees, row_start, count), 0), 0)
        limit = tl.max(tl.where(sees, row_stop, 0), 0)
        full_start = tl.max(tl.where(real_row, row_start, 0), 0)
        full_stop = tl.min(tl.where(real_row, row_stop, count), 0)
        return row_start, row_stop, first_seen, limit, full_start, full_stop
    else:
        row_start = tl.zeros((BLOCK_M,), tl.int32)
        if CAUSAL:
            limit = tl.minimum(count, position0 + BLOCK_M)
            row_stop = tl.minimum(positions + 1, count)
        else:
            limit = count
            row_stop = row_start + count
        return row_start, row_stop, 0, limit, 0, 0


@triton.jit
def mask_pointers(
    mask, stride_b, stride_h, stride_m, batch, head, rows, real_row, MASK: tl.constexpr
):  # fmt: skip
    """Where the rows of a mask [B, H, M, N] begin, and which rows exist. MASK "none": placeholders."""
    if MASK == "none":
        return rows, real_row  # Triton 3.6 returns no None
    else:
        base = mask + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
        return base + rows.to(tl.int64) * stride_m, real_row


@triton.jit
def add_mask(scores, mask_rows, stride_n, first_token, columns, count, MASK: tl.constexpr):
    """Scores [rows, columns] under a mask: MASK "bool" (bytes, non-zero where seen) or "add"."""
    pointers, real_row = mask_rows
    offsets = (first_token + columns).to(tl.int64) * stride_n
    inside = real_row[:, None] & (columns < count)[None, :]
    if MASK == "bool":
        seen = tl.load(pointers[:, None] + offsets[None, :], mask=inside, other=0) != 0
        return tl.where(seen, scores, float("-inf"))
    else:
        values = tl.load(pointers[:, None] + offsets[None, :], mask=inside, other=float("-inf"))
        values = values.to(tl.float32)
        # see `dma_hf.modifiers.additive_mask`: only -inf hides a key
        added = tl.where(values == float("-inf"), values, tl.maximum(values * LOG2_E, LOWEST))
        return scores + added


@triton.jit
def soft_cap(scores, softcap_log2e):
    """softcap * tanh(score / softcap), of scores in units of log2."""
    e = tl.exp2(scores * (2.0 * LOG2_E / softcap_log2e))
    return softcap_log2e * (1.0 - 2.0 / (e + 1.0))
