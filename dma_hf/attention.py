"""`diagonal_tiled_attention`: the public function. Checks its input, then calls the backend."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .config import DMAConfig
from .masks import has_holes, padding_ranges, query_ranges
from .modifiers import NO_MODIFIERS, Modifiers
from .operator import attention
from .policy import choose_backend, device_capability, runs_on_sdpa
from .presets import resolve
from .quantization import INPUT_DTYPES


def diagonal_tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool = True,
    scale: float | None = None,
    config: DMAConfig | None = None,
    *,
    padding_mask: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    sliding_window: int | None = None,
    attn_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
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
        config: formats and tiles; the preset "auto" when None.
        padding_mask: [B, N], non-zero where a key is a real token; padding on the left, the right or
            both. Tiles count from each row's first real token.
        sequence_ids: integer [B, N] for M = N, never decreasing along a row: packed sequences. Tokens
            see tokens with the same number. Tiles count from the row's first token, and the sink of a
            query tile is the tile in which the sequence of its first query begins.
        sliding_window: a query sees this many keys at most: its own and those before it; without
            `causal`, as many behind it. Keys further away are not visited.
        attn_mask: [B or 1, H or 1, M, N], bool (True: seen) or floating point (added to the scores), as
            in `torch.nn.functional.scaled_dot_product_attention`. Tiles that no row sees are not visited.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: [H], floating point: a score in each row's softmax that no value belongs to.

    Returns:
        [B, H, M, Dv] in the dtype of `query`. A query that sees no key gets zeros.
        The result has no gradient: asking for one raises an error in backward.

    Raises:
        TypeError: an argument is no tensor, has an unsupported dtype, or dtypes differ.
        ValueError: shapes or devices do not fit together.
        NotImplementedError: padding between real tokens.
    """
    config = DMAConfig.preset("auto") if config is None else config
    if not isinstance(config, DMAConfig):
        raise TypeError(f"config={config!r} must be a DMAConfig")
    check_inputs(query, key, value)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else _positive(scale, "scale")
    softcap = None if softcap is None else _positive(softcap, "softcap")
    if sliding_window is not None:
        if isinstance(sliding_window, bool) or not isinstance(sliding_window, int):
            raise TypeError(f"sliding_window={sliding_window!r} must be an int (tokens)")
        if sliding_window < 1:
            raise ValueError(f"sliding_window={sliding_window} must be at least 1 token")
    check_modifiers(query, key, attn_mask, sinks)
    ranges = None
    if not (padding_mask is None and sequence_ids is None and sliding_window is None):
        reach = None if sliding_window is None else sliding_window - causal
        ranges = query_ranges(
            query.shape[2],
            key.shape[2],
            causal=causal,
            left=reach,
            right=None if causal else reach,
            key_ranges=_checked_padding(padding_mask, key),
            sequence_ids=_checked_sequences(sequence_ids, query, key),
            batch=query.shape[0],
            device=query.device,
        )
    modifiers = Modifiers(ranges, attn_mask, softcap, sinks)
    config = config.for_layer(None)
    return attend(query, key, value, causal=causal, scale=scale, config=config, modifiers=modifiers)


def _positive(number: float, name: str) -> float:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name}={number!r} must be a number")
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name}={number} must be finite and positive")
    return float(number)


def _checked_padding(padding_mask: Tensor | None, key: Tensor) -> Tensor | None:
    if padding_mask is None:
        return None
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
    padding_mask = padding_mask.to(key.device)
    if has_holes(padding_mask):
        raise NotImplementedError(
            "padding_mask has padding between real tokens; accepted is padding on the left, on the right or"
            " on both sides of a row: pass it as attn_mask instead"
        )
    return padding_ranges(padding_mask)


