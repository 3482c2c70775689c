"""`diagonal_tiled_attention`: the public function. Checks its input, then calls the backend."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .config import DMAConfig
from .masks import padding_ranges
from .policy import choose_backend
from .quantization import INPUT_DTYPES
from .reference import reference_attention
from .triton_backend import triton_attention


def diagonal_tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = True,
    scale: float | None = None,
    config: DMAConfig | None = None,
    *,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Diagonal-tiled mixed-precision attention (arXiv 2604.03950).

    Scores of tiles near the diagonal and of the sink tiles are computed from operands in
    `config.high`, all others from operands in `config.low`; softmax is float32.

    Args:
        query: [B, H, M, D], bfloat16, float16 or float32.
        key: [B, Hkv, N, D], same dtype; H is a multiple of Hkv (grouped-query attention).
        value: [B, Hkv, N, Dv], same dtype.
        causal: query i, at position i + N - M (bottom-right alignment), sees keys up to its position.
        scale: multiplies QK^T; 1 / sqrt(D) when None.
        config: formats and tiles; `DMAConfig()` when None.
        padding_mask: [B, N], non-zero where a key is a real token; padding on the left, the right or
            both. Tiles count from each row's first real token.

    Returns:
        [B, H, M, Dv] in the dtype of `query`. A query that sees no key gets zeros.
        The result has no gradient: asking for one raises an error in backward.

    Raises:
        TypeError: an argument is no tensor, has an unsupported dtype, or dtypes differ.
        ValueError: shapes or devices do not fit together.
        NotImplementedError: padding between real tokens.
    """
    config = DMAConfig() if config is None else config
    if not isinstance(config, DMAConfig):
        raise TypeError(f"config={config!r} must be a DMAConfig")
    check_inputs(query, key, value)
    key_ranges = None
    if padding_mask is not None:
        if not isinstance(padding_mask, Tensor):
            raise TypeError(f"padding_mask is a {type(padding_mask).__name__}; accepted is a tensor")
        if padding_mask.is_floating_point():
            raise TypeError(
                f"padding_mask has dtype {padding_mask.dtype}; accepted are bool and integers, non-zero for"
                " real tokens (an additive mask would be read the wrong way round)"
            )
        if padding_mask.shape != (key.shape[0], key.shape[2]):
            raise ValueError(
                f"padding_mask has shape {list(padding_mask.shape)};"
                f" accepted is [batch, key_length] = [{key.shape[0]}, {key.shape[2]}]"
            )
        key_ranges = padding_ranges(padding_mask.to(query.device))
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale={scale!r} must be a number")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale} must be finite and positive")
    return attend(query, key, value, causal=causal, scale=float(scale), config=config, key_ranges=key_ranges)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    scale: float,
    config: DMAConfig,
    key_ranges: Tensor | None,
) -> Tensor:
    """`diagonal_tiled_attention` on input that is known to be good, padding given as key ranges."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        out: Tensor = _ForwardOnly.apply(query, key, value, causal, scale, config, key_ranges)
        return out
    return _forward(query, key, value, causal, scale, config, key_ranges)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    scale: float,
    config: DMAConfig,
    key_ranges: Tensor | None,
) -> Tensor:
    backend = choose_backend(config, query.device, query.shape[-1], value.shape[-1])
    run = triton_attention if backend == "triton" else reference_attention
    return run(query, key, value, causal=causal, scale=scale, config=config, key_ranges=key_ranges)


class _ForwardOnly(torch.autograd.Function):
    """Runs without a graph, so that a forgotten `no_grad` costs nothing, and refuses backward."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        return _forward(*args)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(
            "dma attention is for inference and has no gradient;"
            ' train with model.set_attn_implementation("sdpa")'
        )


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse what no backend can compute, naming the argument, the value and what is accepted."""
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; accepted is a tensor")
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; accepted is [batch, heads, length, head_dim]"
            )
        if tensor.dtype not in INPUT_DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}; accepted are bfloat16, float16 and float32")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, query has {query.dtype}; they must agree")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}; they must agree")
    batch, heads, _, head_dim = query.shape
    kv_heads, key_length = key.shape[1:3]
    if key.shape[0] != batch or value.shape[0] != batch:
        raise ValueError(f"batch sizes differ: query {batch}, key {key.shape[0]}, value {value.shape[0]}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query has {heads} heads, key has {kv_heads}; accepted is a multiple")
    if value.shape[1:3] != key.shape[1:3]:
        raise ValueError(
            f"value has {value.shape[1]} heads and {value.shape[2]} tokens,"
            f" key has {kv_heads} and {key_length}; they must agree"
        )
    if key.shape[-1] != head_dim:
        raise ValueError(f"key has head_dim {key.shape[-1]}, query has {head_dim}; they must agree")
    if head_dim == 0 or value.shape[-1] == 0:
        raise ValueError(f"head_dim of query is {head_dim}, of value {value.shape[-1]}; at least 1 is needed")
