"""The work of the Hopper kernel: which tiles a program does, and which blocks of keys each tile needs."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_names import record

CONSUMERS = gl.constexpr(3)
CONSUMER_M = gl.constexpr(64)
"""Queries of a consumer: as many as one wgmma multiplies."""
BLOCK_M = gl.constexpr(192)
"""Queries of a tile, which all consumers share."""
LOW_N = gl.constexpr(128)
HIGH_N = gl.constexpr(64)
"""Keys of a step: an 8-bit block of 128 keys is as large as a 16-bit block of 64."""


@record
class Setting:
    """What a kernel is compiled for."""

    HEADS: gl.constexpr
    GROUP: gl.constexpr  # query heads of a KV head
    D: gl.constexpr
    CAUSAL: gl.constexpr
    SMOOTH: gl.constexpr  # K is stored without its mean
    INT8: gl.constexpr  # low tiles are INT8, else E4M3
    HIGH_RAW: gl.constexpr  # high tiles are the given Q and K, else as low ones
    MASK_LOW: gl.constexpr  # the last low block may be cut
    TILE_SCALE: gl.constexpr  # one scale for 128 keys, else one a key
    FP8_PV: gl.constexpr
    SMOOTH_VALUE: gl.constexpr  # V is stored without its mean
    RANGES: gl.constexpr  # there is padding
    PRECISION_TILE: gl.constexpr
    DIAGONAL: gl.constexpr
    SINK: gl.constexpr


@record
class Work:
    """Where a tile of 192 queries lies, and which blocks of keys its consumers need between them.

    These are the blocks that any consumer needs (design: sink, then low, then diagonal); each skips what is
    not its. High: `high_a` blocks from key 0, the rest of `high_blocks` from `diagonal_start`. Low: `low_a`
    blocks from key SINK, the rest of `low_blocks` from `low_resume`.
    """

    batch: gl.tensor
    head: gl.tensor
    head_row: gl.tensor  # of the KV head, among those of all sequences
    row: gl.tensor  # of the first query, in memory
    position: gl.tensor  # and in its sequence
    first_token: gl.tensor  # of the sequence
    count: gl.tensor  # its keys
    high_a: gl.tensor
    high_blocks: gl.tensor
    diagonal_start: gl.tensor
    low_a: gl.tensor
    low_blocks: gl.tensor
    low_resume: gl.tensor


@gluon.jit
def _block_count(start, stop, N: gl.constexpr):
    return gl.maximum(stop - start + N - 1, 0) // N


@gluon.jit
def first_key(block, blocks_a, start_a, start_b, N: gl.constexpr):
    """First key of a block; the first `blocks_a` blocks start at `start_a`, the others at `start_b`."""
    return gl.where(block < blocks_a, start_a + block * N, start_b + (block - blocks_a) * N)


@gluon.jit
def diagonal_keys(position, setting):
    """First key of the diagonal tiles of the query at `position`, and the one behind the last.

    Without diagonal tiles, a place that no key is at.
    """
    tile = position & -setting.PRECISION_TILE
    start, stop = 0x7FFFFF00, 0x7FFFFF00
    if setting.DIAGONAL > 0:
        start = gl.maximum(tile + setting.PRECISION_TILE - setting.DIAGONAL, setting.SINK)
        stop = gl.maximum(tile + setting.DIAGONAL, setting.SINK)
    return start, stop


@gluon.jit
def visible_keys(row, position, M: gl.constexpr, query_length, count, setting):
    """How many of a sequence's `count` keys any of M queries sees; 0 where none of these queries exists."""
    limit = gl.minimum(count, position + M) if setting.CAUSAL else count
    return gl.where((row < query_length) & (row + M > 0), limit, 0)


@gluon.jit
def tile_count(tiles):
    """How many of `tiles` this program does."""
    programs = gl.num_programs(0)
    rounds = tiles // programs
    return rounds + (tile_of(rounds) < tiles).to(gl.int32)


@gluon.jit
def tile_of(round):
    """The tile that this program does in one round; every other round goes backwards.

    Tiles are ordered by length, and so no program has the longest of every round.
    """
    programs, program = gl.num_programs(0), gl.program_id(0)
    return round * programs + gl.where(round % 2 == 0, program, programs - 1 - program)


@gluon.jit
def tile_work(tile, batches, blocks_m, ranges, query_length, key_length, setting):
    """The `Work` of one tile."""
    # heads vary fastest and query blocks run from the last to the first: the longest rows of all heads
    # start together, and the short ones fill the gaps at the end
    head = tile % setting.HEADS
    tile = tile // setting.HEADS
    batch = tile % batches
    block_m = blocks_m - 1 - tile // batches
    head_row = batch * (setting.HEADS // setting.GROUP) + head // setting.GROUP
    first_token = gl.to_tensor(0)
    count = key_length
    if setting.RANGES:
        first_token = gl.load(ranges + batch * 2)
        count = gl.load(ranges + batch * 2 + 1) - first_token

    # Positions count from the sequence's first real token; & rounds down, negatives too. A consumer's
    # queries lie in one precision tile, a program's in two at most.
    query_offset = key_length - query_length - first_token
    position = (query_offset & -CONSUMER_M) + block_m * BLOCK_M
    row = position - query_offset
    limit = visible_keys(row, position, BLOCK_M, query_length, count, setting)
    diagonal_start, low_resume = diagonal_keys(position, setting)
    low_stop, diagonal_stop = diagonal_keys(position + BLOCK_M - CONSUMER_M, setting)
    high_a = _block_count(0, gl.minimum(setting.SINK, limit), HIGH_N)
    high_blocks = high_a + _block_count(diagonal_start, gl.minimum(diagonal_stop, limit), HIGH_N)
    low_a = _block_count(setting.SINK, gl.minimum(low_stop, limit), LOW_N)
    low_blocks = low_a
    if not setting.CAUSAL:
        low_blocks += _block_count(low_resume, limit, LOW_N)
    return Work(  # type: ignore[call-arg]  # see `record`
        batch, head, head_row, row, position, first_token, count,
        high_a, high_blocks, gl.to_tensor(diagonal_start), low_a, low_blocks, gl.to_tensor(low_resume),
    )  # fmt: skip
