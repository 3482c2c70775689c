"""``dma-eval kernels --tune`` on a CPU: what is measured for the table of block sizes, and the verdict.

Times here are invented, and kernels are interpreted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dma_hf_eval import kernel_timing, kernel_tuning
from dma_hf_eval.cli import main
from dma_hf_eval.errors import UsageError
from dma_hf_eval.kernel_tuning import Cell, measure_cell, tuning_cells, verdict
from dma_hf_eval.kernels import plan_tuning
from schema_check import validate

from dma_hf.tuning import CANDIDATES, Blocks, table_blocks

Capture = pytest.CaptureFixture[str]

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="on a CPU kernels run interpreted, which is off where there is a GPU",
    ),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # NumPy's, in the interpreter
]


class InventedMeter:
    """Runs every call once, and hands out the given times in turn."""

    device = torch.device("cpu")

    def __init__(self, *times: float) -> None:
        self.times = iter(times)

    def milliseconds(self, call: Callable[[], Any]) -> float:
        call()
        return next(self.times, 1.0)

    def extra_bytes(self, call: Callable[[], Any]) -> int:
        return 0

    def works(self) -> bool:
        return True


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes that the interpreter computes in no time, and two candidates."""
    monkeypatch.setattr(kernel_tuning, "TUNING_SIZE", (1, 160))
    monkeypatch.setattr(kernel_tuning, "HEADS", 2)
    monkeypatch.setattr(kernel_tuning, "KV_HEADS", 1)
    monkeypatch.setattr(kernel_tuning, "CANDIDATES", (Blocks(128, 128, 64, 4, 1), Blocks(128, 64, 128, 8, 2)))


def test_hopper_has_a_cell_for_each_kind_of_operands_it_multiplies() -> None:
    cells = tuning_cells(90)
    assert [(cell.head_dim, cell.operands) for cell in cells[:4]] == [
        (64, "8bit_pv"),
        (64, "8bit"),
        (64, "raw"),
        (64, "16bit"),
    ]
    assert {cell.head_dim for cell in cells} == {64, 128, 256}
    assert len(cells) == 3 * 4
    assert str(cells[0].shape) == "1 × 16,384 tokens, 32 / 8 heads, head dimension 64, causal"


def test_other_hardware_has_the_cells_that_it_uses() -> None:
    assert {cell.operands: cell.config for cell in tuning_cells(100, [128])} == {
        "8bit_pv": "low=fp8,high=none,pv=fp8",
        "8bit": "low=fp8,high=none",
        "16bit": "low=int8,high=none",  # no INT8 tensor cores there
        "raw": "low=none,high=none",
        "scaled": "paper",
    }
    # no FP8 on Ampere, neither for K nor for V
    assert {cell.operands: cell.config for cell in tuning_cells(80, [128])} == {
        "16bit": "low=fp8,high=none",
        "8bit": "low=int8,high=none",
        "raw": "low=none,high=none",
    }


def test_the_tables_choice_is_measured_first_and_nothing_twice() -> None:
    cell = Cell(90, 128, "8bit", "low=fp8,high=none")
    assert cell.candidates[0] == table_blocks(90, 128, "8bit")
    assert set(cell.candidates) == {cell.chosen, *CANDIDATES}
    assert len(cell.candidates) == len(set(cell.candidates))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("operands", ["8bit_pv", "8bit", "raw", "16bit"])
def test_candidates_compute_the_same_in_their_times(operands: str) -> None:
    (cell,) = (cell for cell in tuning_cells(90, [64]) if cell.operands == operands)
    steps: list[int] = []
    table, slower, faster = measure_cell(cell, InventedMeter(2.0, 4.0, 1.0), steps.append)
    assert sum(steps) == len(cell.candidates) == 3
    assert [run["ratio_to_chosen"] for run in (table, slower, faster)] == [1.0, 0.5, 2.0]
    assert table["blocks"] == {"m": cell.chosen.m, "n": cell.chosen.n} | {
        name: getattr(cell.chosen, name) for name in ("high_n", "warps", "stages", "high_stages")
    }
    assert faster["provider"] == "128 × 64, high 128, 8 warps, 2 + 2 stages"
    assert slower["rel_error"] == pytest.approx(table["rel_error"], rel=0.05)
    assert "error" not in {**table, **slower, **faster}


def entry(name: str, ms: float | None, table_ms: float | None = 2.0, **changes: Any) -> dict[str, Any]:
    ratio = None if ms is None or table_ms is None else table_ms / ms
    return {"provider": name, "ms": ms, "rel_error": 0.01, "ratio_to_chosen": ratio, **changes}


def test_the_tables_choice_stands_within_the_noise() -> None:
    assert verdict([entry("A", 2.0), entry("B", 1.98)]) == "the table's choice stands: A"


def test_what_is_clearly_faster_is_named() -> None:
    runs = [entry("A", 2.0), entry("B", 1.8), entry("C", 1.6), entry("D", None, error="out of resources")]
    assert verdict(runs) == "better than the table's choice: C (1.25 × as fast)"


def test_what_is_less_exact_is_not() -> None:
    assert verdict([entry("A", 2.0), entry("B", 1.0, rel_error=0.5)]) == "the table's choice stands: A"


def test_where_the_tables_choice_fails_the_fastest_is_named() -> None:
    runs = [entry("A", None, error="out of resources"), entry("B", 1.8, None), entry("C", 1.6, None)]
    assert verdict(runs) == "better than the table's choice: C (the table's choice fails)"


@pytest.mark.usefixtures("small")
def test_the_command_shows_every_choice_and_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(kernel_tuning, "TUNING_CONFIGS", ("low=none,high=none", "low=fp8,high=none"))
    # in the first cell the table's choice in 2 ms, then one candidate in 4, the other in 1
    monkeypatch.setattr(kernel_timing, "CudaMeter", lambda: InventedMeter(2.0, 4.0, 1.0))
    assert main(["kernels", "--tune", "--head-dim", "32", "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "kernels_tune.json").read_text(encoding="utf-8"))
    validate(content, "kernels")
    assert content["suite"] == "tune"
    assert [run["shape"]["operands"] for run in content["runs"]] == [
        operands for operands in ("raw", "8bit") for _ in range(3)
    ]
    out = capsys.readouterr().out
    assert "operands raw: 1 × 160 tokens, 2 / 1 heads, head dimension 32, causal" in out
    assert "better than the table's choice: 128 × 64, high 128, 8 warps, 2 + 2 stages (2.00 × as fast)" in out
    assert "the table's choice stands: 64 × 128, high 64, 4 warps, 2 + 2 stages" in out
    assert "× table's" in out


def test_a_head_dimension_that_no_kernel_serves_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--head-dim 512: the kernels take multiples of 8 from 16 to 256"):
        plan_tuning(90, [64, 512])


@pytest.mark.parametrize(
    ("arguments", "option"),
    [("--suite tiles", "suite"), ("--quick", "quick"), ("--config paper --lengths 64", "config")],
)
def test_what_belongs_to_a_suite_does_not_go_with_it(arguments: str, option: str, capsys: Capture) -> None:
    assert main(["kernels", "--tune", *arguments.split()]) == 2
    expected = f"dma-eval: --tune measures no suite: it does not go with --{option}\n"
    assert capsys.readouterr().err == expected
