"""The Triton backend: quantises K and V and attends, with everything decided beforehand."""

from __future__ import annotations

import threading
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
"""Calls of different shapes or settings whose launches are remembered; the oldest recording is dropped."""

_recordings: dict[Any, Recording] = {}
_recordings_lock = threading.Lock()  # of whoever adds one


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
    contiguous. The result is stored as [B, M, H, Dv]. It is the same to accumulation order, and the same
    bits on every run.

    Raises:
        ValueError: the last dimension of an input is not contiguous.
    """
    if query.numel() == 0 or key.numel() == 0:
        _check_layout(query, key, value)
        batch, heads, length, _ = query.shape
        return query.new_zeros(batch, length, heads, value.shape[-1]).transpose(1, 2)
    ranges, key_ranges = modifiers.query_ranges, None
    if ranges is not None:
        key_ranges, ranges = key_ranges_of(ranges), ranges.contiguous()
        modifiers = replace(modifiers, query_ranges=ranges)

    def launch(launches: Launches) -> Tensor:
        _check_layout(query, key, value)
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
    addresses = [query.data_ptr(), key.data_ptr(), value.data_ptr()]
    # All that a launch, or Triton's choice of a compiled kernel, depends on. That two inputs are one tensor
    # belongs to it: what is recorded of one tensor in two places says nothing of two tensors.
    call: tuple[Any, ...] = (
        causal, scale, config, query.get_device(), query.dtype,
        query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride(),
        addresses[0] % 16, addresses[1] % 16, addresses[2] % 16,
        query is key, key is value, value is query,
    )  # fmt: skip
    inputs: tuple[Tensor | None, ...] = (query, key, value)
    if not modifiers.empty:
        extra = (key_ranges, ranges, modifiers.sinks)
        inputs = (*inputs, *extra)
        addresses += [0 if t is None else t.data_ptr() for t in extra]
        layouts = [None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16) for t in extra]
        call = (*call, modifiers.softcap, *layouts)
    recording = _recordings.get(call)
    if recording is not None:
        return recording(addresses)
    recorder = Recorder(query.device, inputs)
    out = launch(recorder)
    recording = recorder.recording(out)
    if recording is not None:
        with _recordings_lock:
            _recordings[call] = recording
            if len(_recordings) > MAX_RECORDINGS:
                del _recordings[next(iter(_recordings))]
    return out


def _check_layout(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name} has strides {list(tensor.stride())}; accepted is a contiguous last dimension"
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
