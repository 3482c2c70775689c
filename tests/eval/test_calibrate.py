"""Calibration: the cost model, the ladder of settings, and the search, on a tiny random model."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dma_hf_eval.attention import attention
from dma_hf_eval.attention_cost import (
    TileTimes,
    attention_time,
    high_share,
    measured_tile_times,
    speed_against_sdpa,
    tile_times,
)
from dma_hf_eval.calibrate import (
    Budget,
    Calibration,
    Meter,
    Quality,
    alone,
    calibrate,
    candidate_settings,
    ladder,
    layered,
    measure_sensitivities,
)
from dma_hf_eval.cli import main
from dma_hf_eval.errors import EvalError, UsageError
from dma_hf_eval.journal import NO_JOURNAL, Journal
from dma_hf_eval.perplexity import RecallTask
from dma_hf_eval.tables import budget_rows
from dma_hf_eval.windows import spaced_windows
from schema_check import validate
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import PreTrainedModel

import dma_hf.attention
from dma_hf import DMAConfig
from dma_hf.precision_map import precision_map

TIMES = TileTimes("made up", False, {"mxfp4": 0.5, "int8": 0.75, "nvfp4": 1.5, "none": 1.0}, sdpa=0.8)
BASE = DMAConfig(high="none", tile=16, diagonal=16, sink=16)
CANDIDATES = candidate_settings(
    BASE, lows=["mxfp4", "int8"], diagonals=[16, 64], sinks=[0], length=256, times=TIMES
)


# The cost model


@pytest.mark.parametrize("length", [1, 128, 129, 1000, 4096])
def test_the_share_of_high_tiles_is_that_of_the_map(length: int) -> None:
    for diagonal, sink in itertools.product([0, 128, 512], [0, 128, 256]):
        config = DMAConfig(diagonal=diagonal, sink=sink)
        tiles = precision_map(length, length, config)
        expected = (tiles == 2).sum() / (tiles > 0).sum()
        assert high_share(config, length) == pytest.approx(expected.item())


def test_time_is_the_tiles_times_what_each_takes() -> None:
    # 4 x 4 tiles, causal: 10; 4 on the diagonal are high
    config = DMAConfig(low="mxfp4", high="none", diagonal=128, sink=0)
    assert attention_time(config, 512, TIMES) == pytest.approx((6 * 0.5 + 4 * 1.0) / 10)
    assert speed_against_sdpa([config, replace(config, low="none")], 512, TIMES) == pytest.approx(1.6 / 1.7)


def test_times_are_medians_over_long_shapes() -> None:
    def run(name: str, low: str | None, length: int, ms: float, head_dim: int = 64) -> dict[str, Any]:
        shape = {
            "batch": 1,
            "heads": 8,
            "kv_heads": 2,
            "length": length,
            "head_dim": head_dim,
            "causal": True,
        }
        return {"op": "attention", "provider": name, "shape": shape, "ms": ms, "config": low and {"low": low}}

    runs = [
        run(name, low, length, length * factor)
        for length, mxfp4 in ((1024, 9.0), (16384, 0.5), (32768, 0.6), (65536, 0.9))
        for name, low, factor in (
            ("SDPA", None, 0.8),
            ("SDPA flash", None, 7.0),
            ("DMA low=none", "none", 1.0),
            ("DMA low=mxfp4", "mxfp4", mxfp4),
        )
    ]
    kernels = {"environment": {"hardware": "a GPU"}, "runs": [*runs, run("SDPA", None, 16384, 1.0, 128)]}
    times = measured_tile_times(kernels, head_dim=96)
    assert times.formats == pytest.approx({"none": 1.0, "mxfp4": 0.6})
    assert times.sdpa == pytest.approx(0.8)
    assert times.source == "measured on a GPU, head dimension 64"
    with pytest.raises(ValueError, match="no causal shape of 16,384 tokens or more"):
        measured_tile_times({**kernels, "runs": runs[:4]}, head_dim=64)


@pytest.mark.parametrize("source", ["h200", "blackwell"])
def test_the_built_in_times_know_every_format(source: str) -> None:
    times = tile_times(source, 128)
    assert times.measured == (source == "h200")
    for format in ("mxfp8", "mxfp8_e5m2", "mxfp4", "nvfp4", "fp8", "int8", "none"):
        assert attention_time(DMAConfig(low=format, high=format), 4096, times) == pytest.approx(
            times.formats[format]
        )
    assert max(times.formats["mxfp4"], times.formats["fp8"]) < times.formats["none"] == 1


# Settings


def test_candidates_are_faster_than_no_quantisation_the_fastest_first() -> None:
    found = candidate_settings(
        DMAConfig(high="none", rotate=True),
        lows=["int8", "nvfp4", "mxfp4", "none"],
        diagonals=[128, 512],
        sinks=[128],
        length=4096,
        times=TIMES,
    )
    assert [(config.low, config.diagonal) for config in found] == [
        ("mxfp4", 128),
        ("mxfp4", 512),
        ("int8", 128),
        ("int8", 512),
        ("none", 128),  # nvfp4 takes longer
    ]
    assert all(config.rotate and config.high == "none" for config in found)


def test_layers_get_their_settings_through_a_file(tmp_path: Path) -> None:
    settings = [CANDIDATES[i] for i in (0, 2, 0, -1, 0, 1)]
    config = layered(BASE, settings)
    config.save(tmp_path / "config.json")
    loaded = DMAConfig.parse(str(tmp_path / "config.json"))
    assert [loaded.for_layer(i) for i in range(6)] == settings
    assert loaded.for_layer(6) == CANDIDATES[0]  # the most common one


def test_every_rung_of_the_ladder_is_the_fastest_for_its_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        kl = torch.rand(3, len(CANDIDATES), generator=generator)
        kl[:, -1] = 0
        sensitivities = kl.tolist()
        rungs = ladder(sensitivities, CANDIDATES, floor=0.01, length=256, times=TIMES)
        every = [
            (
                0.01 + sum(row[c] for row, c in zip(sensitivities, choice, strict=True)),
                speed_against_sdpa([CANDIDATES[c] for c in choice], 256, TIMES),
            )
            for choice in itertools.product(range(len(CANDIDATES)), repeat=3)
        ]
        for rung in rungs:
            fastest = max(speed for estimate, speed in every if estimate <= rung.estimated_kl + 1e-9)
            assert rung.speed == pytest.approx(fastest)
        assert rungs[0].choice == (0, 0, 0)
        assert rungs[-1].estimated_kl == pytest.approx(0.01)
        for before, after in itertools.pairwise(rungs):
            assert before.estimated_kl > after.estimated_kl
            assert before.speed > after.speed
            assert sum(a != b for a, b in zip(before.choice, after.choice, strict=True)) == 1


# The search


def test_a_layer_alone_leaves_sdpa_to_the_others(
    tiny_model: PreTrainedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Meter(tiny_model, tokens, journal=NO_JOURNAL, advance=lambda steps: None)
    window = spaced_windows(len(tokens), context=200, count=1)[0]
    floor, added = measure_sensitivities(meter, [window], 2, CANDIDATES)
    assert floor == pytest.approx(0, abs=1e-6)
    *quantised, exact = CANDIDATES
    for layer, row in enumerate(added):
        # the unquantised kernel in the other layer gives what SDPA does
        pairs = [[config, exact] if layer == 0 else [exact, config] for config in quantised]
        expected = [meter.quality(layered(BASE, pair), [window]).kl for pair in pairs]
        assert row == [*(pytest.approx(kl, rel=1e-3) for kl in expected), 0]
        assert all(kl > 1e-6 for kl in expected)

    on_sdpa = []
    monkeypatch.setattr(
        dma_hf.attention,
        "scaled_dot_product_attention",
        lambda *inputs, **options: on_sdpa.append(1) or sdpa(*inputs, **options),
    )
    with attention(tiny_model, alone(CANDIDATES[0], layer=1)):
        tiny_model(tokens[None, :200])
    assert len(on_sdpa) == 1  # of two layers


def run_calibration(
    model: PreTrainedModel, tokens: Tensor, budget: Budget, journal: Journal = NO_JOURNAL
) -> Calibration:
    windows = spaced_windows(len(tokens), context=200, count=2)
    return calibrate(
        model,
        tokens,
        windows=windows[:1],
        held_out=windows[1:],
        recall=RecallTask(passage=20, distance=100, samples=1),
        layers=2,
        base=BASE,
        candidates=CANDIDATES,
        budget=budget,
        length=256,
        times=TIMES,
        journal=journal,
    )


def test_the_result_keeps_the_budget_and_the_rung_before_does_not(
    tiny_model: PreTrainedModel, tokens: Tensor
) -> None:
    everything = run_calibration(tiny_model, tokens, Budget("kl", 100.0))
    assert everything.rung == 0
    assert {everything.config.for_layer(i) for i in range(2)} == {CANDIDATES[0]}

    limit = everything.quality.kl / 4
    result = run_calibration(tiny_model, tokens, Budget("kl", limit))
    assert 0 < result.rung < len(result.ladder) - 1
    assert result.quality.kl <= limit < result.measured[result.rung - 1].kl
    assert result.ladder[result.rung].speed < everything.ladder[0].speed

    # what it reports is what the setting does when it is measured again
    meter = Meter(tiny_model, tokens, journal=NO_JOURNAL, advance=lambda steps: None)
    again = DMAConfig.from_dict(json.loads(json.dumps(result.config.to_dict())))
    windows = spaced_windows(len(tokens), context=200, count=2)
    assert meter.quality(again, windows[:1]) == result.quality
    assert meter.quality(again, windows[1:]) == result.held_out
    assert tiny_model.config._attn_implementation == "sdpa"


def test_a_tight_budget_quantises_nothing(tiny_model: PreTrainedModel, tokens: Tensor) -> None:
    result = run_calibration(tiny_model, tokens, Budget("kl", 1e-7))
    assert result.rung == len(result.ladder) - 1
    assert {result.config.for_layer(i).quantizes for i in range(2)} == {False}
    assert result.recall == pytest.approx(result.recall_sdpa, rel=1e-4)


def test_a_budget_of_perplexity_counts_changes_up_and_down(
    tiny_model: PreTrainedModel, tokens: Tensor
) -> None:
    budget = Budget("perplexity_change", 0.3)
    assert not budget.keeps(Quality(kl=0.0, perplexity_change=-0.4, top1_agreement=1.0))
    result = run_calibration(tiny_model, tokens, budget)
    assert abs(result.quality.perplexity_change) <= 0.3


def test_a_budget_below_rounding_is_refused(
    tiny_model: PreTrainedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # in bfloat16 even the unquantised kernel is some way from SDPA
    monkeypatch.setattr(Meter, "quality", lambda *_: Quality(2e-4, 0.0, 1.0))
    with pytest.raises(EvalError, match=r"the budget of 0.0001 cannot be kept: .* 0.0002 away from SDPA"):
        run_calibration(tiny_model, tokens, Budget("kl", 1e-4))


def test_a_finished_calibration_is_not_measured_again(
    tiny_model: PreTrainedModel, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, "calibrate")
    result = run_calibration(tiny_model, tokens, Budget("kl", 0.01), journal)
    monkeypatch.setattr(Meter, "_logits", None)  # calling it would fail
    assert run_calibration(tiny_model, tokens, Budget("kl", 0.01), journal) == result


# The command


def command(folder: Path, text: Path, *more: str) -> int:
    sizes = ["--context", "150", "--diagonals", "16", "--sinks", "0,16", "--config", "high=none,tile=16"]
    return main(["calibrate", "--model", str(folder), "--text", str(text), *sizes, *more])


def test_the_command_writes_a_setting_that_the_others_read(
    tiny_folder: Path, text_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results"
    more = ["--low-formats", "mxfp4,nvfp4,int8", "--max-kl", "0.01", "--output", str(output)]
    assert command(tiny_folder, text_path, *more) == 0
    content = json.loads((output / "calibrate.json").read_text(encoding="utf-8"))
    validate(content, "calibrate")
    validate(json.loads((output / "calibrated.json").read_text(encoding="utf-8")), "calibrated")
    assert DMAConfig.load(output / "calibrated.json").to_dict() == content["config"]
    assert content["quality"]["kl"] <= 0.01
    assert not any(c["config"]["low"] == "nvfp4" for c in content["candidates"])  # slow on an H200
    out = capsys.readouterr().out
    for row in budget_rows(content):
        assert all(cell in out for cell in row)
    assert f"{content['held_out']['kl']:.2e}" in out

    arguments = ["--model", str(tiny_folder), "--text", str(text_path), "--max-tokens", "400"]
    calibrated = str(output / "calibrated.json")
    assert main(["perplexity", *arguments, "--context", "150", "--config", calibrated]) == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--max-kl", "0"], "--max-kl: must be a number above 0, got '0'"),
        (["--max-kl", "1", "--max-perplexity-change", "1"], "not allowed with argument --max-kl"),
        (["--costs", "tpu"], "--costs must be h200, blackwell or a kernels.json, got 'tpu'"),
        (["--costs", "missing.json"], "cannot read --costs 'missing.json': No such file"),
        (["--low-formats", "mxfp3"], "low='mxfp3' is not a format"),
        (["--low-formats", "nvfp4"], "nothing to choose from: by --costs h200 none of"),
        (["--diagonals", "100"], "diagonal=100 must be 0 or a positive multiple of tile=16"),
        (["--diagonals", "x"], "--diagonals: must be whole numbers of tokens, got 'x'"),
        (["--context", "1500"], "--context 1500 is longer than the model's context of 1024 tokens"),
        (["--windows", "1000"], "is too short: 3000 windows of 150 tokens"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    complaint: str,
    tiny_folder: Path,
    text_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(tiny_folder, text_path, *arguments) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.out == ""


def test_a_base_with_layers_is_refused(
    tiny_folder: Path, text_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "layers.json"
    DMAConfig(layers={0: {"low": "none"}}).save(path)
    assert command(tiny_folder, text_path, "--config", str(path)) == 2
    assert "has settings of single layers" in capsys.readouterr().err


def test_times_of_a_format_that_was_not_measured_are_asked_for() -> None:
    with pytest.raises(UsageError, match="no time for the format 'fp8'; known are mxfp4, int8"):
        attention_time(DMAConfig(low="fp8", high="none"), 4096, TIMES)
