"""Compile the product's own launches for any GPU on a machine without one.

`capture(capability)` makes Triton believe that a GPU of that capability is there and turns every launch
into a compilation: the code under test runs unchanged, and the compiled kernels are collected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.jit import JITFunction

from dma_hf import DMAConfig
from dma_hf.kernels.attention import attend_quantized
from dma_hf.kernels.quantize import quantize_key
from dma_hf.policy import operand_kind
from dma_hf.tuning import choose_blocks


class _PretendDriver(CudaDriver):
    """A CUDA driver as far as compilation asks for one."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # kernels are cached by device: give every architecture its own
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def capture(capability: int) -> Iterator[list[Any]]:
    """Collect the kernels compiled for sm_`capability` inside the block, none of them launched."""
    compiled: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(_PretendDriver(capability))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = launch
        triton.runtime.driver._active = previous


def compile_attention(
    capability: int,
    config: DMAConfig,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = True,
) -> dict[str, Any]:
    """The kernels of one attention call, by name: what a GPU of that capability would run."""
    shape = (1, 2, 1024, head_dim)
    query, key, value = (torch.zeros(shape, dtype=dtype) for _ in range(3))
    kinds = operand_kind(config.low, capability), operand_kind(config.high, capability)
    blocks = choose_blocks(capability, head_dim, head_dim, dtype.itemsize, kinds[0], config.tile)
    with capture(capability) as compiled:
        quantized = quantize_key(key, config, *kinds)
        attend_quantized(
            query, key, value, quantized,
            causal=causal, scale=0.1, config=config, blocks=blocks, use_tma=capability >= 90,
            via_memory=capability == 90,
        )  # fmt: skip
    kernels: dict[str, Any] = {}
    for kernel in compiled:
        # the attention kernel comes twice: the one that every call runs, then its repair variant
        kernels.setdefault(kernel.metadata.name, kernel)
    return kernels
