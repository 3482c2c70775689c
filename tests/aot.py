"""Compile the product's own launches for any GPU on a machine without one, and read what came out.

`capture(capability)` makes Triton believe that a GPU of that capability is there and turns every launch
into a compilation: the code under test runs unchanged, and the compiled kernels are collected.
`inspect_kernel` reads a compiled kernel's resources and instructions with the tools in Triton's wheel.

As a command it compiles attention for a list of cases and prints a report of each kernel, one JSON object
a line. Compilation and Triton's interpreter exclude each other in one process, so tests call it that way:

    python tests/aot.py 100:paper:128 90:low=mxfp4,high=mxfp8:64 90:paper:128:ranges+softcap
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.jit import JITFunction

from dma_hf import DMAConfig
from dma_hf.kernels.attention import attend_quantized
from dma_hf.kernels.quantize import quantize_key
from dma_hf.masks import key_ranges_of, query_ranges
from dma_hf.modifiers import Modifiers
from dma_hf.plan import make_plan


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
def capture(capability: int, repair: bool = True) -> Iterator[list[Any]]:
    """Collect the kernels compiled for sm_`capability` inside the block, none of them launched.

    `repair=False` leaves out the attention kernel's second variant, which runs for heads with NaN or Inf.
    """
    compiled: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if kwargs.get("REPAIR") and not repair:
            return None
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


FEATURES = ("ranges", "bool", "bias", "softcap", "sinks")
"""What a call may add: see `make_modifiers`."""


def make_modifiers(features: str, heads: int, length: int, dtype: torch.dtype) -> Modifiers:
    """The modifiers that `features` names, joined by "+": a window, a bool mask, a bias, softcap, sinks."""
    names = features.split("+") if features else []
    if unknown := set(names) - set(FEATURES):
        raise ValueError(f"features {sorted(unknown)} are not among {FEATURES}")
    mask = None
    if "bool" in names:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool)
    elif "bias" in names:
        mask = torch.zeros(1, heads, length, length, dtype=dtype)
    return Modifiers(
        query_ranges=query_ranges(length, length, causal=True, left=300) if "ranges" in names else None,
        mask=mask,
        softcap=30.0 if "softcap" in names else None,
        sinks=torch.zeros(heads) if "sinks" in names else None,
    )


def compile_attention(
    capability: int,
    config: DMAConfig,
    head_dim: int = 128,
    features: str = "",
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = True,
    repair: bool = False,
) -> list[Any]:
    """The kernels of one attention call, in the order of launch: what a GPU of that capability would run."""
    shape = (1, 2, 1024, head_dim)
    query, key, value = (torch.zeros(shape, dtype=dtype) for _ in range(3))
    modifiers = make_modifiers(features, *shape[1:3], dtype)
    ranges = None if modifiers.query_ranges is None else key_ranges_of(modifiers.query_ranges)
    plan = make_plan(config, capability, head_dim, head_dim, dtype.itemsize)
    with capture(capability, repair) as compiled:
        quantized = quantize_key(key, config, plan.low_kind, plan.high_kind, ranges)
        attend_quantized(
            query, key, value, quantized, causal=causal, scale=0.1, config=config, plan=plan,
            modifiers=modifiers, key_ranges=ranges,
        )  # fmt: skip
    return compiled


@dataclass(frozen=True)
class Report:
    """What a compiled kernel is made of.

    Attributes:
        name: of the kernel.
        capability: 90 for sm_90.
        shared_bytes: shared memory of a program.
        registers: of a thread.
        tensor_columns: columns of tensor memory (sm_100) of a program, of 512.
        notes: codes of the assembler's performance notes (C7510 to C7515: wgmma serialised), all kernels of
            the call together.
        mma: tensor-core and tensor-memory instructions in the PTX, with how often each is written.
        loops: for each innermost loop that multiplies on the tensor cores, its SASS opcodes (without
            modifiers), with how often each occurs in one turn.
    """

    name: str
    capability: int
    shared_bytes: int
    registers: int
    tensor_columns: int
    notes: list[str]
    mma: dict[str, int]
    loops: list[dict[str, int]]


# what multiplies: Ampere's and consumer Blackwell's mma.sync, Hopper's wgmma, Blackwell's tcgen05.mma
_SASS_MMA = re.compile(r"^(?:[HIQO]MMA|[HQI]GMMA|UTC[HQIO]MMA)$")
_PTX_MMA = re.compile(r"\b(?:(?:wgmma\.mma_async|mma)\.sync|tcgen05\.(?:mma|cp))[\w.:]*")
_SASS_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);")


def innermost_mma_loops(sass: str) -> list[dict[str, int]]:
    """Opcode counts of each innermost loop that multiplies on the tensor cores.

    A loop is a branch backwards with all that lies between it and its target. What lies behind the last
    EXIT is left out: the slow paths of waits, which branch back into the kernel.
    """
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif instruction := _SASS_LINE.search(line):
            opcode, operands = instruction.groups()
            opcodes.append(opcode)
            target = re.search(r"`\((\.L_x_\d+)\)", operands)
            if opcode == "BRA" and target and target[1] in labels:
                loops.append((labels[target[1]], len(opcodes)))
    end = len(opcodes) - opcodes[::-1].index("EXIT")
    loops = [a for a in loops if a[1] <= end and any(_SASS_MMA.match(o) for o in opcodes[slice(*a)])]
    inner = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] for b in loops if a != b)]
    return [dict(Counter(opcodes[slice(*loop)])) for loop in inner]


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def inspect_kernel(kernel: Any, assembler_log: str = "") -> Report:
    """The report of one compiled kernel. `assembler_log` is what ptxas said while it was compiled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        sass = _tool("nvdisasm", "-c", cubin.name)
    (registers,) = re.findall(r"REG:(\d+)", usage)
    return Report(
        name=kernel.metadata.name,
        capability=kernel.metadata.target.arch,
        shared_bytes=kernel.metadata.shared,
        registers=int(registers),
        tensor_columns=kernel.metadata.tmem_size or 0,
        notes=sorted(set(re.findall(r"\b(C\d{4})\b", assembler_log))),
        mma=dict(Counter(_PTX_MMA.findall(kernel.asm["ptx"]))),
        loops=innermost_mma_loops(sass),
    )


def report_attention(capability: int, config: DMAConfig, head_dim: int, features: str = "") -> list[Report]:
    """Compile one attention call and report its kernels."""
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True  # Triton prints it
        kernels = compile_attention(capability, config, head_dim, features)
    return [inspect_kernel(kernel, log.getvalue()) for kernel in kernels]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compile attention for GPUs that are not there; one JSON line for each kernel.",
        epilog="Set TRITON_CACHE_DIR to an empty folder: a kernel from the cache has no assembler notes.",
    )
    parser.add_argument(
        "cases", nargs="+", metavar="CAPABILITY:CONFIG:HEAD_DIM[:FEATURES]",
        help=f"for instance 100:paper:128 or 90:paper:128:ranges+softcap; features: {', '.join(FEATURES)}",
    )  # fmt: skip
    for case in parser.parse_args().cases:
        capability, config, head_dim, *features = case.split(":")
        setting = DMAConfig.parse(config)
        for report in report_attention(int(capability), setting, int(head_dim), "".join(features)):
            print(json.dumps({"case": case, **asdict(report)}), flush=True)


if __name__ == "__main__":
    main()
