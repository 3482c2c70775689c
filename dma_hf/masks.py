"""Padding as key ranges: [start, stop) per batch row instead of a mask of M x N."""

from __future__ import annotations

import torch
from torch import Tensor


def padding_ranges(padding_mask: Tensor, *, check: bool = True) -> Tensor:
    """The ranges of the real tokens of a padded batch.

    Args:
        padding_mask: [B, N], bool or integer, non-zero where a token is real.
        check: look for padding inside a row, which waits for the device. Without it, such padding is
            taken for tokens.

    Returns:
        int32 [B, 2]: (start, stop) of each row's tokens; (0, 0) for a row of padding only.

    Raises:
        ValueError: `padding_mask` is not two-dimensional.
        NotImplementedError: padding inside a row, between real tokens.
    """
    if padding_mask.ndim != 2:
        raise ValueError(
            f"padding_mask has shape {list(padding_mask.shape)}; accepted is [batch, key_length]"
        )
    real = padding_mask.to(torch.bool)
    length = real.shape[1]
    counts = real.sum(dim=1)
    start = real.int().argmax(dim=1)  # the first maximum: 0 for a row without tokens
    stop = torch.where(counts > 0, length - real.flip(1).int().argmax(dim=1), 0)
    if check and bool((stop - start != counts).any()):
        raise NotImplementedError(
            "padding_mask has padding between real tokens; dma supports padding on the left, on the"
            ' right or on both sides of a row: use attn_implementation="sdpa" for this batch'
        )
    return torch.stack((start, stop), dim=1).to(torch.int32)
