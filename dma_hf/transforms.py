"""What is done to Q and K before they are quantised: key smoothing and the Hadamard rotation.

Both leave softmax(QK^T) as it is in exact arithmetic and make the operands easier to quantise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def key_mean(key: Tensor) -> Tensor:
    """Mean of `key` [..., N, D] over its tokens, per channel: float32 [..., 1, D].

    A NaN or Inf counts as zero, so that one bad token cannot spoil the others. Any vector would be a
    valid shift (every score of a row moves by the same amount), so this changes no result beyond
    rounding.
    """
    key = key.float()
    total = torch.where(key.isfinite(), key, 0.0).sum(dim=-2, keepdim=True)
    # a tensor divides; a Python number, or `mean`, multiplies by its inverse on a GPU: another last bit
    return total / torch.full((), key.shape[-2], device=key.device)


def hadamard_size(head_dim: int) -> int:
    """The largest power of two that divides `head_dim`: the size of a Hadamard block."""
    return head_dim & -head_dim


def hadamard_matrix(size: int) -> Tensor:
    """Orthonormal Hadamard matrix [size, size], float32, symmetric; `size` is a power of two."""
    return rotate(torch.eye(size))


def rotate(x: Tensor) -> Tensor:
    """Multiply the last dimension of `x` [..., D] by an orthonormal Hadamard matrix, in float32.

    A head dimension that is no power of two (80, 96, 192) is rotated in blocks of its largest
    power-of-two divisor (16, 32, 64), which is orthonormal too.
    """
    size = hadamard_size(x.shape[-1])
    x = x.float()
    stride = 1
    while stride < size:
        # a butterfly adds in a fixed order, which the kernels repeat bit for bit; a matrix product does not
        first, second = x.unflatten(-1, (-1, 2, stride)).unbind(-2)
        x = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        stride *= 2
    return x * (1.0 / math.sqrt(size))
