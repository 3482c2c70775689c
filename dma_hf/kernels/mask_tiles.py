"""Which tiles of an arbitrary mask any row sees: what the attention kernel visits instead of all tiles."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..config import DMAConfig


def visited_tiles(
    mask: Tensor, config: DMAConfig, *, causal: bool, high: bool, block_m: int, block_n: int
) -> Tensor:
    """The blocks of keys of one precision that each block of queries has to visit.

    Args:
        mask: [B or 1, H or 1, M, N], bool or additive (`Modifiers.mask`).
        config: which tiles are high.
        high: list the high tiles, or else the low ones.
        block_m, block_n: queries and keys of a block. Blocks of queries are aligned to positions, with
            the last query at the last key's position.

    Returns:
        int32 [B or 1, H or 1, query blocks, 1 + key blocks]: the number of blocks, then their indices.
    """
    query_length, key_length = mask.shape[-2:]
    offset = key_length - query_length
    seen = _seen(mask, causal).to(torch.uint8)
    above = offset % block_m
    seen = pad(seen, (0, -key_length % block_n, above, -(above + query_length) % block_m))
    seen = seen.unflatten(-1, (-1, block_n)).amax(-1).unflatten(-2, (-1, block_m)).amax(-2)

    queries = torch.arange(seen.shape[-2], device=mask.device)[:, None] * block_m + (offset - above)
    keys = torch.arange(seen.shape[-1], device=mask.device)[None, :] * block_n
    distance = queries.div(config.tile, rounding_mode="floor") - keys // config.tile
    near = (distance if causal else distance.abs()) < config.diagonal_tiles
    wanted = (near | (keys < config.sink)) == high
    if causal:
        wanted &= keys < queries + block_m
    seen = seen.bool() & wanted
    count = seen.sum(-1, keepdim=True)
    indices = torch.argsort(~seen, dim=-1, stable=True)
    return torch.cat((count, indices), dim=-1).to(torch.int32)


def _seen(mask: Tensor, causal: bool) -> Tensor:
    """Where a mask lets a key have weight."""
    if mask.dtype == torch.bool:
        return mask
    # Models write the smallest float for "not seen", which is exp(...) = 0 next to any key that is seen;
    # a row without one gets the mean of all values that it may see, so their tiles count.
    possible = mask > -torch.inf
    if causal:
        possible = possible.tril(mask.shape[-1] - mask.shape[-2])
    seen = possible & (mask > torch.finfo(mask.dtype).min)
    return seen | (possible & ~seen.any(-1, keepdim=True))