def _checked_sequences(sequence_ids: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    if sequence_ids is None:
        return None
    if not isinstance(sequence_ids, Tensor) or sequence_ids.is_floating_point():
        raise TypeError("sequence_ids must be a tensor of integers")
    accepted = (key.shape[0], key.shape[2])
    if sequence_ids.shape != accepted or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"sequence_ids has shape {list(sequence_ids.shape)} for {query.shape[2]} queries; accepted is"
            f" [batch, key_length] = {list(accepted)} with as many queries as keys"
        )
    if bool((sequence_ids.diff(dim=1) < 0).any()):
        raise ValueError("sequence_ids decreases along a row; accepted are sequences one after the other")
    return sequence_ids.to(key.device)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    scale: float,
    config: DMAConfig,
    modifiers: Modifiers = NO_MODIFIERS,
) -> Tensor:
    """`diagonal_tiled_attention` on input that is known to be good."""
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        out: Tensor = _ForwardOnly.apply(query, key, value, causal, scale, config, modifiers)
        return out
    return _forward(query, key, value, causal, scale, config, modifiers)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    scale: float,
    config: DMAConfig,
    modifiers: Modifiers,
) -> Tensor:
    config = resolve(config, device_capability(query.device) if query.is_cuda else None)
    _, heads, query_length, head_dim = query.shape
    _, kv_heads, key_length, _ = key.shape
    if runs_on_sdpa(config, query_length, key_length, causal, modifiers.empty):
        return scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=scale, enable_gqa=heads != kv_heads
        )
    backend = choose_backend(config, query.device, head_dim, value.shape[-1])
    return attention(
        query, key, value, causal=causal, scale=scale, config=config, modifiers=modifiers, backend=backend
    )


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
    for name, tensor in (("query", query), ("key", key), ("value", value)):
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
    key_batch, kv_heads, key_length, key_dim = key.shape
    value_batch, value_heads, value_length, value_dim = value.shape
    if key_batch != batch or value_batch != batch:
        raise ValueError(f"batch sizes differ: query {batch}, key {key_batch}, value {value_batch}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query has {heads} heads, key has {kv_heads}; accepted is a multiple")
    if value_heads != kv_heads or value_length != key_length:
        raise ValueError(
            f"value has {value_heads} heads and {value_length} tokens,"
            f" key has {kv_heads} and {key_length}; they must agree"
        )
    if key_dim != head_dim:
        raise ValueError(f"key has head_dim {key_dim}, query has {head_dim}; they must agree")
    if head_dim == 0 or value_dim == 0:
        raise ValueError(f"head_dim of query is {head_dim}, of value {value_dim}; at least 1 is needed")


def check_modifiers(query: Tensor, key: Tensor, attn_mask: Tensor | None, sinks: Tensor | None) -> None:
    """Refuse a mask or sinks that do not fit the inputs, as `check_inputs` does."""
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor):
            raise TypeError(f"attn_mask is a {type(attn_mask).__name__}; accepted is a tensor")
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise TypeError(f"attn_mask has dtype {attn_mask.dtype}; accepted are bool and floating point")
        batch, heads, query_length, _ = query.shape
        shape = tuple(attn_mask.shape)
        if len(shape) != 4 or shape[0] not in (1, batch) or shape[1] not in (1, heads) or (
            shape[2:] != (query_length, key.shape[2])
        ):  # fmt: skip
            raise ValueError(
                f"attn_mask has shape {list(shape)}; accepted is [batch or 1, heads or 1, query_length,"
                f" key_length] = [{batch} or 1, {heads} or 1, {query_length}, {key.shape[2]}]"
            )
        if attn_mask.device != query.device:
            raise ValueError(f"attn_mask is on {attn_mask.device}, query on {query.device}; they must agree")
    if sinks is not None:
        if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
            raise TypeError("sinks must be a tensor of floating-point numbers")
        if sinks.shape != (query.shape[1],):
            raise ValueError(f"sinks has shape {list(sinks.shape)}; accepted is [heads] = [{query.shape[1]}]")
        if sinks.device != query.device:
            raise ValueError(f"sinks is on {sinks.device}, query on {query.device}; they must agree")
