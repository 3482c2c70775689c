"""The command line: results, tables, and one line for everything that can be asked wrongly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dma_hf_eval import cli
from dma_hf_eval.cli import main

import dma_hf
from dma_hf import DMAConfig

Capture = pytest.CaptureFixture[str]


def test_perplexity_prints_a_table_and_writes_json(
    tiny_folder: Path, text_path: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = ["perplexity", "--model", str(tiny_folder), "--text", str(text_path), "--context", "256"]
    arguments += ["--max-tokens", "600", "--output", str(tmp_path / "results")]
    configs = ["paper", "low=none,high=none"]
    assert main([*arguments, *(part for config in configs for part in ("--config", config))]) == 0

    content = json.loads((tmp_path / "results" / "perplexity.json").read_text(encoding="utf-8"))
    runs = content.pop("runs")
    assert content.pop("environment")["command"].startswith("dma-eval perplexity --model")
    assert content == {
        "schema": 1,
        "model": str(tiny_folder),
        "data": str(text_path),
        "context": 256,
        "stride": 128,
        "tokens": 600,
        "recall": {"passage": 64, "distance": 192, "samples": 4},
    }
    assert [run["name"] for run in runs] == ["SDPA", *configs]
    assert [run["config"] for run in runs] == [None, *(DMAConfig.parse(text).to_dict() for text in configs)]
    numbers = {"perplexity", "delta_percent", "kl_mean", "top1_agreement", "recall_perplexity", "seconds"}
    for run in runs:
        assert run.keys() == {"name", "config", *numbers}
        assert all(isinstance(run[name], float) for name in numbers)
    assert runs[2]["perplexity"] == pytest.approx(runs[0]["perplexity"], rel=1e-5)
    assert runs[1]["kl_mean"] > runs[2]["kl_mean"]

    out = capsys.readouterr().out
    assert all(name in out for name in ("SDPA", *configs, "SDPA‖DMA", "perplexity.json"))


def test_recall_prints_a_table_and_writes_json(
    tiny_folder: Path, text_path: Path, tmp_path: Path, capsys: Capture
) -> None:
    arguments = ["recall", "--model", str(tiny_folder), "--text", str(text_path), "--output", str(tmp_path)]
    assert main([*arguments, "--distances", "300,100", "--samples", "1"]) == 0
    content: dict[str, Any] = json.loads((tmp_path / "recall.json").read_text(encoding="utf-8"))
    assert (content["schema"], content["distances"], content["passage"]) == (1, [100, 300], 100)
    assert [run["name"] for run in content["runs"]] == ["SDPA", "paper"]
    for run in content["runs"]:
        assert run["passkey_accuracy"].keys() == run["second_copy_perplexity"].keys() == {"100", "300"}
    assert "second copy" in capsys.readouterr().out


# What is asked, and what the one line on stderr must say. {tiny}: a model; {text}: 3,000 tokens.
MISTAKES = [
    ("perplexity --model {tmp}/missing", "cannot load model '{tmp}/missing': no such folder"),
    ("perplexity --text {tmp}/missing", "cannot read --text '{tmp}/missing': No such file or directory"),
    ("perplexity --text {text} --dataset wikitext", "not allowed with argument --text"),
    ("perplexity --model {tiny} --context 1025", "longer than the model's context of 1024 tokens"),
    ("perplexity --model {tiny} --context 15", "--context must be at least 16 tokens, got 15"),
    ("perplexity --model {tiny} --context 100 --stride 101", "--stride 101 is longer than the context"),
    (
        "perplexity --model {tiny} --text {text} --max-tokens 9",
        "has 9 tokens to score, fewer than one window",
    ),
    ("perplexity --config low=mxfp3", "--config 'low=mxfp3': low='mxfp3' is not a format"),
    ("perplexity --device tpu", "--device must be cpu, cuda or cuda:N, got 'tpu'"),
    ("perplexity --dtype int4", "--dtype must be one of float32, bfloat16, float16, got 'int4'"),
    ("perplexity --max-tokens 0", "must be a whole number of at least 1, got '0'"),
    ("perplexity --output {text}/results", "cannot make the folder --output"),
    ("recall --model {tiny} --distances 1000", "1000 does not fit the model's context of 1024 tokens"),
    ("recall --distances far", "must be a whole number of at least 1, got 'far'"),
    ("perplexities", "invalid choice: 'perplexities'"),
]


@pytest.mark.parametrize(("command", "complaint"), MISTAKES)
def test_mistakes_are_one_line(
    command: str, complaint: str, tiny_folder: Path, text_path: Path, tmp_path: Path, capsys: Capture
) -> None:
    places = {"tiny": tiny_folder, "text": text_path, "tmp": tmp_path}
    assert main(command.format(**places).split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dma-eval: ")
    assert captured.err.count("\n") == 1
    assert complaint.format(**places) in captured.err


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_perplexity", interrupt)
    assert main(["perplexity"]) == 130
    assert capsys.readouterr().err == "dma-eval: interrupted\n"


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    assert main(["perplexity", "--dataset", "wikitext"]) == 2
    assert capsys.readouterr().err == "dma-eval: needs the package 'datasets': pip install 'dma-hf[eval]'\n"


def test_help_teaches(capsys: Capture) -> None:
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert "perplexity" in overview
    assert "examples:" in overview
    with pytest.raises(SystemExit) as exit_status:
        main(["perplexity", "--help"])
    assert exit_status.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("scored exactly once", "--config", "low=mxfp4,diagonal=256"))


@pytest.mark.parametrize("module", ["eval", "dma_hf_eval"])
def test_the_module_is_the_command(module: str) -> None:
    checkout = Path(__file__).parents[2]
    command = [sys.executable, "-m", module]
    version = subprocess.run([*command, "--version"], cwd=checkout, capture_output=True, text=True)
    assert (version.returncode, version.stdout) == (0, f"dma-eval {dma_hf.__version__}\n")
    mistake = subprocess.run([*command, "--bogus"], cwd=checkout, capture_output=True, text=True)
    assert mistake.returncode == 2
    assert mistake.stderr.count("\n") == 1
