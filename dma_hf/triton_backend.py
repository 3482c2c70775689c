"""The Triton backend: quantises K and V and attends, with everything decided beforehand."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .config import DMAConfig
from .kernels.attention import attend_quantized
from .kernels.hopper import attend_hopper
from .kernels.launching import Launches, Recorder, Recording
from .kernels.quantize import QuantizedKey, quantize_key_value
from .kernels.quantize_value import QuantizedValue
from .masks import key_ranges_of
from .modifiers import NO_MODIFIERS, Modifiers
from .plan import Plan, hopper_serves, plan_call, plan_repair

MAX_RECORDINGS = 512
"""Calls of different shapes or settings whose launches are remembered; the least recently used is dropped."""

_recordings: OrderedDict[Any, Recording] = OrderedDict()


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
    ranges, key_ranges = modifiers.query_ranges, None
    if ranges is not None:
        key_ranges, ranges = key_ranges_of(ranges), ranges.contiguous()
        modifiers = replace(modifiers, query_ranges=ranges)

    def launch(launches: Launches) -> Tensor:
        prepared = prepare(
            query, key, value, causal=causal, config=config, modifiers=modifiers, key_ranges=key_ranges,
            launches=launches,
        )  # fmt: skip
        return attend_prepared(
            query, key, value, prepared, causal=causal, scale=scale, config=config, modifiers=modifiers,
            launches=launches,
        )  # fmt: skip

    if modifiers.mask is not None:
        # lists of a mask's tiles are made by PyTorch, between the launches
        return launch(Launches(query.device))
    inputs = (query, key, value, key_ranges, ranges, modifiers.sinks)
    # all that a launch, or Triton's choice of a compiled kernel, depends on
    call = (
        causal, scale, config, modifiers.softcap, query.device,
        *(None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16) for t in inputs),
    )  # fmt: skip
    recording = _recordings.get(call)
    if recording is not None:
        _recordings.move_to_end(call)
        return recording(inputs).transpose(1, 2)
    recorder = Recorder(query.device, inputs)
    out = launch(recorder)
    recording = recorder.recording()
    if recording is not None:
        _recordings[call] = recording
        if len(_recordings) > MAX_RECORDINGS:
            _recordings.popitem(last=False)
    return out


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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    config: DMAConfig,
    modifiers: Modifiers,
    key_ranges: Tensor | None,
    launches: Launches,
) -> Prepared:
    """Quantise K, and V where the setting says so.

    Args:
        key_ranges: `masks.key_ranges_of` the query ranges, where there are any.
    """
    on_hopper = modifiers.empty and hopper_serves(config, query, key, value, causal)
    fp8_value = config.pv == "fp8"
    if on_hopper:
        plan = plan_repair(query, value, config)
    else:
        masked = modifiers.mask is not None
        plan = plan_call(query, value, config, masked=masked, fp8_value=fp8_value)
    quantized, quantized_value = quantize_key_value(
        key, value if fp8_value else None, config, plan.low_kind, plan.high_kind, key_ranges,
        smooth_value=modifiers.sinks is None,  # with sinks the weights of V do not sum to one
        permuted=on_hopper, launches=launches,
    )  # fmt: skip
    return Prepared(
        plan, quantized, value if quantized_value is None else quantized_value, key_ranges, on_hopper
    )


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
    launches: Launches,
) -> Tensor:
    """Attention to what `prepare` made of `key` and `value`."""
    values, out = prepared.value, None
    if prepared.on_hopper:
        out = attend_hopper(
            query, key, prepared.key, values, causal=causal, scale=scale, config=config, launches=launches
        )
        # what is left are heads whose K holds a NaN or Inf; with V as given, no less exact than in FP8
        values = value
    return attend_quantized(
        query, key, values, prepared.key, causal=causal, scale=scale, config=config, plan=prepared.plan,
        modifiers=modifiers, key_ranges=prepared.key_ranges, repair=out, launches=launches,
    )  # fmt: skip
