"""The Triton backend: quantises K and V and attends, with everything decided beforehand."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .config import DMAConfig
from .kernels.attention import attend_quantized
from .kernels.hopper import attend_hopper
from .kernels.quantize import quantize_key
from .kernels.quantize_value import quantize_value
from .masks import key_ranges_of
from .modifiers import NO_MODIFIERS, Modifiers
from .plan import hopper_serves, plan_call


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
    if query.numel() == 0 or key.shape[2] == 0:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    if modifiers.empty and hopper_serves(config, query, key, value, causal):
        return _on_hopper(query, key, value, causal=causal, scale=scale, config=config)
    plan = plan_call(query, value, config, masked=modifiers.mask is not None)
    ranges = modifiers.query_ranges
    key_ranges = None if ranges is None else key_ranges_of(ranges)
    quantized = quantize_key(key, config, plan.low_kind, plan.high_kind, key_ranges)
    values = quantize_value(value, key_ranges) if config.pv == "fp8" else value
    return attend_quantized(
        query, key, values, quantized, causal=causal, scale=scale, config=config, plan=plan,
        modifiers=modifiers, key_ranges=key_ranges,
    )  # fmt: skip


def _on_hopper(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float, config: DMAConfig
) -> Tensor:
    plan = plan_call(query, value, config)
    quantized = quantize_key(key, config, plan.low_kind, plan.high_kind)
    values = quantize_value(value, permuted=True)
    out = attend_hopper(query, key, quantized, values, causal=causal, scale=scale, config=config)
    # heads whose K holds a NaN or Inf; with V as given, which is no less exact than FP8
    plan = plan_call(query, value, replace(config, pv="none"))
    return attend_quantized(
        query, key, value, quantized, causal=causal, scale=scale, config=config, plan=plan, repair=out
    )
