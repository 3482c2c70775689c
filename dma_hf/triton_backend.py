"""The Triton backend: a custom op that quantises K and attends, with everything decided beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import DMAConfig
from .kernels.attention import attend_quantized
from .kernels.quantize import quantize_key
from .kernels.quantize_value import quantize_value
from .masks import key_ranges_of
from .modifiers import NO_MODIFIERS, Modifiers
from .plan import plan_call


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    scale: float,
    config: DMAConfig,
    modifiers: Modifiers = NO_MODIFIERS,
) -> Tensor:
    """Diagonal-tiled mixed-precision attention on the Triton kernels.

    Arguments and result are those of `reference_attention`; the last dimension of every input is
    contiguous. The result is the same to accumulation order, and the same bits on every run.

    Raises:
        ValueError: the last dimension of an input is not contiguous.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name} has strides {list(tensor.stride())}; accepted is a contiguous last dimension"
            )
    out: Tensor = _attention_op(
        query, key, value, modifiers.query_ranges, modifiers.mask, modifiers.sinks, modifiers.softcap,
        causal, scale, config.low, config.high, config.diagonal,
        config.sink, config.tile, config.smooth_k, config.rotate, config.scale_rule, config.pv,
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
) -> Tensor:
    # a custom op takes plain values only, so the setting travels as its fields
    config = DMAConfig(low, high, diagonal, sink, tile, smooth_k, rotate, scale_rule, pv)  # type: ignore[arg-type]
    if query.numel() == 0 or key.shape[2] == 0:
        return _empty_out(query, value).zero_()
    plan = plan_call(query, value, config)
    key_ranges = None if query_ranges is None else key_ranges_of(query_ranges)
    quantized = quantize_key(key, config, plan.low_kind, plan.high_kind, key_ranges)
    values = quantize_value(value, key_ranges) if pv == "fp8" else value
    return attend_quantized(
        query, key, values, quantized, causal=causal, scale=scale, config=config, plan=plan,
        modifiers=Modifiers(query_ranges, mask, softcap, sinks), key_ranges=key_ranges,
    )  # fmt: skip


@_attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: object) -> Tensor:
    return _empty_out(query, value)


def _empty_out(query: Tensor, value: Tensor) -> Tensor:
    """[B, H, M, Dv], stored as [B, M, H, Dv]: the strides every path returns."""
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
