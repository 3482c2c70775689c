"""dma against SDPA on a sample of all model types, and what the comparison and its processes notice."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from dma_hf_eval import models
from dma_hf_eval.cli import main
from dma_hf_eval.isolated import Lost, run_isolated
from dma_hf_eval.journal import Journal
from dma_hf_eval.models import (
    LOCKSTEP_TOLERANCE,
    SAMPLE,
    TELLING_EFFECT,
    TOLERANCE,
    check,
    counts,
    largest_difference,
    sweep,
)
from schema_check import validate
from torch import Tensor

from dma_hf import plugin

Capture = pytest.CaptureFixture[str]

GENERATE = {
    "llama",
    "gemma2",
    "gemma3_text",
    "llama4_text",
    "gpt_oss",
    "deepseek_v3",
    "jamba",
    "bart",
    "whisper",
}
"""Types of which a comparison without generate() would be half a comparison."""


@pytest.fixture(scope="module")
def sampled() -> dict[str, dict[str, Any]]:
    """The sample, checked."""
    return {entry["model_type"]: entry for entry in sweep(SAMPLE, jobs=2)}


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_model_type_runs_as_dma_and_gives_what_sdpa_gives(
    sampled: dict[str, dict[str, Any]], model_type: str
) -> None:
    entry = sampled[model_type]
    assert (entry["outcome"], entry["why"]) == ("kernel", None)
    assert entry["kernel_calls"] > entry["sdpa_calls"] == 0
    assert entry["max_error"] <= TOLERANCE
    assert entry["effect"] > 100 * TOLERANCE, "the outputs do not depend on attention"
    assert entry["checked"][0] == "forward"
    assert model_type not in GENERATE or entry["checked"][-1] == "generate"


def test_an_error_of_one_percent_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = plugin.attend
    monkeypatch.setattr(plugin, "attend", lambda *a, **named: attend(*a, **named) * 1.01)
    entry = check("llama")
    assert entry["outcome"] == "wrong"
    assert entry["max_error"] > TOLERANCE
    assert entry["why"].startswith("an output differs by ")


def test_outputs_that_amplify_rounding_are_judged_in_lockstep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "TOLERANCE", 1e-9)  # as if Llama made this much of one rounding
    entry = check("llama")
    assert entry["outcome"] == "kernel"
    assert 1e-9 < entry["max_error"] <= TOLERANCE
    assert 0 < entry["lockstep_error"] <= LOCKSTEP_TOLERANCE
    assert entry["why"].startswith("an output differs by ")
    assert "; in lockstep with SDPA, the attention by " in entry["why"]


def test_outputs_that_hardly_depend_on_attention_are_judged_in_lockstep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attend = plugin.attend
    monkeypatch.setattr(plugin, "attend", lambda *a, **named: attend(*a, **named) * 1.01)
    entry = check("lw_detr_vit")
    assert entry["max_error"] <= TOLERANCE, "the outputs notice nothing"
    assert entry["effect"] < TELLING_EFFECT
    assert entry["lockstep_error"] > LOCKSTEP_TOLERANCE
    assert entry["outcome"] == "wrong"


def test_an_error_that_dma_raises_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise NotImplementedError("not today")

    monkeypatch.setattr(plugin, "attend", refuse)
    entry = check("llama")
    assert (entry["outcome"], entry["why"]) == ("refused", "NotImplementedError: not today")


def test_a_model_without_attention_is_none_of_them() -> None:
    entry = check("resnet")
    assert entry["outcome"] == "no attention"
    assert entry["kernel_calls"] == entry["sdpa_calls"] == 0


def test_padding_is_not_compared() -> None:
    mask = torch.tensor([[0, 1], [1, 1]])
    left, right = torch.zeros(2, 2, 3), torch.zeros(2, 2, 3)
    right[0, 0] = 7
    assert largest_difference({"x": left}, {"x": right}, {"attention_mask": mask}) == 0
    assert largest_difference({"x": left}, {"x": right}, {}) == 7


def test_padding_is_not_compared_where_the_model_appends_a_token() -> None:
    mask = torch.tensor([[0, 1], [1, 1]])
    left, right = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    right[0, 0] = 7
    assert largest_difference({"x": left}, {"x": right}, {"attention_mask": mask}) == 0
    right[0, 2] = 5
    assert largest_difference({"x": left}, {"x": right}, {"attention_mask": mask}) == 5


def test_large_outputs_are_compared_relatively_and_what_is_missing_is_infinitely_wrong() -> None:
    large = torch.full((4,), 1000.0)
    assert largest_difference({"x": large}, {"x": large + 1}, {}) == pytest.approx(1e-3)
    assert largest_difference({"x": large}, {}, {}) == float("inf")
    assert largest_difference({"x": large}, {"x": large[:2]}, {}) == float("inf")
    assert largest_difference({"x": large}, {"x": large * float("nan")}, {}) == float("inf")


def test_counts_name_every_outcome() -> None:
    found = counts([{"outcome": "kernel"}, {"outcome": "kernel"}, {"outcome": "sdpa"}])
    assert found == {"kernel": 2, "sdpa": 1, "no attention": 0, "refused": 0, "wrong": 0, "not built": 0}


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, "models")
    finished = {"model_type": "llama", "outcome": "kernel"}
    journal.put(finished, model_type="llama")
    started: list[str] = []

    def isolated(_: Any, items: list[str], **__: Any) -> Any:
        started.extend(items)
        return ((item, Lost("gone", 1.0)) for item in items)

    monkeypatch.setattr(models, "run_isolated", isolated)
    steps: list[int] = []
    entries = sweep(["llama", "t5"], journal=journal, advance=steps.append)
    assert started == ["t5"]
    assert entries[0] == finished
    assert (entries[1]["outcome"], entries[1]["why"]) == ("not built", "gone")
    assert steps == [1, 1]
    assert journal.get(model_type="t5") == entries[1]


def end(how: str) -> str:
    """A process that ends as it is told."""
    if how == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(60)
    if how == "raise":
        raise ValueError("no")
    return how.upper()


def test_a_crash_and_a_hang_cost_one_item_each() -> None:
    ends = ("crash", "hang", "raise", "fine")
    results = dict(run_isolated(end, ends, jobs=4, timeout=10.0))
    assert results["fine"] == "FINE"
    assert results["crash"].why == "its process was killed by signal 9"
    assert results["hang"].why == "took longer than 10 s"
    assert results["raise"].why == "ValueError: no (end)"


def test_the_command_writes_what_its_schema_says(tmp_path: Path, capsys: Capture) -> None:
    assert main(["models", "--types", "llama,resnet", "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "models.json").read_text(encoding="utf-8"))
    validate(content, "models")
    assert [run["outcome"] for run in content["runs"]] == ["kernel", "no attention"]
    assert content["counts"]["kernel"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["models.json"]
    out = capsys.readouterr().out
    assert "LlamaForCausalLM" in out
    assert "ResNet" in out


def test_an_unknown_type_is_named(capsys: Capture) -> None:
    assert main(["models", "--types", "llama,lama"]) == 2
    assert "--types: the installed Transformers has no model type 'lama'" in capsys.readouterr().err
