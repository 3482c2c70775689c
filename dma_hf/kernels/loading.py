"""Where a sequence's tokens are, and how a block of them is read."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def token_range(ranges, batch, key_length):
    """First token and number of tokens of row `batch`."""
    if ranges is not None:
        start = tl.load(ranges + batch * 2)
        return start, tl.load(ranges + batch * 2 + 1) - start
    else:
        return 0, key_length


@triton.jit
def load_rows(
    source, stride_b, stride_h, stride_n, batch, head, row, limit,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Rows [row, row + ROWS) of one head of `source`, zeros beyond it: [ROWS, COLUMNS]."""
    if USE_TMA:
        # the copy engine computes the addresses and fills the rest with zeros: no registers, no masks
        return tl.reshape(source.load([batch, head, row, 0]), (ROWS, COLUMNS))
    else:
        rows = row + tl.arange(0, ROWS)
        columns = tl.arange(0, COLUMNS)
        base = source + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
        offsets = rows.to(tl.int64)[:, None] * stride_n + columns[None, :]
        return tl.load(base + offsets, mask=(rows < limit)[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def load_transposed(
    source, stride_b, stride_h, stride_d, batch, head, row,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, USE_TMA: tl.constexpr,
):  # fmt: skip
    """Rows [row, row + ROWS) of one head of `source` [B, H, DIM, rows], as [ROWS, COLUMNS].

    What lies beyond DIM is zeros; rows are padded to whole blocks.
    """
    if USE_TMA:
        tile = tl.reshape(source.load([batch, head, 0, row]), (COLUMNS, ROWS))
    else:
        columns = tl.arange(0, COLUMNS)
        base = source + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
        offsets = columns.to(tl.int64)[:, None] * stride_d + (row + tl.arange(0, ROWS))[None, :]
        tile = tl.load(base + offsets, mask=(columns < DIM)[:, None], other=0.0)
    return tl.trans(tile)
