"""The kernel benchmark on a CPU: the plan, the loop, what a failure leaves, and the files it writes.

Times here are invented; nothing is measured. DMA runs on the reference, or on interpreted kernels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dma_hf_eval import kernel_inputs, kernel_providers, kernel_timing, kernels
from dma_hf_eval.cli import main
from dma_hf_eval.commands.calibrate import DEFAULT_LOWS
from dma_hf_eval.commands.kernels import PROVIDERS, head_dims, sizes
from dma_hf_eval.errors import EvalError, UsageError
from dma_hf_eval.kernel_ablations import (
    KeyShape,
    compare_quantizers,
    compare_tiles,
    eager_pytorch,
    random_key,
    separate_passes,
    tile_settings,
)
from dma_hf_eval.kernel_benchmark import compare_attention
from dma_hf_eval.kernel_inputs import (
    Shape,
    attention_shapes,
    float32_attention,
    random_inputs,
    relative_error,
    structured_inputs,
)
from dma_hf_eval.kernel_masks import compare_masks, make_mask, mask_batches, provider_count
from dma_hf_eval.kernel_plots import throughput_series
from dma_hf_eval.kernel_providers import (
    OTHERS,
    SDPA,
    Provider,
    dma_provider,
    dma_providers,
    key_quantizer,
)
from dma_hf_eval.kernels import Plan, plan_attention
from dma_hf_eval.tables import kernel_rows
from schema_check import validate
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import sdpa_mask

from dma_hf import DMAConfig
from dma_hf.plugin import dma_mask
from dma_hf.ranges_mask import RangesMask

Capture = pytest.CaptureFixture[str]
CPU = torch.device("cpu")
SHAPE = Shape(batch=1, heads=4, kv_heads=2, length=160, head_dim=32)
FIELDS = {
    "op",
    "provider",
    "shape",
    "ms",
    "tflops",
    "ratio_to_sdpa_default",
    "includes_quantization",
    "rel_error",
    "extra_bytes",
}


on_interpreted_kernels = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a CPU kernels run interpreted, which is off where there is a GPU"
)


class InventedMeter:
    """Runs every call once, as a meter does, and hands out the given times in turn."""

    device = CPU

    def __init__(self, *times: float) -> None:
        self.times = iter(times)

    def milliseconds(self, call: Callable[[], Any]) -> float:
        call()
        return next(self.times, 1.0)

    def extra_bytes(self, call: Callable[[], Any]) -> int:
        return 1 << 20

    def works(self) -> bool:
        return True


def ignore(_: int) -> None:
    """Progress that nobody watches."""


def failing(name: str, error: Exception) -> Provider:
    """A provider that raises when it is called."""

    def operations(_: kernel_inputs.Inputs) -> Iterator[tuple[str, Callable[[], Any]]]:
        def call() -> None:
            raise error

        yield "attention", call

    return Provider(name, operations)


# ---- inputs and the result they are compared with


@pytest.mark.parametrize("causal", [True, False])
def test_float32_attention_is_sdpas_in_float32(causal: bool) -> None:
    inputs = random_inputs(Shape(2, 6, 3, 150, 16, causal), CPU)
    query, key, value = (x.float() for x in (inputs.query, inputs.key, inputs.value))
    expected = scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(float32_attention(inputs, queries=40), expected[:, :, -40:])
    torch.testing.assert_close(float32_attention(inputs, queries=999), expected)


def test_relative_error_looks_at_the_rows_that_are_expected() -> None:
    expected = torch.ones(1, 1, 2, 4)
    result = torch.tensor([9.0, 1.1, 1.1]).view(1, 1, 3, 1).expand(1, 1, 3, 4)
    assert relative_error(result, expected) == pytest.approx(0.1, rel=1e-5)


def test_structured_inputs_are_local_and_have_a_sink() -> None:
    inputs = structured_inputs(Shape(1, 2, 1, 1024, 64, causal=False), CPU)
    weights = (inputs.query.float() @ inputs.key.float().transpose(-1, -2) * inputs.scale).softmax(-1)
    rows = weights[:, :, 512:].mean((0, 1))
    near = torch.stack([row[i + 512 - 32 : i + 512 + 32].sum() for i, row in enumerate(rows[:256])]).mean()
    assert near > 4 * 64 / 1024  # 64 keys, far over their share
    assert rows[:, :4].sum(-1).mean() > 4 * 4 / 1024


def test_attention_shapes_cover_what_is_asked_for() -> None:
    shapes = attention_shapes()
    for head_dim in (64, 128):
        series = [s for s in shapes if s.head_dim == head_dim and s.causal and s.heads == 4 * s.kv_heads]
        sizes = [(shape.batch, shape.length) for shape in series]
        assert sizes == [(1, 1024), (4, 4096), (1, 16_384), (1, 32_768), (1, 131_072)]
    assert Shape(1, 32, 8, 16_384, 128, causal=False) in shapes
    assert any(shape.heads == shape.kv_heads for shape in shapes)
    assert {shape.length for shape in attention_shapes(quick=True)} == {16_384, 32_768}
    assert len(set(shapes)) == len(shapes)


def test_a_choice_of_shapes_is_those_alone() -> None:
    assert attention_shapes(sizes=[(4, 300), (1, 500)]) == [
        Shape(4, 32, 8, 300, 128),
        Shape(1, 32, 8, 500, 128),
        Shape(4, 32, 8, 300, 64),
        Shape(1, 32, 8, 500, 64),
    ]
    assert attention_shapes(sizes=[(1, 300)], head_dims=[96], bidirectional=True) == [
        Shape(1, 32, 8, 300, 96, causal=False)
    ]
    assert len(attention_shapes(head_dims=[128])) == len(attention_shapes()) // 2 - 1


def test_causal_attention_counts_half_of_the_operations() -> None:
    assert Shape(2, 4, 1, 100, 64, causal=False).flops == 2 * 4 * 100 * 100 * 64 * 4
    assert Shape(2, 4, 1, 100, 64).flops == 2 * 4 * 100 * 100 * 64 * 2


# ---- the loop


def test_a_comparison_relates_everything_to_the_baseline_of_its_shape() -> None:
    providers = [SDPA, dma_provider("DMA exact", DMAConfig(low="none", high="none"))]
    steps: list[int] = []
    # SDPA 4 ms, DMA 2 ms, then SDPA again, amid and after the others
    runs = compare_attention(SHAPE, providers, InventedMeter(4.0, 2.0, 8.0), steps.append)
    sdpa, dma = runs
    assert sdpa.keys() == dma.keys() == FIELDS | {"config"}
    assert (sdpa["ms"], sdpa["ratio_to_sdpa_default"]) == (6.0, 1.0)
    assert (dma["ms"], dma["ratio_to_sdpa_default"]) == (2.0, 3.0)
    assert dma["tflops"] == SHAPE.flops / 2e-3 / 1e12
    assert dma["rel_error"] < 5e-3
    assert dma["config"] == DMAConfig(low="none", high="none").to_dict()
    assert sdpa["shape"] == {
        "batch": 1,
        "heads": 4,
        "kv_heads": 2,
        "length": 160,
        "head_dim": 32,
        "causal": True,
    }
    assert sum(steps) == len(providers)


def test_quantisation_shows_in_the_error() -> None:
    providers = [SDPA, dma_provider("DMA paper", DMAConfig())]
    sdpa, dma = compare_attention(SHAPE, providers, InventedMeter(), ignore)
    assert dma["includes_quantization"] is True
    assert sdpa["includes_quantization"] is None
    assert 1e-2 < dma["rel_error"] < 0.3
    assert sdpa["rel_error"] < 5e-3


@on_interpreted_kernels
def test_on_the_kernels_the_parts_are_timed_too_and_make_the_whole() -> None:
    config = DMAConfig(low="mxfp4", high="none", tile=32, diagonal=32, sink=0, backend="triton")
    provider = dma_provider("DMA", config)
    shape = Shape(1, 2, 1, 64, 32)  # small: the kernels are interpreted
    inputs = random_inputs(shape, CPU)
    results = {op: call() for op, call in provider.operations(inputs)}
    assert list(results) == ["attention", "quantize", "attend"]
    assert torch.equal(results["attention"], results["attend"])
    assert results["quantize"].key.low.elements.dtype == torch.float8_e4m3fn

    _, whole, quantize, attend = compare_attention(
        shape, [SDPA, provider], InventedMeter(1.0, 4.0, 1.0, 3.0), ignore
    )
    assert [run["op"] for run in (whole, quantize, attend)] == ["attention", "quantize", "attend"]
    flags = [run["includes_quantization"] for run in (whole, quantize, attend)]
    assert flags == [True, True, False]
    assert quantize["tflops"] is quantize["ratio_to_sdpa_default"] is None
    assert attend["ratio_to_sdpa_default"] == pytest.approx(1 / 3)


def test_one_providers_failure_is_recorded_and_the_others_run() -> None:
    def spoiled(inputs: kernel_inputs.Inputs) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield "attention", lambda: torch.full_like(inputs.query, math.nan)

    providers = [
        SDPA,
        failing("unsupported", RuntimeError("No available kernel.\nAborting execution.")),
        failing("large", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")),
        Provider("NaN", spoiled),
        dma_provider("DMA", DMAConfig()),
    ]
    sdpa, *failures, dma = compare_attention(SHAPE, providers, InventedMeter(), ignore)
    reasons = ["No available kernel.", "out of GPU memory", "wrong: the result holds NaN or Inf"]
    assert [run["error"] for run in failures] == reasons
    assert all(run["ms"] is None for run in failures)
    assert "error" not in {**sdpa, **dma}


def test_without_a_baseline_there_are_no_ratios() -> None:
    providers = [failing("SDPA", RuntimeError("no")), dma_provider("DMA", DMAConfig())]
    failed, dma = compare_attention(SHAPE, providers, InventedMeter(), ignore)
    assert failed["error"] == "no"
    assert dma["ms"] == 1.0
    assert dma["ratio_to_sdpa_default"] is None


def names_of(plan: Plan) -> list[list[str]]:
    return [[name for name, _ in part.settings] for part in plan.parts]


def test_the_baseline_comes_first_and_every_setting_is_compared_with_it() -> None:
    shape = Shape(1, 32, 8, 16_384, 128)
    plan = plan_attention([shape], ["paper", "low=mxfp4"], ["flex", "sage"])
    assert names_of(plan) == [["SDPA", "FlexAttention", "SageAttention", "DMA paper", "DMA low=mxfp4"]]
    assert plan.parts[0].steps == 5


def test_without_settings_the_presets_run_and_at_16k_single_formats() -> None:
    compared = ["SDPA", "SDPA flash", "SDPA cuDNN", "SageAttention"]
    presets = ["DMA auto", "DMA fast", "DMA accurate", "DMA paper"]
    long, short = names_of(plan_attention([Shape(1, 32, 8, 16_384, 64), Shape(1, 32, 8, 1024, 64)]))
    assert short == compared + presets
    assert long == [*short, "DMA low=mxfp4,high=none", "DMA low=fp8,high=none", "DMA low=none,high=none"]


def test_what_calibrate_predicts_from_is_measured() -> None:
    """`attention_cost` needs every format of its default, and nothing quantised, on one shape."""
    (part,) = plan_attention([Shape(1, 32, 8, 16_384, 64)]).parts
    lows = {config["low"] for _, config in part.settings if config is not None}
    assert lows >= {"none", *DEFAULT_LOWS.split(",")}


def test_the_command_line_names_the_providers_there_are() -> None:
    assert tuple(OTHERS) == PROVIDERS


def test_a_library_that_is_absent_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EvalError, match="not installed"):
        next(OTHERS["sage"].operations(random_inputs(SHAPE, CPU)))


# ---- the ablations


@on_interpreted_kernels
def test_separate_passes_write_what_the_fused_one_writes() -> None:
    config = DMAConfig(low="int8", high="mxfp8", smooth_k=False)
    key = random_key(KeyShape(1, 2, 130, 32), CPU)
    fused = key_quantizer(key, config)()
    low, high = separate_passes(key, config)()
    assert torch.equal(low.low.elements, fused.low.elements)
    assert torch.equal(low.low.scale, fused.low.scale)
    assert torch.equal(high.high.elements, fused.high.elements)


def test_eager_pytorch_quantises_the_smoothed_key_once_a_format() -> None:
    key = random_key(KeyShape(1, 2, 130, 32), CPU)
    results = eager_pytorch(key, DMAConfig())()
    assert [result.format.name for result in results] == ["mxfp8", "nvfp4"]
    smoothed = key.float() - key.float().mean(2, keepdim=True)
    assert (results[0].dequantize() - smoothed).norm() < 0.05 * smoothed.norm()
    (single,) = eager_pytorch(key, DMAConfig(low="mxfp8"))()
    assert single.format.name == "mxfp8"


def test_quantisers_are_compared_by_the_bytes_of_the_first() -> None:
    shape = KeyShape(1, 2, 128, 32)
    quantizers = {"fused": eager_pytorch, "other": separate_passes}
    # the copy 1 ms, then each quantiser
    meter = InventedMeter(1.0, 2.0, 6.0)
    copy, fused, other = compare_quantizers(shape, ["low=int8,high=none"], quantizers, meter, ignore)
    tokens, size = 2 * 128, 2 * 128 * 32 * 2
    assert (copy["op"], copy["bytes"]) == ("copy", 2 * size)
    assert copy["gb_per_s"] == pytest.approx(2 * size / 1e-3 / 1e9)
    # K is read twice, because smoothing needs its mean first; INT8 writes a byte, and 4 bytes a token
    assert fused["bytes"] == other["bytes"] == 2 * size + size // 2 + 4 * tokens
    assert fused["ratio_to_copy"] == pytest.approx(fused["bytes"] / 2 / (2 * size))
    assert (fused["ratio_to_fused"], other["ratio_to_fused"]) == (1.0, 3.0)
    assert fused.keys() >= FIELDS


def test_more_high_tiles_mean_less_error() -> None:
    shape = Shape(1, 2, 1, 1024, 64)
    settings = tile_settings("paper")
    assert len(settings) == 5 * 3 + 1
    chosen = {
        name: settings[f"paper: {name}"]
        for name in ("diagonal 0, sink 0", "diagonal 4, sink 1", "all in mxfp8")
    }
    sdpa, none, some, every = compare_tiles(shape, chosen, InventedMeter(), ignore)
    assert (some["diagonal_tiles"], some["sink_tiles"]) == (4, 1)
    assert none["rel_error"] > 1.2 * some["rel_error"] > 1.2 * every["rel_error"] > sdpa["rel_error"]


# ---- masks

SMALL_BATCHES = mask_batches(unit=16, heads=4, kv_heads=2, head_dim=32)


@pytest.mark.parametrize("batch", SMALL_BATCHES, ids=lambda batch: batch.mask)
def test_both_sides_get_the_same_mask(batch: Any) -> None:
    dense, given = (make_mask(batch, make, CPU) for make in (sdpa_mask, dma_mask))
    assert dense is not None
    assert given is not None
    shape = (batch.shape.batch, 1, batch.shape.length, batch.shape.length)
    assert dense.expand(shape).shape == given.expand(shape).shape
    assert isinstance(given, RangesMask) == (batch.mask != "prefix")
    if isinstance(given, RangesMask):
        given = given.dense()
    assert torch.equal(given.expand(shape), dense.expand(shape))


def test_masked_batches_are_related_to_sdpa_with_its_mask() -> None:
    steps: list[int] = []
    meter, configs = InventedMeter(4.0, 2.0), ["low=none,high=none"]
    runs = [run for batch in SMALL_BATCHES for run in compare_masks(batch, configs, meter, steps.append)]
    assert sum(steps) == sum(provider_count(batch, configs) for batch in SMALL_BATCHES) == len(runs) == 2 * 5
    assert all(run["rel_error"] < 1e-2 for run in runs)
    padded, dma = runs[:2]
    assert (padded["provider"], dma["provider"]) == ("SDPA", "DMA low=none,high=none")
    assert (padded["ratio_to_sdpa_default"], dma["ratio_to_sdpa_default"]) == (1.0, 2.0)
    assert padded["mask_bytes"] == 8 * 128 * 128
    assert dma["mask_bytes"] == 8 * 128 * 4 * 4  # four numbers a query
    assert padded["shape"]["mask"] == "padded"
    window = [run["provider"] for run in runs if run["shape"]["mask"] == "window"]
    assert [name.partition(", causal without a mask")[1] != "" for name in window] == [
        False,
        False,
        True,
        True,
    ]


# ---- the command


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with an invented meter, on shapes that a CPU computes in no time."""
    tiny = [Shape(1, 4, 2, length, 32) for length in (64, 160)]
    monkeypatch.setattr(kernel_timing, "CudaMeter", InventedMeter)
    monkeypatch.setattr(kernel_inputs, "attention_shapes", lambda **_: tiny)
    monkeypatch.setattr(kernel_providers, "DEFAULT_OTHERS", ("sage",))
    monkeypatch.setattr(kernels, "TILES_SHAPE", tiny[1])
    monkeypatch.setattr(kernels, "FUSION_SHAPES", (KeyShape(1, 2, 130, 32),))
    monkeypatch.setattr(kernels, "QUANTIZE_SHAPES", (KeyShape(1, 2, 130, 32),))
    monkeypatch.setattr(kernels, "mask_batches", lambda: SMALL_BATCHES)


