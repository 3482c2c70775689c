"""Block sizes and launch options of the portable attention kernel: one small table of measured choices.

Nothing is searched at run time. ``dma-eval kernels --tune`` measures `CANDIDATES` for every row of the table
that the GPU at hand uses, and says where another choice is faster.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from .policy import OperandKind


@dataclass(frozen=True)
class Blocks:
    """How one call of the attention kernel is cut up.

    Attributes:
        m, n: queries and keys of one step over low tiles.
        high_n: keys of one step over high tiles, which are wider in bytes.
        warps: warps of a program.
        stages: pipeline stages of the loop over low tiles.
        high_stages: pipeline stages of the loop over high tiles. At least 2 on Hopper: one loop that is
            not pipelined makes the assembler serialise the wgmma of the whole kernel.
    """

    m: int
    n: int
    high_n: int
    warps: int
    stages: int
    high_stages: int = 2


Operands = Literal["float32", "8bit_pv", "8bit", "raw", "16bit", "scaled"]
"""What decides, with architecture and head dimension, how a call is best cut up.

"float32": V as float32, and with it all. "8bit": K in FP8 or INT8; "8bit_pv": V in FP8 as well. "raw",
"16bit", "scaled": K's operand, as `policy.OperandKind` has them, with V in 16 bits.
"""

ANY: tuple[Operands, ...] = ("8bit_pv", "8bit", "raw", "16bit", "scaled")


@dataclass(frozen=True)
class Row:
    """One choice: for GPUs from `capability` on, and for head dimensions up to `head_dim`."""

    capability: int
    head_dim: int
    operands: tuple[Operands, ...]
    blocks: Blocks


TABLE = (
    # room in shared memory and registers decides, not speed
    Row(80, 64, ("float32",), Blocks(64, 32, 32, 4, 1, 1)),
    Row(80, 256, ("float32",), Blocks(32, 32, 32, 4, 1, 1)),
    # mma.sync and 99 KB of shared memory, as on Ada: larger blocks spill registers in the loop
    Row(120, 128, ANY, Blocks(64, 64, 64, 4, 2)),
    Row(120, 256, ANY, Blocks(64, 32, 32, 8, 2)),
    Row(100, 128, ANY, Blocks(128, 128, 128, 8, 2)),
    # 128 keys are what one hardware copy of block scales brings in; 16-bit keys do not fit so
    Row(100, 256, ("scaled",), Blocks(128, 128, 64, 8, 2)),
    Row(100, 256, ANY, Blocks(128, 64, 64, 8, 2)),
    # H200, causal 1 x 16k, D 128, FP8 PV: 728 TFLOP/s with FP8 K, 684 with INT8; a fourth stage lost 20 %
    Row(90, 128, ("8bit_pv",), Blocks(128, 64, 64, 4, 3)),
    # H200, causal 1 x 16k, D 128: 587 TFLOP/s; 566 with 128 x 128 and 8 warps. Two programs of 4 warps
    # share a multiprocessor, so that one's softmax runs beside the other's wgmma.
    Row(90, 128, ("8bit",), Blocks(64, 128, 64, 4, 2)),
    Row(90, 128, ("raw",), Blocks(128, 64, 64, 4, 2)),
    # 0.75 of SDPA's speed; 0.62 with 128 x 128 and 8 warps
    Row(90, 64, ("16bit",), Blocks(64, 64, 64, 4, 3)),
    # dequantised 16-bit K and V fill the shared memory with one program, so 8 warps share it
    Row(90, 128, ("16bit",), Blocks(128, 128, 64, 8, 3)),
    Row(90, 256, ANY, Blocks(128, 64, 64, 8, 2)),
    Row(80, 128, ANY, Blocks(64, 64, 64, 4, 2)),
    Row(80, 256, ANY, Blocks(64, 32, 32, 4, 2)),
)
"""The first row that fits a call serves it."""

REPAIR_BLOCKS = Blocks(128, 32, 32, 4, 1, 1)
"""For a launch that repairs what the kernel for Hopper left out, which is nearly always nothing.

Small programs, and few: with the table's choice that launch took 18.6 µs on an H200 (4 x 4k), so 5.8.
"""

HEAD_DIMS = (64, 128, 256)
"""The classes of head dimensions that the table tells apart, by the largest of each."""

CANDIDATES = (
    Blocks(64, 32, 32, 4, 2),
    Blocks(64, 64, 64, 4, 2),
    Blocks(64, 64, 64, 4, 3),
    Blocks(64, 128, 64, 4, 2),
    Blocks(128, 64, 64, 4, 2),
    Blocks(128, 64, 64, 4, 3),
    Blocks(128, 64, 64, 8, 2),
    Blocks(128, 128, 64, 8, 2),
    Blocks(128, 128, 64, 8, 3),
    Blocks(128, 128, 128, 8, 2),
)
"""What ``dma-eval kernels --tune`` compares with the table's choice."""


def operands_of(element_size: int, low_kind: OperandKind) -> Operands:
    """The column of the table for a call.

    Args:
        element_size: bytes of an element of V.
        low_kind: operand of the low tiles, which are nearly all tiles.
    """
    if element_size == 4:
        return "float32"
    if low_kind == "e4m3" or low_kind == "int8":
        return "8bit_pv" if element_size == 1 else "8bit"
    return low_kind


def table_blocks(capability: int, head_dim: int, operands: Operands) -> Blocks:
    """The table's choice for a head dimension of at most 256 on a GPU of compute capability 80 or later."""
    return next(
        row.blocks
        for row in TABLE
        if capability >= row.capability and head_dim <= row.head_dim and operands in row.operands
    )


def choose_blocks(
    capability: int,
    head_dim: int,
    value_dim: int,
    element_size: int,
    low_kind: OperandKind,
    tile: int,
    masked: bool = False,
) -> Blocks:
    """The configuration for one call.

    Args:
        capability: 90 for sm_90.
        head_dim, value_dim: D and Dv.
        element_size: bytes of an element of V.
        low_kind: operand of the low tiles, which are nearly all tiles.
        tile: side of a precision tile; every block divides it.
        masked: whether a mask is loaded tile by tile, which takes shared memory, too.
    """
    blocks = table_blocks(capability, max(head_dim, value_dim), operands_of(element_size, low_kind))
    if masked:
        blocks = replace(
            blocks, n=min(blocks.n, 64), high_n=min(blocks.high_n, 64), stages=min(blocks.stages, 2)
        )
    return replace(blocks, m=min(blocks.m, tile), n=min(blocks.n, tile), high_n=min(blocks.high_n, tile))
