"""``dma-eval kernels --tune``: measures the choices of dma_hf/tuning.py on the current GPU.

The table has a cell for each class of head dimensions and kind of operands, which one setting of DMA
stands for. Every candidate attends the same quantised inputs, in the portable kernel: what the kernel for
Hopper serves by itself is not in the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from dma_hf import DMAConfig
from dma_hf.formats import NONE
from dma_hf.modifiers import NO_MODIFIERS
from dma_hf.plan import plan_call
from dma_hf.policy import FP8_CAPABILITY, MAX_HEAD_DIM, MIN_HEAD_DIM, operand_kind
from dma_hf.tuning import CANDIDATES, HEAD_DIMS, Blocks, Operands, operands_of, table_blocks

from .errors import UsageError
from .kernel_benchmark import Run, measure_provider
from .kernel_inputs import HEADS, KV_HEADS, Inputs, Shape, float32_attention, random_inputs
from .kernel_providers import Operations, Provider
from .kernel_timing import Call, Meter
from .progress import Advance
from .runs import parse_config

TUNING_SIZE = (1, 16_384)
"""Batch and length: the loops are long, and every multiprocessor is busy."""

TUNING_CONFIGS = (
    "low=fp8,high=none,pv=fp8",
    "low=fp8,high=none",
    "low=int8,high=none",
    "low=none,high=none",
    "paper",
)
"""On every architecture the first setting of each kind of operands stands for it."""

FASTER = 1.02
"""A candidate must be so many times as fast as the table's choice to be named: less is noise."""

TOLERANCE = 1.1
"""And its error at most so many times that of the table's choice."""


@dataclass(frozen=True)
class Cell:
    """One choice of the table to be measured.

    Attributes:
        capability: of the GPU; 90 for sm_90.
        head_dim: D and Dv.
        operands: kind of operands.
        config: the setting that stands for them.
    """

    capability: int
    head_dim: int
    operands: Operands
    config: str

    @property
    def chosen(self) -> Blocks:
        """The table's choice."""
        return table_blocks(self.capability, self.head_dim, self.operands)

    @property
    def shape(self) -> Shape:
        """What it is measured on."""
        batch, length = TUNING_SIZE
        return Shape(batch, HEADS, KV_HEADS, length, self.head_dim)

    def describe(self) -> dict[str, Any]:
        """The shape and the operands, as results files hold them."""
        return {**self.shape.describe(), "operands": self.operands}

    @property
    def candidates(self) -> list[Blocks]:
        """The table's choice, then the others."""
        return [self.chosen, *(blocks for blocks in CANDIDATES if blocks != self.chosen)]


def check_head_dim(head_dim: int) -> None:
    """Raises UsageError for a head dimension that the kernels do not serve."""
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM or head_dim % 8:
        raise UsageError(
            f"--head-dim {head_dim}: the kernels take multiples of 8 from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
        )


def tuning_cells(capability: int, head_dims: Sequence[int] = HEAD_DIMS) -> list[Cell]:
    """The cells of the table that a GPU of this capability uses, but those of float32 inputs."""
    by_operands: dict[Operands, str] = {}
    for text in TUNING_CONFIGS:
        config = parse_config(text)
        if config.pv == NONE or capability >= FP8_CAPABILITY:
            element_size = 2 if config.pv == NONE else 1
            by_operands.setdefault(operands_of(element_size, operand_kind(config.low, capability)), text)
    return [
        Cell(capability, head_dim, operands, text)
        for head_dim in head_dims
        for operands, text in by_operands.items()
    ]


def measure_cell(cell: Cell, meter: Meter, advance: Advance) -> list[Run]:
    """Times every candidate of a cell. Calls ``advance`` after each.

    Returns:
        Entries as `run_entry` makes them, the table's choice first, with "blocks" and "ratio_to_chosen":
        the time of the table's choice over this one's.
    """
    inputs = random_inputs(cell.shape, meter.device)
    expected = float32_attention(inputs)
    config = parse_config(cell.config)
    runs = []
    for blocks in cell.candidates:
        provider = Provider(describe(blocks), partial(_attend, blocks=blocks, config=config), config)
        (run,) = measure_provider(provider, inputs, expected, meter)
        runs.append({**run, "op": "attend", "shape": cell.describe(), "blocks": asdict(blocks)})
        advance(1)
    for run in runs:
        if run["ms"] is not None:
            run["includes_quantization"] = False
            run["ratio_to_chosen"] = None if runs[0]["ms"] is None else runs[0]["ms"] / run["ms"]
    return runs


def _attend(inputs: Inputs, *, blocks: Blocks, config: DMAConfig) -> Operations:
    yield "attention", attend_with(inputs, blocks, config)


def attend_with(inputs: Inputs, blocks: Blocks, config: DMAConfig) -> Call:
    """The portable kernel with these blocks, on inputs that are quantised already."""
    from dma_hf.kernels.attention import attend_quantized
    from dma_hf.kernels.quantize import quantize_key
    from dma_hf.kernels.quantize_value import quantize_value

    query, key, value = inputs.query, inputs.key, inputs.value
    in_fp8 = config.pv != NONE
    plan = plan_call(query, value, config, fp8_value=in_fp8)
    quantized = quantize_key(key, config, plan.low_kind, plan.high_kind)
    values = quantize_value(value, None) if in_fp8 else value
    return lambda: attend_quantized(
        query,
        key,
        values,
        quantized,
        causal=inputs.shape.causal,
        scale=inputs.scale,
        config=config,
        plan=replace(plan, blocks=blocks),
        modifiers=NO_MODIFIERS,
    )


def verdict(runs: Sequence[Run]) -> str:
    """What a cell's entries say about the table, in one line."""
    chosen, *others = runs
    usable = [run for run in others if "error" not in run]
    if "error" not in chosen:
        limit = TOLERANCE * chosen["rel_error"]
        usable = [run for run in usable if run["ratio_to_chosen"] >= FASTER and run["rel_error"] <= limit]
    if not usable:
        return f"the table's choice stands: {chosen['provider']}"
    fastest = min(usable, key=lambda run: run["ms"])
    gain = "the table's choice fails" if "error" in chosen else f"{fastest['ratio_to_chosen']:.2f} × as fast"
    return f"better than the table's choice: {fastest['provider']} ({gain})"


def describe(blocks: Blocks) -> str:
    """The blocks as tables show them."""
    return (
        f"{blocks.m} × {blocks.n}, high {blocks.high_n}, {blocks.warps} warps,"
        f" {blocks.stages} + {blocks.high_stages} stages"
    )
