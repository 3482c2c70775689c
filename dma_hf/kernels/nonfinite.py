"""Which rows a NaN or Inf in K makes NaN: the rare case, kept out of the attention kernel's way.

No quantised format holds Inf. SDPA gives NaN to a row whose score with such a key is NaN or +Inf, and
ignores the key where the score is -Inf; which of the two it is depends on the signs of the unquantised
query. The quantiser flags heads that hold such keys. The attention kernel skips these heads, and its repair
variant does them again: it leaves the bad keys out of the softmax and writes NaN to the rows found here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .encoding import is_finite
from .interpreter import widen
from .loading import load_rows
from .visibility import add_mask

BLOCK = tl.constexpr(32)


@triton.jit
def spoiled_rows(
    query, row_start, row_stop, mask_rows, mask_n, key, key_b, key_h, key_n, batch, kv_head, first_token,
    count, limit, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Rows of the unquantised `query` [BLOCK_M, COLUMNS] that a NaN or Inf makes NaN: bool [BLOCK_M].

    row_start, row_stop, mask_rows, mask_n, limit: see `visibility`; key: the unquantised K;
    first_token, count: the sequence's range in it.
    """
    bad_query = tl.max(tl.where(is_finite(query.to(tl.float32)), 0, 1), 1) > 0
    spoiled = tl.zeros(row_start.shape, tl.int32)
    for first in tl.range(0, limit, BLOCK, num_stages=1):
        k = load_rows(
            key, key_b, key_h, key_n, batch, kv_head, first_token + first, first_token + count,
            HEAD_DIM, COLUMNS, BLOCK, False,
        )  # fmt: skip
        bad_key = tl.max(tl.where(is_finite(k.to(tl.float32)), 0, 1), 1) > 0
        # "ieee": splitting an Inf for tf32x3 would subtract it from itself
        scores = tl.dot(widen(query), tl.trans(widen(k)), input_precision="ieee")
        columns = first + tl.arange(0, BLOCK)
        visible = (columns[None, :] >= row_start[:, None]) & (columns[None, :] < row_stop[:, None])
        if MASK != "none":
            hidden = add_mask(tl.zeros_like(scores), mask_rows, mask_n, first_token, columns, count, MASK)
            visible = visible & (hidden > float("-inf"))
        spoils = ((scores != scores) | (scores == float("inf"))) & (bad_key[None, :] | bad_query[:, None])
        spoiled = tl.maximum(spoiled, tl.max((spoils & visible).to(tl.int32), 1))
    return spoiled > 0
