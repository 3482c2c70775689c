"""What the quantiser must know of all tokens before it quantises one: K's mean, V's mean and scale.

Two launches for K and V together: the first reads each tensor once, in chunks; the second joins the chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .encoding import is_finite
from .launching import Launches
from .loading import load_rows, token_range
from .operands import E4M3_MAX, SMALLEST_SCALE, padded_columns

# About this many programs for each tensor of a call, so that every multiprocessor has some to overlap,
# each reading tiles of this many elements.
PROGRAMS, TILE_ELEMENTS, WARPS = 512, 8192, 4
MIN_CHUNKS, MAX_CHUNKS = 16, 128

THREADS = tl.constexpr(WARPS * 32)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _chunk_statistics(
    source, sums, largest, smallest, ranges, length, stride_b, stride_h, stride_n, batch,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, ELEMENTS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One chunk of one head's tokens: sums [B, H, CHUNKS, COLUMNS], and extremes where they are asked for."""
    ROWS: tl.constexpr = max(16, ELEMENTS // COLUMNS)
    chunk, head = tl.program_id(0), tl.program_id(1)
    start, count = token_range(ranges, batch, length)
    chunk_size = tl.cdiv(tl.cdiv(count, CHUNKS), ROWS) * ROWS
    last = tl.minimum((chunk + 1) * chunk_size, count)
    # One value for every row that the threads cover at once; what a thread holds besides is joined in its
    # registers. A value for every row of the tile would be 192 registers, and few programs to overlap.
    KEPT: tl.constexpr = max(1, min(ROWS, THREADS * 8 // COLUMNS))
    total = tl.zeros((KEPT, COLUMNS), tl.float32)
    high = tl.full((KEPT, COLUMNS), float("-inf"), tl.float32)
    low = tl.full((KEPT, COLUMNS), float("inf"), tl.float32)
    for first in tl.range(chunk * chunk_size, last, ROWS):
        x = load_rows(
            source, stride_b, stride_h, stride_n, batch, head, start + first, start + last,
            DIM, COLUMNS, ROWS, False,
        ).to(tl.float32)  # fmt: skip
        # NaN and Inf do not count, or one bad token would spoil every other
        good = is_finite(x)
        total += tl.sum(tl.reshape(tl.where(good, x, 0.0), (ROWS // KEPT, KEPT, COLUMNS)), 0)
        if largest is not None:
            good = good & ((first + tl.arange(0, ROWS)) < last)[:, None]
            highest = tl.reshape(tl.where(good, x, float("-inf")), (ROWS // KEPT, KEPT, COLUMNS))
            lowest = tl.reshape(tl.where(good, x, float("inf")), (ROWS // KEPT, KEPT, COLUMNS))
            high = tl.maximum(high, tl.max(highest, 0))
            low = tl.minimum(low, tl.min(lowest, 0))
    offsets = ((batch * tl.num_programs(1) + head) * CHUNKS + chunk) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(sums + offsets, tl.sum(total, 0))
    if largest is not None:
        tl.store(largest + offsets, tl.max(high, 0))
        tl.store(smallest + offsets, tl.min(low, 0))


@triton.jit(do_not_specialize=["length"])
def _chunks_kernel(
    key, value, key_sums, value_sums, value_largest, value_smallest, ranges, length,
    key_b, key_h, key_n, value_b, value_h, value_n,
    KEY_DIM: tl.constexpr, KEY_COLUMNS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    ELEMENTS: tl.constexpr, CHUNKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Statistics of chunks of K, of V, or (PARTS = 2) of K in even and V in odd programs."""
    batch, part = tl.program_id(2) // PARTS, tl.program_id(2) % PARTS
    if key is not None:  # noqa: SIM102 - one condition is the compiler's, the other the GPU's
        if part == 0:
            _chunk_statistics(
                key, key_sums, None, None, ranges, length, key_b, key_h, key_n, batch,
                KEY_DIM, KEY_COLUMNS, ELEMENTS, CHUNKS,
            )  # fmt: skip
    if value is not None:  # noqa: SIM102
        if part == PARTS - 1:
            _chunk_statistics(
                value, value_sums, value_largest, value_smallest, ranges, length, value_b, value_h, value_n,
                batch, VALUE_DIM, VALUE_COLUMNS, ELEMENTS, CHUNKS,
            )  # fmt: skip


@triton.jit
def _joined_chunks(chunks, index, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr):
    """All chunks of one head: [CHUNKS, COLUMNS]."""
    rows = (index * CHUNKS + tl.arange(0, CHUNKS))[:, None]
    return tl.load(chunks + rows * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit(do_not_specialize=["length"])
def _join_kernel(
    key_sums, value_sums, value_largest, value_smallest, key_mean, bad_keys, value_mean, value_scale,
    ranges, length,
    KEY_DIM: tl.constexpr, KEY_COLUMNS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Joins the chunks of one head: K's mean; V's mean and scale. Lowers the flag of bad keys."""
    head, batch, part = tl.program_id(0), tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    index = batch * tl.num_programs(0) + head
    _, count = token_range(ranges, batch, length)
    tokens = tl.maximum(count, 1).to(tl.float32)
    if bad_keys is not None:  # noqa: SIM102 - one condition is the compiler's, the other the GPU's
        if part == 0:
            tl.store(bad_keys + index, 0)
    if key_mean is not None:  # noqa: SIM102
        if part == 0:
            total = tl.sum(_joined_chunks(key_sums, index, KEY_COLUMNS, CHUNKS), 0)
            column = tl.arange(0, KEY_COLUMNS)
            mean = tl.div_rn(total, tokens)
            tl.store(key_mean + index * KEY_DIM + column, mean, mask=column < KEY_DIM)
    if value_scale is not None:  # noqa: SIM102
        if part == PARTS - 1:
            column = tl.arange(0, VALUE_COLUMNS)
            out = index * VALUE_DIM + column
            # subtraction rounds monotonically: the extremes give the largest |x - mean| to the last bit
            high = tl.max(_joined_chunks(value_largest, index, VALUE_COLUMNS, CHUNKS), 0)
            low = tl.min(_joined_chunks(value_smallest, index, VALUE_COLUMNS, CHUNKS), 0)
            if value_mean is not None:
                mean = tl.div_rn(tl.sum(_joined_chunks(value_sums, index, VALUE_COLUMNS, CHUNKS), 0), tokens)
                tl.store(value_mean + out, mean, mask=column < VALUE_DIM)
                high, low = high - mean, low - mean
            # a channel without a finite number has -inf and inf, and scale 2^-126
            magnitude = tl.minimum(tl.maximum(tl.maximum(high, -low), 0.0), LARGEST_FLOAT)
            # div_rn: Triton's "/" is an approximation, and a scale one bit off is another quantisation
            scale = tl.maximum(tl.div_rn(magnitude, E4M3_MAX), SMALLEST_SCALE)
            tl.store(value_scale + out, scale, mask=column < VALUE_DIM)


def token_statistics(
    key: Tensor | None,
    value: Tensor | None,
    key_ranges: Tensor | None,
    launches: Launches,
    *,
    key_mean: Tensor | None,
    bad_keys: Tensor | None,
    value_mean: Tensor | None,
    value_scale: Tensor | None,
) -> None:
    """Fill what of `key_mean` [B, H, D], `value_mean` and `value_scale` [B, H, Dv], float32, is not None.

    Args:
        key, value: [B, H, N, D] and [B, H, N, Dv], or None; any strides with a contiguous last dimension.
        key_ranges: int32 [B, 2] ranges of real tokens, or None.
        bad_keys: int32 [B, H], set to 0; or None.
    """
    first = key if key is not None else value
    assert first is not None
    batch, heads, length = first.shape[:3]
    key_dim = 1 if key is None else key.shape[-1]
    value_dim = 1 if value is None else value.shape[-1]
    key_columns, value_columns = padded_columns(key_dim), padded_columns(value_dim)
    wanted = triton.next_power_of_2(triton.cdiv(PROGRAMS, batch * heads))
    chunks = min(max(wanted, MIN_CHUNKS), MAX_CHUNKS)

    def of_chunks(columns: int) -> Tensor:
        return launches.empty((batch, heads, chunks, columns), torch.float32)

    read_key = key if key_mean is not None else None
    key_sums = of_chunks(key_columns) if read_key is not None else None
    value_sums, largest, smallest = (
        of_chunks(value_columns) if value is not None else None for _ in range(3)
    )
    parts = 2 if key is not None and value is not None else 1
    if read_key is not None or value is not None:
        reads = 2 if read_key is not None and value is not None else 1
        key_strides = (0, 0, 0) if read_key is None else read_key.stride()[:3]
        value_strides = (0, 0, 0) if value is None else value.stride()[:3]
        launches.launch(
            _chunks_kernel, (chunks, heads, batch * reads),
            read_key, value, key_sums, value_sums, largest, smallest, key_ranges, length,
            *key_strides, *value_strides,
            KEY_DIM=key_dim, KEY_COLUMNS=key_columns, VALUE_DIM=value_dim, VALUE_COLUMNS=value_columns,
            ELEMENTS=TILE_ELEMENTS, CHUNKS=chunks, PARTS=reads, num_warps=WARPS,
        )  # fmt: skip
    # a launch of its own: joining the chunks anew in every program of the quantiser cost it more
    launches.launch(
        _join_kernel, (heads, batch * parts),
        key_sums, value_sums, largest, smallest, key_mean, bad_keys, value_mean, value_scale,
        key_ranges, length,
        KEY_DIM=key_dim, KEY_COLUMNS=key_columns, VALUE_DIM=value_dim, VALUE_COLUMNS=value_columns,
        CHUNKS=chunks, PARTS=parts, num_warps=4,
    )  # fmt: skip
