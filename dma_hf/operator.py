"""The custom op `dma_hf::attention`: one call to torch.compile and CUDA graphs, whatever runs inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.jit._trace import is_tracing
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .config import DMAConfig
from .memo import memoized
from .modifiers import Modifiers
from .reference import reference_attention
from .triton_backend import triton_attention


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    scale: float,
    config: DMAConfig,
    modifiers: Modifiers,
    backend: str,
) -> Tensor:
    """Attention on one backend, "triton" or "reference", with the arguments of `reference_attention`.

    Returns:
        [B, H, M, Dv], stored as [B, M, H, Dv], on every path.
    """
    if _runs_at_once(query):
        # what the op's dispatcher does costs more than the launches
        return _run(query, key, value, causal, scale, config, modifiers, backend)
    # a custom op takes plain values only, so the setting travels as its fields
    out: Tensor = _attention_op(
        query, key, value, modifiers.query_ranges, modifiers.mask, modifiers.sinks, modifiers.softcap,
        causal, scale, config.low, config.high, config.diagonal, config.sink, config.tile, config.smooth_k,
        config.rotate, config.scale_rule, config.pv, backend,
    )  # fmt: skip
    return out


@torch.library.custom_op("dma_hf::attention", mutates_args=())
def _attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ranges: Tensor | None,
    mask: Tensor | None,
    sinks: Tensor | None,
    softcap: float | None,
    causal: bool,
    scale: float,
    low: str,
    high: str,
    diagonal: int,
    sink: int,
    tile: int,
    smooth_k: bool,
    rotate: bool,
    scale_rule: str,
    pv: str,
    backend: str,
) -> Tensor:
    config = _setting(low, high, diagonal, sink, tile, smooth_k, rotate, scale_rule, pv)
    modifiers = Modifiers(query_ranges, mask, softcap, sinks)
    return _run(query, key, value, causal, scale, config, modifiers, backend)


def _runs_at_once(query: Tensor) -> bool:
    """Whether nobody records what is called: neither torch.compile nor a fake or another dispatch mode."""
    return (
        not torch.compiler.is_compiling()
        and type(query) is Tensor
        and _get_current_dispatch_mode() is None
        and not is_tracing()
    )


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    scale: float,
    config: DMAConfig,
    modifiers: Modifiers,
    backend: str,
) -> Tensor:
    run = triton_attention if backend == "triton" else _stored_by_tokens
    # Triton launches on the current device, not on that of its arguments: a model may be spread over several
    if query.is_cuda and query.get_device() != torch.cuda.current_device():
        with torch.cuda.device(query.device):
            return run(query, key, value, causal=causal, scale=scale, config=config, modifiers=modifiers)
    return run(query, key, value, causal=causal, scale=scale, config=config, modifiers=modifiers)


def _stored_by_tokens(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    """`reference_attention`, stored as [B, M, H, Dv]."""
    out = reference_attention(query, key, value, **arguments)
    if not out.numel():  # without a query, every stride is contiguous and `contiguous` changes none
        return _empty_out(query, value)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@memoized
def _setting(*fields: Any) -> DMAConfig:
    # validated once, not at each call
    return DMAConfig(*fields)


@_attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: object) -> Tensor:
    return _empty_out(query, value)


def _empty_out(query: Tensor, value: Tensor) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
