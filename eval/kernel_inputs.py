"""What the kernel benchmark runs on: shapes, random inputs, and the float32 result to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

CHECKED_QUERIES = 128
"""The last queries, which see the most keys: the rows whose error is measured."""

DTYPE = torch.bfloat16

Size = tuple[int, int]
"""(batch, length): sequences, and tokens in each."""

SERIES: tuple[Size, ...] = ((1, 1024), (4, 4096), (1, 16_384), (1, 32_768), (1, 131_072))
QUICK_SERIES: tuple[Size, ...] = ((1, 16_384), (1, 32_768))
HEAD_DIMS = (128, 64)
HEADS, KV_HEADS = 32, 8

LOCALITY_WINDOW = 64  # tokens over which neighbouring queries and keys resemble each other
SINK_TOKENS = 4


@dataclass(frozen=True)
class Shape:
    """One call of self-attention: query [batch, heads, length, head_dim], K and V with kv_heads heads."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    causal: bool = True

    @property
    def flops(self) -> int:
        """Floating-point operations of both products; causal counts half, the usual convention."""
        full = 4 * self.batch * self.heads * self.length**2 * self.head_dim
        return full // 2 if self.causal else full

    def describe(self) -> dict[str, Any]:
        """The fields, as results files hold them."""
        return asdict(self)

    def __str__(self) -> str:
        mask = "causal" if self.causal else "not causal"
        heads = f"{self.heads} / {self.kv_heads} heads"
        return f"{self.batch} × {self.length:,} tokens, {heads}, head dimension {self.head_dim}, {mask}"


def attention_shapes(
    *,
    quick: bool = False,
    sizes: Sequence[Size] | None = None,
    head_dims: Sequence[int] | None = None,
    bidirectional: bool = False,
) -> list[Shape]:
    """The shapes of the attention suite.

    A series over lengths for each head dimension, with 32 query heads and 8 KV heads, causal; then
    16k tokens without a mask, and without grouped queries.

    Args:
        quick: two shapes of one kernel: 16k and 32k tokens at head dimension 128.
        sizes: take the place of the series.
        head_dims: take the place of 128 and 64.
        bidirectional: the series without a mask.

    With any of the last three there is the series alone.
    """
    chosen = sizes or (QUICK_SERIES if quick else SERIES)
    shapes = [
        Shape(batch, HEADS, KV_HEADS, length, head_dim, causal=not bidirectional)
        for head_dim in head_dims or (HEAD_DIMS[:1] if quick else HEAD_DIMS)
        for batch, length in chosen
    ]
    if not (quick or sizes or head_dims or bidirectional):
        shapes += [Shape(1, HEADS, KV_HEADS, 16_384, 128, causal=False), Shape(1, HEADS, HEADS, 16_384, 128)]
    return shapes


@dataclass(frozen=True)
class Inputs:
    """query [B, H, N, D]; key and value [B, Hkv, N, D], contiguous, and their shape."""

    query: Tensor
    key: Tensor
    value: Tensor
    shape: Shape

    @property
    def scale(self) -> float:
        """What multiplies QK^T."""
        return 1.0 / math.sqrt(self.shape.head_dim)


def random_inputs(shape: Shape, device: torch.device, seed: int = 0) -> Inputs:
    """Normally distributed inputs, never zeros: those run faster than real data."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = [(shape.batch, heads, shape.length, shape.head_dim) for heads in _head_counts(shape)]
    query, key, value = (_normal(*size, generator=generator).to(DTYPE) for size in sizes)
    return Inputs(query, key, value, shape)


def structured_inputs(shape: Shape, device: torch.device, seed: int = 0) -> Inputs:
    """Inputs with the three traits of real attention that the tiles of DMA are about.

    * Locality: queries and keys of neighbouring tokens share a signal that fades over 64 tokens.
    * A sink: the first four keys lie along a direction that every query has a part of.
    * Offset channels: K has a constant per channel, large in a few channels, which smoothing removes.
    """
    generator = torch.Generator(device).manual_seed(seed)
    batch, length, head_dim = shape.batch, shape.length, shape.head_dim
    group = shape.heads // shape.kv_heads

    noise = _normal(batch, shape.kv_heads, length + LOCALITY_WINDOW, head_dim, generator=generator)
    sums = noise.cumsum(2, dtype=torch.float64)
    window = (sums[:, :, LOCALITY_WINDOW:] - sums[:, :, :-LOCALITY_WINDOW]) / math.sqrt(LOCALITY_WINDOW)
    signal = window.float()  # unit variance, correlation falling to 0 over the window

    sink = _normal(1, shape.kv_heads, 1, head_dim, generator=generator)
    sink = math.sqrt(head_dim) * sink / sink.norm(dim=-1, keepdim=True)  # as long as a typical key
    channels = _normal(1, shape.kv_heads, 1, head_dim, generator=generator)
    channels[..., :: head_dim // 4] *= 8

    own = _normal(batch, shape.heads, length, head_dim, generator=generator)
    query = 0.7 * (own + (signal + 0.5 * sink).repeat_interleave(group, 1))
    key = 0.7 * (signal + _normal(*signal.shape, generator=generator)) + channels
    key[:, :, :SINK_TOKENS] += 2 * sink
    value = _normal(*signal.shape, generator=generator)
    return Inputs(query.to(DTYPE), key.to(DTYPE), value.to(DTYPE), shape)


def _head_counts(shape: Shape) -> tuple[int, int, int]:
    return shape.heads, shape.kv_heads, shape.kv_heads


def _normal(*size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, device=generator.device)


def float32_attention(inputs: Inputs, queries: int = CHECKED_QUERIES) -> Tensor:
    """Attention of the last ``queries`` queries to all keys, in float32: [B, H, queries, D]."""
    shape = inputs.shape
    queries = min(queries, shape.length)
    # the queries of one KV head side by side: K is not repeated for them
    query = inputs.query[:, :, -queries:].float().unflatten(1, (shape.kv_heads, -1))
    scores = query.flatten(2, 3) @ inputs.key.float().transpose(-1, -2)
    scores = scores.mul_(inputs.scale).unflatten(2, (-1, queries))
    if shape.causal:
        position = torch.arange(shape.length, device=scores.device)
        scores.masked_fill_(position > position[-queries:, None], -math.inf)
    weights = scores.softmax(-1).flatten(2, 3)
    return (weights @ inputs.value.float()).unflatten(2, (-1, queries)).flatten(1, 2)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """‖result - expected‖ / ‖expected‖ over the last queries, which are all that ``expected`` holds."""
    difference = result[:, :, -expected.shape[2] :].float() - expected
    return (difference.norm() / expected.norm()).item()
