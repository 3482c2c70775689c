"""The Triton backend: quantises K and V and attends, with everything decided beforehand."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .config import DMAConfig
from .kernels.attention import attend_quantized
from .kernels.hopper import attend_hopper
from .kernels.quantize import QuantizedKey, quantize_key
from .kernels.quantize_value import QuantizedValue, quantize_value
from .masks import key_ranges_of
from .modifiers import NO_MODIFIERS, Modifiers
from .plan import Plan, hopper_serves, plan_call


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
    prepared = prepare(query, key, value, causal=causal, config=config, modifiers=modifiers)
    return attend_prepared(
        query, key, value, prepared, causal=causal, scale=scale, config=config, modifiers=modifiers
    )


@dataclass(frozen=True)
class Prepared:
    """What one call quantises before it attends.

    Attributes:
        plan: of the portable kernel, which does all, or repairs what the kernel for Hopper leaves out.
        key: K's operands.
        value: V, quantised where `config.pv` says so.
        key_ranges: int32 [B, 2], of the query ranges; None without.
        on_hopper: whether the kernel for Hopper serves the call.
    """

    plan: Plan
    key: QuantizedKey
    value: Tensor | QuantizedValue
    key_ranges: Tensor | None
    on_hopper: bool


def prepare(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, config: DMAConfig, modifiers: Modifiers
) -> Prepared:
    """Quantise K, and V where the setting says so."""
    ranges = modifiers.query_ranges
    key_ranges = None if ranges is None else key_ranges_of(ranges)
    on_hopper = modifiers.empty and hopper_serves(config, query, key, value, causal)
    plan = plan_call(
        query,
        value,
        config,
        masked=modifiers.mask is not None,
        fp8_value=config.pv == "fp8" and not on_hopper,
    )
    return Prepared(
        plan,
        quantize_key(key, config, plan.low_kind, plan.high_kind, key_ranges),
        _values(value, key_ranges, modifiers, on_hopper) if config.pv == "fp8" else value,
        key_ranges,
        on_hopper,
    )


def _values(
    value: Tensor, key_ranges: Tensor | None, modifiers: Modifiers, on_hopper: bool
) -> QuantizedValue:
    # with sinks the weights of V do not sum to one
    return quantize_value(value, key_ranges, smooth=modifiers.sinks is None, permuted=on_hopper)


def attend_prepared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prepared: Prepared,
    *,
    causal: bool,
    scale: float,
    config: DMAConfig,
    modifiers: Modifiers,
) -> Tensor:
    """Attention to what `prepare` made of `key` and `value`."""
    values, out = prepared.value, None
    if prepared.on_hopper:
        assert isinstance(values, QuantizedValue)
        out = attend_hopper(query, key, prepared.key, values, causal=causal, scale=scale, config=config)
        # what is left are heads whose K holds a NaN or Inf; with V as given, no less exact than in FP8
        values = value
    return attend_quantized(
        query, key, values, prepared.key, causal=causal, scale=scale, config=config, plan=prepared.plan,
        modifiers=modifiers, key_ranges=prepared.key_ranges, repair=out,
    )  # fmt: skip