@on_interpreted_kernels
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, in the interpreter
def test_the_command_prints_tables_and_writes_every_suite(tmp_path: Path, capsys: Capture) -> None:
    assert main(["kernels", "--suite", "all", "--quick", "--output", str(tmp_path)]) == 0
    assert not list(tmp_path.glob(".*"))  # the journal is gone: all of it is in the results
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {
        "kernels.json",
        "kernels_fusion.json",
        "kernels_tiles.json",
        "kernels_quantize.json",
        "kernels_masks.json",
        "kernels_head_dim_32.svg",
    }
    for path in tmp_path.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content.keys() == {"schema", "environment", "suite", "runs"}
        assert content["schema"] == 1
        assert content["environment"]["command"].startswith("dma-eval kernels --suite all")
        assert all(run.keys() >= FIELDS for run in content["runs"])
    picture = (tmp_path / "kernels_head_dim_32.svg").read_text(encoding="utf-8")
    assert "<svg" in picture

    out = capsys.readouterr().out
    for words in (
        "1 × 160 tokens, 4 / 2 heads, head dimension 32, causal",
        "K of 1 × 130 tokens",
        "DMA paper",
        "SageAttention: not installed",
        "paper: separate passes",
        "paper: diagonal 1, sink 1",
        "× SDPA",
        "× copy",
    ):
        assert words in out


