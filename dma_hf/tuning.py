"""Block sizes and launch options by architecture: one table of measured configurations."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    dim = max(head_dim, value_dim)
    if element_size == 4:  # float32: room in shared memory and registers decides, not speed
        blocks = Blocks(64, 32, 32, 4, 1, 1) if dim <= 64 else Blocks(32, 32, 32, 4, 1, 1)
    elif capability < 90:
        blocks = Blocks(64, 64, 64, 4, 2) if dim <= 128 else Blocks(64, 32, 32, 4, 2)
    elif capability >= 120:
        # mma.sync and 99 KB of shared memory, as on Ada: larger blocks spill registers in the loop
        blocks = Blocks(64, 64, 64, 4, 2) if dim <= 128 else Blocks(64, 32, 32, 8, 2)
    elif dim > 128:
        # 128 keys are what one hardware copy of block scales brings in; 16-bit keys do not fit so
        blocks = Blocks(128, 128, 64, 8, 2) if low_kind == "scaled" else Blocks(128, 64, 64, 8, 2)
    elif capability >= 100:
        blocks = Blocks(128, 128, 128, 8, 2)
    elif element_size == 1 and low_kind in ("e4m3", "int8"):
        # H200, causal 1 x 16k, D 128, FP8 PV: 728 TFLOP/s with FP8 K, 684 with INT8; a fourth stage lost 20 %
        blocks = Blocks(128, 64, 64, 4, 3)
    elif low_kind in ("e4m3", "int8"):
        # H200, causal 1 x 16k, D 128: 587 TFLOP/s; 566 with 128 x 128 and 8 warps. Two programs of 4
        # warps share a multiprocessor, so that one's softmax runs beside the other's wgmma.
        blocks = Blocks(64, 128, 64, 4, 2)
    elif low_kind == "raw":
        blocks = Blocks(128, 64, 64, 4, 2)
    elif dim <= 64:
        blocks = Blocks(64, 64, 64, 4, 3)  # 0.75 of SDPA's speed; 0.62 with 128 x 128 and 8 warps
    else:
        # dequantised 16-bit K and V fill the shared memory with one program, so 8 warps share it
        blocks = Blocks(128, 128, 64, 8, 3)
    if masked:
        blocks = replace(
            blocks, n=min(blocks.n, 64), high_n=min(blocks.high_n, 64), stages=min(blocks.stages, 2)
        )
    return replace(blocks, m=min(blocks.m, tile), n=min(blocks.n, tile), high_n=min(blocks.high_n, tile))
