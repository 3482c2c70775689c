"""The guided run: its steps are ordinary commands, and it ends with a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dma_hf_eval.cli import DEFAULT_COMMAND, main, parse
from dma_hf_eval.commands import perplexity, quick, recall
from dma_hf_eval.errors import EvalError
from schema_check import validate

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def arguments(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A guided run on the tiny model, as much as its context holds (the bundled tasks need more)."""
    steps = {
        "perplexity": ("how far?", "--context 256 --max-tokens 512"),
        "recall": ("what is found?", "--distances 100,300 --samples 1"),
    }
    monkeypatch.setattr(quick, "STEPS", steps)
    return [*DEFAULT_COMMAND, "--model", str(tiny_folder), "--output", str(tmp_path / "results")]


def test_every_step_is_a_command_line_that_exists() -> None:
    options = parse(["quick", "--model", "org/model", "--device", "cpu", "--dtype", "float32"])
    for name in quick.STEPS:
        step = parse(quick._command_line(name, options))
        assert (step.command, step.model, step.device, step.dtype) == (name, "org/model", "cpu", "float32")
        assert (step.config, step.output) == (list(quick.CONFIGS), quick.DEFAULT_OUTPUT)
        assert step.trust_remote_code is False


def test_it_explains_measures_and_reports(arguments: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "results"
    for text in (
        "[1/3] how far?",
        "$ dma-eval perplexity --config auto --config paper",
        "[2/3]",
        "[3/3] report",
        "Verdict: ",
    ):
        assert text in out
    assert f"Report:  {folder / 'report.html'}" in out
    assert sorted(path.name for path in folder.iterdir()) == [
        "perplexity.json",
        "recall.json",
        "report.html",
        "report.md",
    ]
    for name in ("perplexity", "recall"):
        content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        validate(content, name)
        assert content["environment"]["command"].startswith(f"dma-eval {name} --config auto --config paper")


def test_after_an_interruption_finished_steps_are_not_repeated(
    arguments: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recall, "run", interrupt)
        assert main(arguments) == 130
    assert "the same command continues here" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(perplexity, "run", interrupt)
        assert main(arguments) == 0
    assert "done before the interruption" in capsys.readouterr().out


def test_a_step_that_fails_does_not_keep_the_others_from_the_report(
    arguments: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise EvalError("out of luck")

    monkeypatch.setattr(perplexity, "run", fail)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[0] == "dma-eval: out of luck; the other steps go on"
    assert "Report: " in captured.out
    assert (tmp_path / "results" / "recall.json").is_file()


def test_a_model_that_is_not_there_ends_it_at_once(tmp_path: Path, capsys: Capture) -> None:
    missing = str(tmp_path / "missing")
    assert main(["quick", "--model", missing, "--output", str(tmp_path / "results")]) == 2
    assert capsys.readouterr().err == f"dma-eval: cannot load model '{missing}': no such folder\n"