@pytest.mark.usefixtures("on_cpu")
def test_nothing_measured_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(kernels, "SDPA", failing("SDPA", RuntimeError("broken")))
    monkeypatch.setattr(kernels, "dma_providers", lambda _: [])
    assert main(["kernels", "--providers", "none"]) == 1
    assert capsys.readouterr().err == "dma-eval: kernels: nothing could be measured: broken\n"


class Interrupted(InventedMeter):
    """Is interrupted by Ctrl-C at the fourth call that it should time: amid the second shape."""

    def __init__(self) -> None:
        super().__init__(4.0, 2.0, 4.0)

    def milliseconds(self, call: Callable[[], Any]) -> float:
        call()
        ms = next(self.times, None)
        if ms is None:
            raise KeyboardInterrupt
        return ms


@pytest.mark.usefixtures("on_cpu")
def test_an_interrupted_run_leaves_its_results_and_continues_with_the_next_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    command = ["kernels", "--config", "paper", "--providers", "none", "--output", str(tmp_path)]
    monkeypatch.setattr(kernel_timing, "CudaMeter", Interrupted)
    assert main(command) == 130
    captured = capsys.readouterr()
    assert captured.err == "dma-eval: interrupted; the same command continues here\n"
    assert "1 × 64 tokens" in captured.out  # what was measured was shown
    partial = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    validate(partial, "kernels")
    assert partial["shapes_left"] == 1
    assert [run["shape"]["length"] for run in partial["runs"]] == [64, 64]

    # the second shape starts again with its baseline, so that its ratios are of one run
    monkeypatch.setattr(kernel_timing, "CudaMeter", lambda: InventedMeter(9.0, 3.0, 9.0))
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "continues an interrupted run: 1 pieces of it" in captured.err
    assert "1 × 64 tokens" in captured.out
    whole = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    assert "shapes_left" not in whole
    assert whole["runs"][:2] == partial["runs"]
    assert [run["ms"] for run in whole["runs"]] == [4.0, 2.0, 9.0, 3.0]
    assert [run["ratio_to_sdpa_default"] for run in whole["runs"]] == [1.0, 2.0, 1.0, 3.0]


