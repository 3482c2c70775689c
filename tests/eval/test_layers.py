"""The error of attention by layer and head, on random tensors and on a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dma_hf_eval import layers
from dma_hf_eval.cli import main
from dma_hf_eval.errors import UsageError
from dma_hf_eval.failures import Failures
from dma_hf_eval.journal import Journal
from dma_hf_eval.layer_plots import draw_layer_heatmaps
from dma_hf_eval.layers import LayerErrors, compare_layers, exact_attention, heads_by_error
from dma_hf_eval.runs import Run, parse_runs
from dma_hf_eval.windows import spaced_windows
from schema_check import validate
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from dma_hf import DMAConfig
from dma_hf.precision_map import precision_map


def qkv(heads: int, kv_heads: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, length, 16), (kv_heads, length, 16), (kv_heads, length, 24))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return 3 * query, key, value


def compare(
    model: PreTrainedModel,
    tokens: Tensor,
    runs: Sequence[Run],
    *,
    windows: int = 1,
    **options: Any,
) -> list[LayerErrors]:
    options.setdefault("failures", Failures())
    return compare_layers(model, tokens, runs, spaced_windows(700, context=300, count=windows), **options)


@pytest.mark.parametrize("chunk", [1, 1 << 26])
def test_exact_attention_is_sdpas_in_float32(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "CHUNK_ELEMENTS", chunk)
    query, key, value = qkv(6, 2, 300)
    out = torch.full((6, 300, 24), torch.nan)
    for rows in exact_attention(query, key, value, scale=0.2, configs=[]):
        out[rows.heads, rows.queries] = rows.output
    expected = scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=True, scale=0.2, enable_gqa=True
    )
    torch.testing.assert_close(out, expected[0])


def test_high_mass_is_the_probability_in_the_tiles_of_the_map() -> None:
    query, key, value = qkv(4, 2, 300)
    configs = [
        DMAConfig(tile=32, diagonal=64, sink=32),
        DMAConfig(tile=64, diagonal=64, sink=0),
        DMAConfig(diagonal=0, sink=0),
    ]
    mass = torch.zeros(4, 4)
    for rows in exact_attention(query, key, value, scale=0.2, configs=[None, *configs]):
        mass[:, rows.heads] += rows.high_mass

    scores = 0.2 * query @ key.repeat_interleave(2, 0).transpose(-1, -2)
    hidden = torch.ones(300, 300, dtype=torch.bool).triu(1)
    probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    assert (mass[0] == 0).all()  # SDPA has no tiles
    for config, found in zip(configs, mass[1:], strict=True):
        tiles = precision_map(300, 300, config) == 2
        high = tiles.repeat_interleave(config.tile, 0).repeat_interleave(config.tile, 1)[:300, :300]
        torch.testing.assert_close(found, (probabilities * high).sum((-1, -2)))


def test_errors_are_those_of_the_formats(tiny_model: PreTrainedModel, tokens: Tensor) -> None:
    sdpa, exact, int8, mxfp4 = compare(
        tiny_model, tokens, parse_runs(["low=none,high=none", "low=int8,high=none", "low=mxfp4,high=none"])
    )
    assert sdpa.layers == [0, 1]
    assert sdpa.high_mass is None
    for layer in range(2):
        for head in range(2):
            errors = [run.relative_error[layer][head] for run in (sdpa, exact, int8, mxfp4)]
            assert max(errors[:2]) < 1e-5 < errors[2] < errors[3] < 1
            similarity = [run.cosine_similarity[layer][head] for run in (exact, int8, mxfp4)]
            assert 1 + 1e-6 > similarity[0] > similarity[1] > similarity[2] > 0
            assert int8.high_mass is not None
            # two of the three rows of tiles are high throughout: 128 tokens on the diagonal, 128 of sink
            assert 256 / 300 < int8.high_mass[layer][head] < 1


def test_a_layer_does_not_pay_for_the_errors_of_those_before(
    tiny_model: PreTrainedModel, tokens: Tensor
) -> None:
    everywhere, only_last = DMAConfig(low="mxfp4"), DMAConfig(low="mxfp4", layers={0: {"low": "none"}})
    sdpa = parse_runs([])
    first = compare(tiny_model, tokens, [*sdpa, Run("everywhere", everywhere)])[1]
    last = compare(tiny_model, tokens, [*sdpa, Run("last", only_last)])[1]
    assert first.relative_error[0] != last.relative_error[0]  # settings of single layers count
    assert first.relative_error[1] == last.relative_error[1]


def test_the_model_is_left_as_it_was(tiny_model: PreTrainedModel, tokens: Tensor) -> None:
    compare(tiny_model, tokens, parse_runs(["paper"]))
    assert tiny_model.config._attn_implementation == "sdpa"
    assert not hasattr(tiny_model.config, "dma_config")


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_grows_with_the_square_of_the_context(tiny_model: PreTrainedModel) -> None:
    largest = []
    for length in (512, 1024):
        with LargestTensor() as mode:
            window = spaced_windows(length + 1, context=length, count=1)
            compare_layers(
                tiny_model, torch.arange(length + 1) % 256, parse_runs(["paper"]), window, failures=Failures()
            )
        largest.append(mode.elements)
    assert largest[1] <= 2 * largest[0]
    assert largest[1] <= 2 * 128 * 1024  # heads x one row of tiles


def test_finished_windows_are_not_measured_again(
    tiny_model: PreTrainedModel, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, journal, done = parse_runs(["paper"]), Journal(tmp_path, "layers"), []
    measured = compare(tiny_model, tokens, runs, windows=2, journal=journal)
    monkeypatch.setattr(layers, "_measure_window", None)  # calling it would fail
    assert compare(tiny_model, tokens, runs, windows=2, journal=journal, advance=done.append) == measured
    assert sum(done) == 4
    # what is kept are sums: two windows are no mean of means
    assert measured != compare(tiny_model, tokens, runs, windows=1, journal=journal)


def test_a_run_that_fails_leaves_the_others(
    tiny_model: PreTrainedModel, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = layers.dma_attention_forward

    def fail_on_mxfp4(module: Any, *args: Any, **kwargs: Any) -> Any:
        if module.config.dma_config["low"] == "mxfp4":
            raise NotImplementedError("no such kernel")
        return attend(module, *args, **kwargs)

    monkeypatch.setattr(layers, "dma_attention_forward", fail_on_mxfp4)
    failures, journal = Failures(), Journal(tmp_path, "layers")
    runs = parse_runs(["low=mxfp4", "paper"])
    results = compare(tiny_model, tokens, runs, failures=failures, journal=journal)
    assert [result.run.name for result in results] == ["SDPA", "paper"]
    assert [failed["error"] for failed in failures.describe()] == ["no such kernel"]
    assert len(journal) == 0  # so that the next run tries again


SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.5,
}


def test_a_sliding_window_is_part_of_the_exact_attention(tokens: Tensor) -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=40)).eval()
    sdpa, exact, mxfp4 = compare(
        model, tokens, parse_runs(["low=none,high=none", "low=mxfp4,high=none,tile=16,diagonal=16,sink=16"])
    )
    for head in range(2):
        assert max(sdpa.relative_error[0][head], exact.relative_error[0][head]) < 1e-5
        assert mxfp4.relative_error[0][head] > 1e-3
        # of the 40 tokens that a query sees, few lie before its own tile of 128
        assert exact.high_mass is not None
        assert exact.high_mass[0][head] > 0.7


def test_attention_that_exact_attention_is_not_is_refused(tokens: Tensor) -> None:
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL)).eval()
    with pytest.raises(UsageError, match=r"layer 0 caps its scores \(softcap\); 'layers' measures"):
        compare(model, tokens, parse_runs(["paper"]))


@pytest.mark.gpu
def test_32k_tokens_fit_on_a_gpu() -> None:
    length = 32_768
    config = LlamaConfig(**{**SMALL, "head_dim": 64, "max_position_embeddings": length})
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    tokens = torch.arange(length + 1) % 256
    torch.cuda.reset_peak_memory_stats()
    window = spaced_windows(length + 1, context=length, count=1)
    results = compare_layers(model, tokens, parse_runs(["paper"]), window, failures=Failures())
    assert len(results) == 2
    assert torch.cuda.max_memory_allocated() < length**2 / 2  # scores of one head are eight times as much


def command(folder: Path, text: Path, output: Path, *more: str) -> int:
    arguments = ["--model", str(folder), "--text", str(text), "--output", str(output), "--context", "400"]
    return main(["layers", *arguments, *more])


def test_the_command_names_the_worst_heads(
    tiny_folder: Path, text_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tiny_folder, text_path, tmp_path, "--config", "low=mxfp4", "--worst", "1") == 0
    content = json.loads((tmp_path / "layers.json").read_text(encoding="utf-8"))
    validate(content, "layers")
    worst = heads_by_error(content["layers"], content["runs"][1])[0]
    assert worst.relative_error == max(max(row) for row in content["runs"][1]["relative_error"])
    out = capsys.readouterr().out
    assert f"layer {worst.layer}, head {worst.head}" in out
    assert f"{worst.relative_error:.2e}" in out
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != text_path.name) == [
        "layers.json",
        "layers.svg",
    ]
    again = tmp_path / "again.svg"
    draw_layer_heatmaps(content, again)
    assert again.read_bytes() == (tmp_path / "layers.svg").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--context", "2000"], "--context 2000 is longer than the model's context of 1024 tokens"),
        (["--windows", "2700"], "is too short: 2700 windows of 400 tokens need 3100 tokens, got 3000"),
        (["--worst", "0"], "--worst: must be a whole number of at least 1, got '0'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    complaint: str,
    tiny_folder: Path,
    text_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(tiny_folder, text_path, tmp_path, *arguments) == 2
    assert complaint in capsys.readouterr().err
