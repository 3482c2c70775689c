"""Compiles the kernels of a benchmark before it runs, on all cores: Triton itself compiles one after another.

Each launch is made once, on a short sequence, in one of several worker processes. Triton keeps what it
compiles on disk, and there the benchmark finds it. Nothing depends on this but time: what fails to compile
here fails again where it is measured, and is reported there.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from dma_hf import DMAConfig, diagonal_tiled_attention
from dma_hf.tuning import Blocks

from .kernel_inputs import Shape, random_inputs
from .kernel_tuning import attend_with
from .progress import Advance

SHORT = 2048
"""Tokens: few, and a multiple of what kernels are specialised for, as the benchmark's lengths are."""


@dataclass(frozen=True)
class Launch:
    """What decides, with the device, which kernels one call of DMA compiles.

    Attributes:
        shape: with one short sequence.
        config: the setting.
        blocks: of the portable attention kernel alone; None for a whole call.
    """

    shape: Shape
    config: DMAConfig
    blocks: Blocks | None = None


def launch_of(shape: Shape, config: DMAConfig, blocks: Blocks | None = None) -> Launch:
    """The launch that compiles what a call on ``shape`` needs: of every batch and length the same."""
    length = max(SHORT, config.min_length)  # shorter calls go to SDPA
    return Launch(replace(shape, batch=1, length=length), config, blocks)


def compile_ahead(launches: Iterable[Launch], device: torch.device, workers: int, advance: Advance) -> None:
    """Makes every launch once, in ``workers`` processes. Calls ``advance`` after each."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA after its parent did
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quieten) as pool:
        futures: list[Future[None]] = [pool.submit(launch_once, launch, device) for launch in launches]
        for future in as_completed(futures):
            with suppress(Exception, BrokenProcessPool):
                future.result()
            advance(1)


def launch_once(launch: Launch, device: torch.device) -> None:
    """Makes one launch, and waits for it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    inputs = random_inputs(launch.shape, device)
    if launch.blocks is None:
        query, key, value = inputs.query, inputs.key, inputs.value
        diagonal_tiled_attention(
            query, key, value, causal=inputs.shape.causal, scale=inputs.scale, config=launch.config
        )
    else:
        attend_with(inputs, launch.blocks, launch.config)()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def usable_cores() -> int:
    """How many processes can run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quieten() -> None:
    warnings.simplefilter("ignore")  # the benchmark says the same
