"""Block sizes and launch options by architecture: one table of measured configurations."""

from __future__ import annotations

from dataclasses import dataclass

from .policy import OperandKind


@dataclass(frozen=True)
class Blocks:
    """Queries (`m`) and keys (`n`) of one step of the kernel, warps and pipeline stages."""

    m: int
    n: int
    warps: int
    stages: int
    prefetch: bool = False


def choose_blocks(
    capability: int, head_dim: int, value_dim: int, element_size: int, low_kind: OperandKind, tile: int
) -> Blocks:
    """The configuration for one call.

    Args:
        capability: 90 for sm_90.
        head_dim, value_dim: D and Dv.
        element_size: bytes of an element of V.
        low_kind: operand of the low tiles, which are nearly all tiles.
        tile: side of a precision tile; both blocks divide it.
    """
    dim = max(head_dim, value_dim)
    if element_size == 4:  # float32: room in shared memory and registers decides, not speed
        blocks = Blocks(32, 32, 4, 1) if dim > 64 else Blocks(64, 32, 4, 1)
    elif capability >= 100:
        blocks = Blocks(128, 128, 8, 2) if dim <= 128 else Blocks(128, 64, 8, 2)
    elif capability >= 90:
        blocks = Blocks(128, 128, 8, 2) if dim <= 128 else Blocks(128, 64, 8, 2)
    else:
        blocks = Blocks(64, 64, 4, 2) if dim <= 128 else Blocks(64, 32, 4, 2)
    return Blocks(min(blocks.m, tile), min(blocks.n, tile), blocks.warps, blocks.stages)
