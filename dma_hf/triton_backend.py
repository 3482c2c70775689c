"""The Triton backend: quantises K and V and attends, with everything decided beforehand."""

from __future__ import annotations

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
    if query.numel() == 0 or key.shape[2] == 0:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    plan = plan_call(query, value, config, masked=modifiers.mask is not None)
    ranges = modifiers.query_ranges
    key_ranges = None if ranges is None else key_ranges_of(ranges)
    quantized = quantize_key(key, config, plan.low_kind, plan.high_kind, key_ranges)
    values = quantize_value(value, key_ranges) if config.pv == "fp8" else value
    return attend_quantized(
        query, key, values, quantized, causal=causal, scale=scale, config=config, plan=plan,
        modifiers=modifiers, key_ranges=key_ranges,
    )  # fmt: skip
