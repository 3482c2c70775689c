"""The kernel benchmark's measuring loop: every implementation of attention on one shape.

It needs no particular device: what does is behind ``Meter``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .errors import EvalError, first_line
from .kernel_inputs import Inputs, Shape, float32_attention, random_inputs, relative_error
from .kernel_providers import Provider
from .kernel_timing import Call, Meter
from .progress import Advance

Run = dict[str, Any]
"""One entry of "runs" in ``kernels.json``: see `run_entry`."""

OPERATIONS = ("attention", "quantize", "attend")
"""In the order in which providers give them out."""


def run_entry(op: str, provider: str, shape: dict[str, Any], **measured: Any) -> Run:
    """One measurement, or None where one does not apply.

    op: "attention" is everything from Q, K, V to the output; "quantize" and "attend" are DMA's parts.
    ms: median time. tflops: 10^12 operations of full attention (half, if causal) per second.
    ratio_to_sdpa_default: time of SDPA's default in the same run over this time; above 1 is faster.
    includes_quantization: whether ms holds the quantisation of K; None where nothing is quantised. Q is
    quantised inside the attention kernel, so it is always in "attention" and in "attend".
    rel_error: ‖out - float32‖ / ‖float32‖ over the last queries. extra_bytes: peak memory of a call
    beyond inputs and output. error: why nothing was measured; only there if so.
    """
    return {
        "op": op,
        "provider": provider,
        "shape": shape,
        "ms": None,
        "tflops": None,
        "ratio_to_sdpa_default": None,
        "includes_quantization": None,
        "rel_error": None,
        "extra_bytes": None,
        **measured,
    }


def failure(error: Exception) -> str:
    """Why a provider did not run, in one line."""
    # the memory that a failed call left behind is not the next one's; after a fault of the device this
    # fails as everything else does, and every later entry says so
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()
    return "out of GPU memory" if isinstance(error, torch.OutOfMemoryError) else first_line(error)


def compare_attention(
    shape: Shape, providers: Sequence[Provider], meter: Meter, advance: Advance
) -> list[Run]:
    """Times every provider on a shape, against the first one, which is SDPA's default.

    The baseline is timed before, amid and after the others, and the median counts: a clock that drifts
    moves both sides of a ratio. A provider that fails leaves an entry with "error"; the rest go on.
    Calls ``advance`` after every provider.
    """
    try:
        inputs = random_inputs(shape, meter.device)
        expected = float32_attention(inputs)
    except RuntimeError as error:  # out of memory, or a device that a provider has brought down
        advance(len(providers))
        reason = f"no inputs: {failure(error)}"
        names = [provider.name for provider in providers]
        return [run_entry("attention", name, shape.describe(), error=reason) for name in names]
    baseline, *others = providers
    runs = measure_provider(baseline, inputs, expected, meter)
    times = [run["ms"] for run in runs]
    advance(1)
    for position, provider in enumerate(others, start=1):
        runs += measure_provider(provider, inputs, expected, meter)
        if None not in times and position in (len(others) // 2, len(others)):
            with contextlib.suppress(RuntimeError):  # it ran before: only a fault of the device stops it
                times.append(meter.milliseconds(attention_call(baseline, inputs)))
        advance(1)
    if None not in times:
        runs[0]["ms"] = median(times)
        runs[0]["tflops"] = _tflops(shape, runs[0]["ms"])
    relate(runs, runs[0]["ms"])
    return runs


def attention_call(provider: Provider, inputs: Inputs) -> Call:
    """The whole of attention, as ``provider`` computes it."""
    _, call = next(provider.operations(inputs))
    return call


def relate(runs: Sequence[Run], baseline_ms: float | None) -> None:
    """Fills in the ratios to the baseline; a part that is not attention by itself gets none."""
    for run in runs:
        if run["ms"] is not None and run["op"] != "quantize" and baseline_ms is not None:
            run["ratio_to_sdpa_default"] = baseline_ms / run["ms"]


def measure_provider(provider: Provider, inputs: Inputs, expected: Tensor, meter: Meter) -> list[Run]:
    """One entry per operation of ``provider``; the last one says so if it failed.

    Args:
        expected: what `float32_attention` gives for ``inputs``.
    """
    shape = inputs.shape
    runs: list[Run] = []
    config = None if provider.config is None else provider.config.to_dict()
    quantizes = provider.config is not None and provider.config.quantizes
    try:
        for op, call in provider.operations(inputs):
            run = run_entry(op, provider.name, shape.describe(), config=config)
            if op == "attention":
                run["rel_error"] = _checked_error(call(), expected)
            run["extra_bytes"] = meter.extra_bytes(call)
            run["ms"] = meter.milliseconds(call)
            if op != "quantize":
                run["tflops"] = _tflops(shape, run["ms"])
            if quantizes:
                run["includes_quantization"] = op != "attend"
            runs.append(run)
    except Exception as error:  # whatever another library raises, the comparison goes on without it
        failed = OPERATIONS[len(runs)]
        runs.append(run_entry(failed, provider.name, shape.describe(), config=config, error=failure(error)))
    return runs


def _checked_error(result: Tensor, expected: Tensor) -> float:
    error = relative_error(result, expected)
    if not math.isfinite(error):
        raise EvalError("wrong: the result holds NaN or Inf")
    return error


def _tflops(shape: Shape, ms: float) -> float:
    return shape.flops / ms / 1e9
