"""The command line: results, tables, and one line for everything that can be asked wrongly."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import dma_hf_eval.perplexity
import dma_hf_eval.recall_by_distance
import pytest
import torch
from dma_hf_eval import commands
from dma_hf_eval.attention import attention
from dma_hf_eval.cli import main
from dma_hf_eval.journal import Journal
from schema_check import validate
from transformers import PreTrainedModel

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
    validate(content, "perplexity")
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["perplexity.json"]
    assert content["environment"]["command"].startswith("dma-eval perplexity --model")
    assert content["model"] == str(tiny_folder)
    assert content["corpora"] == [{"name": str(text_path), "tokens": 600}]
    assert (content["context"], content["stride"]) == (256, 128)
    assert content["recall"] == {"passage": 64, "distance": 192, "samples": 4}
    runs = content["runs"]
    assert [run["name"] for run in runs] == ["SDPA", *configs]
    assert [run["config"] for run in runs] == [None, *(DMAConfig.parse(text).to_dict() for text in configs)]
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
    validate(content, "recall")
    assert (content["schema"], content["distances"], content["passage"]) == (1, [100, 300], 100)
    assert [run["name"] for run in content["runs"]] == ["SDPA", "paper"]
    for run in content["runs"]:
        assert run["passkey_accuracy"].keys() == run["second_copy_perplexity"].keys() == {"100", "300"}
    assert "second copy" in capsys.readouterr().out


# What is asked, and what the one line on stderr must say. {tiny}: a model; {text}: 3,000 tokens.
MISTAKES = [
    ("perplexity --model {tmp}/missing", "cannot load model '{tmp}/missing': no such folder"),
    ("perplexity --text {tmp}/missing", "cannot read --text '{tmp}/missing': No such file or directory"),
    ("perplexity --text {text} --text {text}", "the text '{text}' is given twice"),
    ("perplexity --dataset no-org/no-data", "it is not in the local cache"),
    ("perplexity --dataset {tmp}/missing", "cannot load --dataset '{tmp}/missing': Couldn't find any data"),
    ("recall --text {text} --dataset wikitext", "not allowed with argument --text"),
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

    monkeypatch.setattr(commands.perplexity, "run", interrupt)
    assert main(["perplexity"]) == 130
    assert capsys.readouterr().err == "dma-eval: interrupted\n"


def test_several_texts_go_into_one_file(tiny_folder: Path, text_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Another text, with other words. " * 30, encoding="utf-8")
    arguments = ["perplexity", "--model", str(tiny_folder), "--text", str(text_path), "--text", str(other)]
    arguments += ["--context", "256", "--max-tokens", "500", "--config", "paper", "--output", str(tmp_path)]
    assert main(arguments) == 0
    content = json.loads((tmp_path / "perplexity.json").read_text(encoding="utf-8"))
    validate(content, "perplexity")
    assert [corpus["name"] for corpus in content["corpora"]] == [str(text_path), str(other)]
    assert [(run["data"], run["name"]) for run in content["runs"]] == [
        (str(path), name) for path in (text_path, other) for name in ("SDPA", "paper")
    ]


COMMANDS = {
    "perplexity": ["perplexity", "--context", "128", "--max-tokens", "512"],
    "recall": ["recall", "--distances", "100,300", "--samples", "2"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupted_command_continues(
    name: str,
    tiny_folder: Path,
    text_path: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [*COMMANDS[name], "--model", str(tiny_folder), "--text", str(text_path), "--config", "paper"]
    arguments += ["--output", str(tmp_path / "results")]
    put = Journal.put
    written: list[object] = []

    def interrupted_at_the_third(journal: Journal, value: object, **piece: object) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(value)
        put(journal, value, **piece)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "put", interrupted_at_the_third)
        assert main(arguments) == 130
    assert capsys.readouterr().err == "dma-eval: interrupted; the same command continues here\n"
    assert [path.suffix for path in (tmp_path / "results").iterdir()] == [".partial"]

    monkeypatch.setattr(Journal, "put", lambda *args, **piece: (written.append(piece), put(*args, **piece)))
    assert main(arguments) == 0
    assert "continues an interrupted run: 3 pieces" in capsys.readouterr().err
    pieces = 2 * (7 + 1) if name == "perplexity" else 2 * 2 * 2
    assert len(written) == pieces  # none was measured twice
    assert [path.name for path in (tmp_path / "results").iterdir()] == [f"{name}.json"]
    validate(json.loads((tmp_path / "results" / f"{name}.json").read_text(encoding="utf-8")), name)


def test_a_config_that_fails_is_one_line_and_the_others_are_written(
    tiny_folder: Path, text_path: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def switch(model: PreTrainedModel, config: DMAConfig | None) -> AbstractContextManager[PreTrainedModel]:
        if config is not None and config.low == "mxfp4":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
        return attention(model, config)

    for module in (dma_hf_eval.perplexity, dma_hf_eval.recall_by_distance):
        monkeypatch.setattr(module, "attention", switch)
    for name, command in COMMANDS.items():
        arguments = [*command, "--model", str(tiny_folder), "--text", str(text_path)]
        arguments += ["--output", str(tmp_path), "--config", "low=mxfp4", "--config", "paper"]
        assert main(arguments) == 1
        first, last = capsys.readouterr().err.splitlines()
        assert first.startswith("dma-eval: 'low=mxfp4' failed, the others go on: out of memory")
        assert last == "dma-eval: the results lack 'low=mxfp4', which failed"
        content = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        validate(content, name)
        assert [run["name"] for run in content["runs"]] == ["SDPA", "paper"]
        assert [run["name"] for run in content["failed"]] == ["low=mxfp4"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "/tmp/x"), "no space left on the disk for '/tmp/x'"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory (try a smaller --context"),
        (MemoryError(), "out of memory (try a smaller --context"),
    ],
)
def test_what_ends_a_command_is_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(commands.perplexity, "run", fail)
    assert main(["perplexity"]) == 1
    captured = capsys.readouterr().err
    assert captured.startswith(f"dma-eval: {line}")
    assert captured.count("\n") == 1


def test_other_errors_are_bugs_and_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(commands.perplexity, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["perplexity"])


def test_help_needs_no_torch() -> None:
    program = "import sys; from dma_hf_eval.cli import main; main(sys.argv[1:])"
    check = "import atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))"
    for command in (
        [],
        *([module.__name__.rsplit(".", 1)[1].replace("_", "-")] for module in commands.MODULES),
    ):
        arguments = [sys.executable, "-c", f"import sys; {check}; {program}", *command, "--help"]
        assert subprocess.run(arguments, capture_output=True, text=True).stderr == "False\n"


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    assert main(["perplexity", "--dataset", "wikitext"]) == 2
    assert capsys.readouterr().err == "dma-eval: needs the package 'datasets': pip install 'dma-hf[eval]'\n"


def test_help_teaches(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
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