@pytest.mark.usefixtures("on_cpu")
def test_another_setting_does_not_continue_what_one_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["kernels", "--providers", "none", "--output", str(tmp_path)]
    monkeypatch.setattr(kernel_timing, "CudaMeter", Interrupted)
    assert main([*command, "--config", "paper"]) == 130
    monkeypatch.setattr(kernel_timing, "CudaMeter", lambda: InventedMeter(7.0, 7.0, 7.0))
    assert main([*command, "--config", "accurate"]) == 0
    runs = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))["runs"]
    assert runs[0]["ms"] == 7.0


@pytest.mark.usefixtures("on_cpu")
def test_a_gpu_that_stops_working_ends_the_run_and_that_shape_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    fault = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(InventedMeter, "works", lambda _: False)
    monkeypatch.setattr(kernels, "dma_providers", lambda _: [failing("DMA", fault)])
    assert main(["kernels", "--providers", "none", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "dma-eval: kernels: the GPU stopped working: CUDA error: an illegal memory access was encountered;"
        " the same command continues here\n"
    )
    written = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    validate(written, "kernels")
    assert written["shapes_left"] == 2
    assert not list(tmp_path.glob(".kernels*/*"))


MISTAKES = [
    ("--suite speed", "argument --suite: invalid choice: 'speed'"),
    ("--config low=mxfp3", "--config 'low=mxfp3': low='mxfp3' is not a format"),
    ("--suite fusion --config low=none,high=none", "--config 'low=none,high=none': quantises nothing"),
    ("--suite tiles --lengths 64", "--lengths: of the suite 'attention', not of 'tiles'"),
    ("--suite masks --head-dim 64", "--head-dim: of the suite 'attention', not of 'masks'"),
    ("--suite masks --providers none", "--providers: of the suite 'attention', not of 'masks'"),
    ("--suite fusion --bidirectional", "--bidirectional: of the suite 'attention', not of 'fusion'"),
    ("--lengths short", "must be a whole number of at least 1, got 'short'"),
    ("--lengths x4096", "must be a whole number of at least 1, got ''"),
    ("--head-dim 0", "must be a whole number of at least 1, got '0'"),
    ("--providers xformers", "must be of flash, cudnn, flex, sage, or none, got 'xformers'"),
    pytest.param(
        "",
        "kernels: needs a CUDA device",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
    ),
]


@pytest.mark.parametrize(("arguments", "complaint"), MISTAKES)
def test_mistakes_are_one_line(arguments: str, complaint: str, capsys: Capture) -> None:
    assert main(["kernels", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert complaint in captured.err


def test_a_length_may_come_with_its_batch() -> None:
    assert sizes("4x4096,16384,16384,8x64") == [(4, 4096), (1, 16_384), (8, 64)]
    assert head_dims("128,64,128") == [128, 64]  # in the order in which they are measured


def test_help_teaches(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["kernels", "--help"])
    text = capsys.readouterr().out
    assert all(words in text for words in ("× SDPA", "--suite", "fusion", "examples:", "--quick"))


def test_an_unknown_format_is_found_before_anything_runs() -> None:
    with pytest.raises(UsageError, match="low='mxfp3' is not a format"):
        plan_attention([SHAPE], ["low=mxfp3"])


# ---- what is shown


def test_rows_indent_parts_and_give_reasons() -> None:
    shape = SHAPE.describe()
    runs = [
        {
            "op": "attention",
            "provider": "DMA",
            "shape": shape,
            "ms": 1.5,
            "rel_error": 0.0123,
            "extra_bytes": 3 << 20,
        },
        {"op": "quantize", "provider": "DMA", "shape": shape, "ms": 12.346},
        {"op": "attention", "provider": "Sage", "shape": shape, "ms": None, "error": "not installed"},
    ]
    assert kernel_rows(runs, ["ms", "rel_error", "extra_bytes"]) == [
        ["DMA", "1.500", "1.2e-02", "3.0"],
        ["  quantize", "12.35", "–", "–"],
        ["Sage: not installed", "–", "–", "–"],
    ]


def test_a_series_is_the_first_shape_of_each_length() -> None:
    def run(length: int, tflops: float | None, **changes: Any) -> dict[str, Any]:
        shape = {**SHAPE.describe(), "length": length, **changes.pop("shape", {})}
        return {"op": "attention", "provider": "SDPA", "shape": shape, "tflops": tflops, **changes}

    runs = [
        run(2048, 2.0),
        run(1024, 1.0),
        run(1024, 9.0, shape={"batch": 7}),
        run(4096, 9.0, shape={"causal": False}),
        run(8192, None, error="out of GPU memory"),
        run(4096, 4.0, op="attend"),
        run(1024, 5.0, shape={"head_dim": 64}),
    ]
    assert throughput_series(runs) == {
        32: {"SDPA": [(1024, 1.0), (2048, 2.0)]},
        64: {"SDPA": [(1024, 5.0)]},
    }


# ---- on a GPU


def every_provider(configs: list[str]) -> list[Provider]:
    return [SDPA, *OTHERS.values(), *dma_providers(configs)]


@pytest.mark.gpu
@pytest.mark.parametrize("text", ["paper", "low=mxfp4,high=none"])
def test_every_provider_on_the_gpu(text: str) -> None:
    shape = Shape(1, 8, 2, 1024, 64)
    runs = compare_attention(shape, every_provider([text]), kernel_timing.CudaMeter(), ignore)
    by_name = {(run["provider"], run["op"]): run for run in runs}
    for name in ("SDPA", "SDPA flash", "FlexAttention"):
        assert by_name[name, "attention"]["rel_error"] < 1e-2
    for op in ("attention", "quantize", "attend"):
        assert by_name[f"DMA {text}", op]["ms"] > 0
    assert by_name["SDPA", "attention"]["extra_bytes"] < 1 << 22
