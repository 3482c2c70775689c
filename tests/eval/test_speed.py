"""Speed of whole models: what is timed, in which order, and what becomes of what fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dma_hf_eval import model_shapes, speed
from dma_hf_eval.attention import baseline
from dma_hf_eval.cli import main
from dma_hf_eval.errors import UsageError
from dma_hf_eval.model_shapes import SHAPES, build_model, shape_config
from dma_hf_eval.runs import parse_runs
from dma_hf_eval.speed import Point, attention_timer, default_contexts, measure_point, passes, run_pass
from dma_hf_eval.tables import model_speed_rows
from schema_check import validate
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dma_hf.policy import warn_fallback

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

PUBLISHED_PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-3-12b": 11_766_034_176,  # the text model's, of 12,187,325,040 with the vision tower
    "gpt-oss-20b": 20_914_757_184,
}


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    """A shape as those of public models are, small enough to run."""
    small = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
    llama = SHAPES["llama-3.1-8b"]
    values = {**llama.values, **small, **heads}
    monkeypatch.setitem(SHAPES, "tiny", model_shapes.ModelShape("nowhere", llama.config, values))
    return "tiny"


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_published_number_of_parameters(name: str) -> None:
    model = build_model(name, layers=None, device=torch.device("meta"), dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_PARAMETERS[name]
    assert model.dtype == torch.bfloat16


def test_a_shape_is_cut_from_the_end() -> None:
    config = shape_config("gemma-3-12b", layers=7)
    assert config.layer_types == [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]
    with pytest.raises(UsageError, match="--layers must be from 1 to the 48 of gemma-3-12b, got 49"):
        shape_config("gemma-3-12b", layers=49)


def test_the_baseline_is_sdpa_wherever_transformers_has_it() -> None:
    models = {
        name: build_model(name, layers=1, device=torch.device("meta"), dtype=torch.bfloat16)
        for name in SHAPES
    }
    assert {name: baseline(model) for name, model in models.items()} == {
        **dict.fromkeys(SHAPES, "sdpa"),
        "gpt-oss-20b": "eager",  # sink logits
    }


def test_a_pass_reads_the_prompt_at_once_and_decodes_token_by_token(tiny_model: PreTrainedModel) -> None:
    lengths: list[int] = []
    forward = tiny_model.forward

    def counting(tokens: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        lengths.append(tokens.shape[1])
        return forward(tokens, *arguments, **options)

    tiny_model.forward = counting
    one = run_pass(tiny_model, torch.ones(2, 50, dtype=torch.long), new_tokens=3)
    assert lengths == [50, 1, 1, 1]
    assert one.prefill_seconds > one.attention_seconds > 0
    assert one.decode_seconds > 0


def test_the_attentions_take_turns_and_medians_count(
    tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    seconds = iter([9.0, 9.0, 1.0, 0.5, 3.0, 0.6, 2.0, 0.1])  # SDPA and DMA: warm-up, then three passes
    shares = {"sdpa": 0.5, "dma": 0.25}

    def fake_pass(model: PreTrainedModel, tokens: torch.Tensor, new_tokens: int) -> speed.Pass:
        order.append(model.config._attn_implementation)
        prefill = next(seconds)
        return speed.Pass(prefill, prefill / 2, prefill * shares[order[-1]], peak_bytes=100 + len(order))

    monkeypatch.setattr(speed, "run_pass", fake_pass)
    steps: list[int] = []
    runs = parse_runs(["paper"])
    sdpa, paper = measure_point(tiny_model, runs, Point(64, 2), new_tokens=4, repeats=3, advance=steps.append)
    assert order == ["sdpa", "dma"] * 4
    assert sum(steps) == passes(len(runs), 3)
    assert (sdpa["name"], sdpa["prefill_seconds"], sdpa["prefill_speedup"]) == ("SDPA", 2.0, 1.0)
    assert (paper["name"], paper["prefill_seconds"], paper["prefill_speedup"]) == ("paper", 0.5, 4.0)
    assert paper["prefill_seconds_all"] == [0.5, 0.6, 0.1]
    assert paper["decode_tokens_per_second"] == 2 * 4 / 0.25
    assert paper["peak_bytes"] == 108
    assert (sdpa["attention_share"], paper["attention_share"]) == (0.5, 0.25)
    assert (paper["attention_seconds"], paper["attention_speedup"]) == (0.125, 8.0)
    assert tiny_model.config._attn_implementation == "sdpa"


def test_what_fails_says_so_and_the_rest_goes_on(
    tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_pass = run_pass

    def small_memory(model: PreTrainedModel, tokens: torch.Tensor, new_tokens: int) -> speed.Pass:
        if model.config._attn_implementation == "sdpa":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
        if model.config.dma_config["rotate"]:
            raise NotImplementedError("the model asks for a mask that DMA does not have")
        return whole_pass(model, tokens, new_tokens)

    monkeypatch.setattr(speed, "run_pass", small_memory)
    runs = parse_runs(["low=none,high=none", "paper,rotate=true"])
    sdpa, exact, refused = measure_point(tiny_model, runs, Point(64, 1), new_tokens=2, repeats=1)
    assert sdpa["error"].startswith("out of memory")
    assert sdpa["prefill_seconds"] is None
    assert "error" not in exact
    assert 0 < exact["attention_share"] <= 1
    assert exact["prefill_speedup"] is None  # of what?
    assert refused["error"] == "the model asks for a mask that DMA does not have"
    assert model_speed_rows([sdpa])[0][1:] == ["64", "1", *["–"] * 7]


def test_every_attention_says_what_its_kernels_did_not_serve(
    tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def falls_back(model: PreTrainedModel, tokens: torch.Tensor, new_tokens: int) -> speed.Pass:
        if model.config._attn_implementation == "dma":
            warn_fallback("runs on the reference")  # once in a process, but for every attention here
        return speed.Pass(1.0, 1.0, 0.5, None)

    monkeypatch.setattr(speed, "run_pass", falls_back)
    runs = parse_runs(["paper", "paper,rotate=true"])
    entries = measure_point(tiny_model, runs, Point(64, 1), new_tokens=2, repeats=1)
    assert [entry["notes"] for entry in entries] == [[], *[["runs on the reference"]] * 2]


def test_the_attention_timer_times_every_layer_and_leaves_nothing(tiny_model: PreTrainedModel) -> None:
    with attention_timer(CPU) as seconds:
        assert seconds() == 0
        tiny_model(torch.ones(1, 20, dtype=torch.long))
        first = seconds()
        tiny_model(torch.ones(1, 20, dtype=torch.long))
        assert seconds() > first > 0
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_default_contexts_fit_the_model() -> None:
    assert default_contexts(CPU, None, 32) == [512, 1024, 2048]
    assert default_contexts(CPU, 2048, 32) == [512, 1024]
    assert default_contexts(CUDA, 131_072, 32) == [1024, 8192, 32_768]
    assert default_contexts(CUDA, 512, 32) == [480]
    with pytest.raises(UsageError, match="--new-tokens 600 leaves no room in the model's context of 512"):
        default_contexts(CUDA, 512, 600)


def test_the_command_writes_what_its_schema_says(
    tiny_shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        f"speed --shape {tiny_shape} --layers 2 --context 40,20 --batch 1,2 --new-tokens 2 --repeats 1"
    )
    assert main([*arguments.split(), "--config", "paper", "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    validate(content, "speed")
    assert (content["weights"], content["layers"], content["full_layers"]) == ("random", 2, 3)
    points = [(run["name"], run["context"], run["batch"]) for run in content["runs"]]
    assert points == [(n, c, b) for c in (20, 40) for b in (1, 2) for n in ("SDPA", "paper")]
    out = capsys.readouterr().out
    assert "tiny cut to 2 of 3 layers, random weights, float32" in out
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]


def test_a_killed_run_continues(tiny_shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = f"speed --shape {tiny_shape} --context 20,40 --new-tokens 2 --repeats 1 --output {tmp_path}"
    measured: list[int] = []

    def once(model: PreTrainedModel, runs: Any, point: Point, **options: Any) -> list[dict[str, Any]]:
        if measured == [20]:
            measured.append(0)
            raise KeyboardInterrupt
        measured.append(point.context)
        return measure_point(model, runs, point, **options)

    monkeypatch.setattr(speed, "measure_point", once)
    assert main(arguments.split()) == 130
    assert main(arguments.split()) == 0
    assert measured == [20, 0, 40]
    content = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert [run["context"] for run in content["runs"]] == [20] * 3 + [40] * 3


def test_what_a_killed_run_measured_can_be_written_without_the_rest(
    tiny_shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["speed", "--shape", tiny_shape, "--new-tokens", "2", "--repeats", "1"]

    def until_the_second(model: PreTrainedModel, runs: Any, point: Point, **options: Any) -> Any:
        if point.context == 40:
            raise KeyboardInterrupt
        return measure_point(model, runs, point, **options)

    monkeypatch.setattr(speed, "measure_point", until_the_second)
    assert main([*arguments, "--context", "20,40", "--output", str(tmp_path)]) == 130
    monkeypatch.setattr(speed, "measure_point", None)  # calling it would fail
    assert main([*arguments, "--context", "20", "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert {run["context"] for run in content["runs"]} == {20}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--shape llama-4", "--shape must be one of llama-3.1-8b, qwen3-8b"),
        ("--shape qwen3-8b --model gpt2", "--shape is instead of --model"),
        ("--layers 2", "--layers cuts a --shape"),
        ("--context 4096 --new-tokens 32", "are 4128 tokens, and the model's context is 4096"),
        ("--context 1k", "must be a whole number of at least 1, got '1k'"),
        ("--config low=fp3", "--config 'low=fp3'"),
    ],
)
def test_mistakes_are_one_line(arguments: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_nothing_measured_is_an_error(tiny_shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(speed, "run_pass", fail)
    assert main(["speed", "--shape", tiny_shape, "--context", "20"]) == 1


def test_neither_datasets_nor_lm_eval_is_needed(tiny_folder: Path) -> None:
    arguments = ["speed", "--model", str(tiny_folder), "--context", "20", "--repeats", "1"]
    program = (
        "import sys; sys.modules.update(datasets=None, lm_eval=None)\n"
        f"from dma_hf_eval.cli import main; sys.exit(main({arguments!r}))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_and_attention_are_measured_on_a_gpu(tiny_shape: str) -> None:
    model = build_model(tiny_shape, layers=None, device=CUDA, dtype=torch.bfloat16)
    assert all(parameter.device.type == "cuda" for parameter in model.parameters())
    for run in measure_point(model, parse_runs(["paper"]), Point(512, 2), new_tokens=4, repeats=2):
        assert "error" not in run
        assert run["peak_bytes"] > sum(p.nbytes for p in model.parameters())
        assert 0 < run["attention_share"] <= 1
