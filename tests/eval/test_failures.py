"""A run that fails is one line, and the others go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dma_hf_eval.errors import EvalError, UsageError
from dma_hf_eval.failures import Failures, reason
from dma_hf_eval.journal import Journal
from dma_hf_eval.pieces import Pieces
from dma_hf_eval.runs import SDPA, parse_runs

PAPER, MXFP4 = parse_runs(["paper", "low=mxfp4"])[1:]

REASONS = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nand so on"), "out of memory (try"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory (try"),
    (EvalError("the logits are not finite"), "the logits are not finite"),
    (NotImplementedError("attention with a softcap\nmore"), "attention with a softcap"),
    (KeyError("x"), "KeyError: 'x'"),
]


@pytest.mark.parametrize(("error", "text"), REASONS)
def test_a_reason_is_one_line(error: Exception, text: str) -> None:
    assert reason(error).startswith(text)
    assert "\n" not in reason(error)


def test_a_failure_is_reported_and_the_next_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    failures = Failures()
    done = []
    for run in (SDPA, PAPER, MXFP4):
        with failures.catch(run):
            if run is PAPER:
                raise UsageError("DMA refuses this")
            done.append(run.name)
    assert done == ["SDPA", "low=mxfp4"]
    assert PAPER in failures
    assert MXFP4 not in failures
    assert capsys.readouterr().err == "dma-eval: 'paper' failed, the others go on: DMA refuses this\n"
    assert failures.describe() == [{**PAPER.describe(), "error": "DMA refuses this"}]
    with pytest.raises(EvalError, match="the results lack 'paper', which failed") as raised:
        failures.raise_any()
    assert raised.value.exit_status == UsageError.exit_status


def test_without_sdpa_nothing_goes_on() -> None:
    with pytest.raises(MemoryError), Failures().catch(SDPA):
        raise MemoryError


def test_nothing_failed_nothing_raised() -> None:
    failures = Failures()
    failures.raise_any()
    assert failures.describe() == []


def test_an_interrupt_is_no_failure_of_a_run() -> None:
    with pytest.raises(KeyboardInterrupt), Failures().catch(PAPER):
        raise KeyboardInterrupt


def test_a_failed_run_is_not_tried_again_but_still_counts_as_progress(tmp_path: Path) -> None:
    steps: list[int] = []
    pieces = Pieces(Journal(tmp_path, "x"), Failures(), steps.append)

    def fail() -> float:
        raise torch.OutOfMemoryError("too much")

    assert pieces.measure(PAPER, fail, steps=3, window=1) is None
    assert pieces.measure(PAPER, lambda: 1.0, steps=3, window=2) is None
    assert pieces.measure(MXFP4, lambda: 2.0, window=1) == 2.0
    assert steps == [3, 3, 1]
    # A later process tries the failed run again, and takes the other's piece as it is.
    later = Pieces(Journal(tmp_path, "x"), Failures())
    assert later.measure(PAPER, lambda: 3.0, window=1) == 3.0
    assert later.measure(MXFP4, fail, window=1) == 2.0
