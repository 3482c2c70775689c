"""The implementations of attention that the kernel benchmark compares."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dma_hf import DMAConfig, diagonal_tiled_attention
from dma_hf.plan import plan_call
from dma_hf.policy import choose_backend, device_capability, runs_on_sdpa
from dma_hf.presets import resolve

from .errors import EvalError
from .kernel_inputs import Inputs
from .kernel_timing import Call
from .runs import parse_config

PRESET_CONFIGS = ("auto", "fast", "accurate", "paper")
FORMAT_CONFIGS = ("low=mxfp4,high=none", "low=fp8,high=none", "low=none,high=none")
"""Formats that no preset runs in the portable kernel, and nothing quantised."""

Operations = Iterator[tuple[str, Call]]
"""Named calls: first "attention", all of it; then its parts, where there are any."""


@dataclass(frozen=True)
class Provider:
    """One implementation of attention.

    Attributes:
        name: as results and tables name it.
        operations: from inputs to the calls to time. What comes before a call is given out (a block
            mask, an import) is not timed.
        config: DMA's setting; None for every other implementation.
    """

    name: str
    operations: Callable[[Inputs], Operations]
    config: DMAConfig | None = None


def dma_providers(configs: Sequence[str]) -> list[Provider]:
    """DMA by setting.

    Raises:
        UsageError: if a string of ``configs`` is no setting.
    """
    return [dma_provider(f"DMA {text}", parse_config(text)) for text in configs]


def _sdpa(inputs: Inputs) -> Tensor:
    shape = inputs.shape
    return scaled_dot_product_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        is_causal=shape.causal,
        scale=inputs.scale,
        enable_gqa=shape.heads != shape.kv_heads,
    )


def _sdpa_default(inputs: Inputs) -> Operations:
    yield "attention", lambda: _sdpa(inputs)


SDPA = Provider("SDPA", _sdpa_default)


def _sdpa_backend(backend: SDPBackend) -> Callable[[Inputs], Operations]:
    def operations(inputs: Inputs) -> Operations:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return _sdpa(inputs)

        yield "attention", call

    return operations


def _flex_attention(inputs: Inputs) -> Operations:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    shape = inputs.shape
    device = str(inputs.query.device)
    mask = create_block_mask(causal, None, None, shape.length, shape.length, device) if shape.causal else None
    # every shape is compiled for itself; past a limit of recompilations PyTorch would run it uncompiled
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = shape.heads != shape.kv_heads

    def call() -> object:
        return compiled(
            inputs.query,
            inputs.key,
            inputs.value,
            block_mask=mask,
            scale=inputs.scale,
            enable_gqa=grouped,
        )

    yield "attention", call


def _sage_attention(inputs: Inputs) -> Operations:
    if importlib.util.find_spec("sageattention") is None:
        raise EvalError("not installed")
    sageattn = importlib.import_module("sageattention").sageattn

    def call() -> Tensor:
        return sageattn(
            inputs.query,
            inputs.key,
            inputs.value,
            tensor_layout="HND",
            is_causal=inputs.shape.causal,
            sm_scale=inputs.scale,
        )

    yield "attention", call


OTHERS = {
    "flash": Provider("SDPA flash", _sdpa_backend(SDPBackend.FLASH_ATTENTION)),
    "cudnn": Provider("SDPA cuDNN", _sdpa_backend(SDPBackend.CUDNN_ATTENTION)),
    "flex": Provider("FlexAttention", _flex_attention),
    "sage": Provider("SageAttention", _sage_attention),
}
"""What SDPA's default and DMA may be compared with, by the names that the command line takes."""

DEFAULT_OTHERS = ("flash", "cudnn", "sage")
"""Without FlexAttention, which torch.compile builds anew for every shape: several seconds each."""


def dma_provider(name: str, config: DMAConfig, *, parts: bool = True) -> Provider:
    """DMA in one setting; on the kernels also its two parts, "quantize" (of K) and "attend"."""

    def operations(inputs: Inputs) -> Operations:
        query, key, value, causal = inputs.query, inputs.key, inputs.value, inputs.shape.causal
        yield (
            "attention",
            lambda: diagonal_tiled_attention(
                query, key, value, causal=causal, scale=inputs.scale, config=config
            ),
        )
        setting = resolve(config, device_capability(query.device) if query.is_cuda else None)
        length = inputs.shape.length
        if not parts or not setting.quantizes or runs_on_sdpa(setting, length, length, causal, True):
            return
        if choose_backend(setting, query.device, query.shape[-1], value.shape[-1]) == "triton":
            yield from _parts(inputs, setting)

    return Provider(name, operations, config)


def key_quantizer(key: Tensor, config: DMAConfig) -> Call:
    """The fused quantiser on ``key`` [B, Hkv, N, D], as the Triton backend calls it on key's device."""
    from dma_hf.kernels.quantize import quantize_key

    plan = plan_call(key, key, config)
    return lambda: quantize_key(key, config, plan.low_kind, plan.high_kind)


def _parts(inputs: Inputs, config: DMAConfig) -> Operations:
    """What the Triton backend does, one call after the other: quantises K (and V for FP8 PV), and attends."""
    from dma_hf.kernels.launching import Launches
    from dma_hf.modifiers import NO_MODIFIERS
    from dma_hf.triton_backend import attend_prepared, prepare

    query, key, value, causal = inputs.query, inputs.key, inputs.value, inputs.shape.causal

    launches = Launches(query.device)

    def quantize() -> Any:
        return prepare(
            query,
            key,
            value,
            causal=causal,
            config=config,
            modifiers=NO_MODIFIERS,
            key_ranges=None,
            launches=launches,
        )

    yield "quantize", quantize
    prepared = quantize()
    yield (
        "attend",
        lambda: attend_prepared(
            query,
            key,
            value,
            prepared,
            causal=causal,
            scale=inputs.scale,
            config=config,
            modifiers=NO_MODIFIERS,
            launches=launches,
        ),
    )
