"""The Gluon kernel: what it is compiled to, on any machine, and its results, on a Hopper GPU.

Triton's interpreter does not run Gluon, so results are tested on the GPU only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE
from torch import Tensor

from dma_hf import DMAConfig
from dma_hf.kernels.hopper import attend_hopper, why_not_hopper
from dma_hf.kernels.quantize import quantize_key
from dma_hf.kernels.quantize_value import quantize_value
from dma_hf.masks import query_ranges
from dma_hf.modifiers import Modifiers
from dma_hf.policy import device_capability, operand_kind
from dma_hf.reference import reference_attention

ROOT = Path(__file__).parent.parent

AUTO = DMAConfig(low="int8", high="none", pv="fp8")
FAST = DMAConfig(low="fp8", high="none", pv="fp8")
AUTO_TILE = DMAConfig(low="int8_tile", high="none", pv="fp8")
FAST_TILE = DMAConfig(low="fp8_tile", high="none", pv="fp8")
FP8 = DMAConfig(low="fp8", high="fp8", pv="fp8")
ACCURATE = DMAConfig(low="int8", high="none", pv="none")

# Compiles what `attend_hopper` launches for each (config, head dimension, causal), with aot.py's tools.
COMPILE = """
import contextlib, io, json, sys
from dataclasses import asdict
import torch, triton
from aot import capture, inspect_kernel
from dma_hf import DMAConfig
from dma_hf.kernels.hopper import attend_hopper
from dma_hf.kernels.quantize import quantize_key
from dma_hf.kernels.quantize_value import quantize_value
from dma_hf.policy import operand_kind
for text, dim, causal, *_ in json.loads(sys.argv[1]):
    config = DMAConfig.parse(text)
    length = 512 if causal else 500  # which cuts the last block
    query, key = torch.zeros(1, 4, length, dim).bfloat16(), torch.zeros(1, 2, length, dim).bfloat16()
    log = io.StringIO()
    with capture(90) as kernels, contextlib.redirect_stdout(log):
        low, high = operand_kind(config.low, 90), operand_kind(config.high, 90)
        quantized = quantize_key(key, config, low, high)
        value = quantize_value(key, permuted=True) if config.pv == "fp8" else key
        triton.knobs.nvidia.dump_ptxas_log = True
        attend_hopper(query, key, quantized, value, causal=causal, scale=0.1, config=config)
        triton.knobs.nvidia.dump_ptxas_log = False
    report = asdict(inspect_kernel(kernels[-1], log.getvalue()))
    report["divisions"] = kernels[-1].asm["ptx"].count("div.rn")  # a call each
    print(json.dumps(report))
"""

# Last, what bounds the kernel: most instructions of one turn of the low loop, and most loads and stores of
# registers that were spilt, which a scale for each key takes.
CASES = [
    ("low=fp8,high=none,pv=fp8", 128, True, 560, 10),
    ("low=int8,high=none,pv=fp8", 64, True, 560, 0),
    ("low=int8,high=none,pv=fp8", 128, False, 720, 8),
    ("low=int8_tile,high=none,pv=fp8", 128, True, 510, 1),
    ("low=fp8_tile,high=none,pv=fp8", 128, True, 470, 1),
    ("low=fp8_tile,high=none,pv=fp8", 64, True, 480, 0),
    ("low=fp8,high=fp8,pv=fp8", 128, True, 560, 8),
    ("low=int8,high=none,pv=none", 128, True, 620, 20),
    ("low=fp8_tile,high=none,pv=none", 64, True, 480, 0),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A report of each case. The tests' own interpreter mode excludes compilation: another process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(CASES)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{c}:{d}" for c, d, *_ in CASES])
def test_compiles_to_asynchronous_wgmma(compiled: list[dict[str, Any]], index: int) -> None:
    report, (config, _, _, instructions, spilt) = compiled[index], CASES[index]
    assert report["notes"] == []  # C7510 ... C7515: wgmma serialised
    assert report["divisions"] == 0
    assert report["shared_bytes"] <= 227 * 1024
    products = " ".join(report["mma"])
    assert ("s32.s8.s8" if "int8" in config else "f32.e4m3.e4m3") in products
    assert ("f32.e4m3.e4m3" if "pv=fp8" in config else "f32.bf16.bf16") in products
    # One exponential a score and one instruction for two probabilities rounded to E4M3 or bfloat16, half of
    # the keys for each of a warp's 32 threads and 16 rows: a loop without packing and unpacking.
    low_loops = [loop for loop in report["loops"] if loop.get("MUFU", 0) >= 64]
    assert low_loops
    for loop in low_loops:
        assert loop["MUFU"] < 64 + 4
        assert loop["F2FP"] == 32
        assert loop.get("PRMT", 0) < 8
        assert sum(loop.values()) <= instructions
        assert loop.get("STL", 0) + loop.get("LDL", 0) <= spilt


def inputs(
    heads: tuple[int, int] = (4, 2), lengths: tuple[int, int] = (512, 512), dim: int = 128, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Q [B, H, M, D], K and V [B, Hkv, N, D] as Transformers lays them out; channel means of some size."""
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int, length: int) -> Tensor:
        x = torch.randn(batch, length, heads, dim, generator=generator)
        return (x + torch.randn(heads, dim, generator=generator)).bfloat16().to(DEVICE).transpose(1, 2)

    return normal(heads[0], lengths[0]), normal(heads[1], lengths[1]), normal(heads[1], lengths[1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"low": "mxfp4"}, "low=fp8 or int8"),
        ({"low": "int8_tile", "high": "int8_tile"}, "high=none"),
        ({"high": "mxfp8"}, "high=none or the same"),
        ({"rotate": True}, "does not rotate"),
        ({"tile": 64, "diagonal": 64, "sink": 64}, "multiple of 128"),
        ({"diagonal": 0}, "diagonal"),
    ],
)
def test_says_what_it_does_not_serve(change: dict[str, Any], reason: str) -> None:
    query, key, value = inputs()
    for served in (AUTO, FAST_TILE, FP8, ACCURATE):
        assert why_not_hopper(90, served, query, key, value, True) is None
    why_not = why_not_hopper(90, replace(AUTO, **change), query, key, value, True)
    assert why_not is not None
    assert reason in why_not


def test_serves_hopper_bfloat16_and_aligned_tensors_only() -> None:
    query, key, value = inputs()
    assert "sm_100" in str(why_not_hopper(100, AUTO, query, key, value, True))
    assert "float16" in str(why_not_hopper(90, AUTO, query.half(), key.half(), value.half(), True))
    assert "head dimension" in str(why_not_hopper(90, AUTO, *inputs(dim=80), True))
    assert "16 bytes" in str(
        why_not_hopper(90, AUTO, query, key[..., 1:, :].as_strided(key.shape, (1, 2, 3, 1)), value, True)
    )


@pytest.fixture
def on_hopper() -> None:
    if DEVICE.type != "cuda" or device_capability(DEVICE) != 90:
        pytest.skip("needs sm_90")
    return


def attend(
    query: Tensor, key: Tensor, value: Tensor, config: DMAConfig, causal: bool, ranges: Tensor | None = None
) -> Tensor:
    kinds = operand_kind(config.low, 90), operand_kind(config.high, 90)
    values = quantize_value(value, ranges, permuted=True) if config.pv == "fp8" else value
    return attend_hopper(
        query, key, quantize_key(key, config, *kinds, ranges), values,
        causal=causal, scale=query.shape[-1] ** -0.5, config=config, key_ranges=ranges,
    )  # fmt: skip


def error(out: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return float((out.float() - expected.float()).norm() / expected.float().norm())


# A score that differs in its last bits can round to another E4M3 probability, one sixteenth away; and FP8
# products are added in about 14 bits. Measured: 0.8e-3 to 2.2e-3 with INT8 scores, 1.2e-3 to 2.6e-3 with FP8.
# With 16-bit PV scores agree to float32's last bits, and two independent roundings of P would be 2e-3.
BOUNDS = [(AUTO, 3e-3), (FAST, 4e-3), (ACCURATE, 1e-3), (AUTO_TILE, 3e-3), (FAST_TILE, 4e-3), (FP8, 4e-3)]
NAMES = ["int8", "fp8", "16-bit PV", "int8_tile", "fp8_tile", "all fp8"]


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("config", "bound"), BOUNDS, ids=NAMES)
@pytest.mark.parametrize(
    ("lengths", "dim", "causal"),
    [
        ((1024, 1024), 128, True), ((1000, 1000), 128, True), ((300, 1000), 128, True),
        ((256, 1024), 64, True), ((1000, 1000), 64, True), ((77, 77), 128, True),
        ((1000, 1000), 128, False), ((100, 1024), 64, False), ((4096, 4096), 128, True),
    ],
)  # fmt: skip
def test_is_the_reference(
    config: DMAConfig, bound: float, lengths: tuple[int, int], dim: int, causal: bool
) -> None:
    query, key, value = inputs(lengths=lengths, dim=dim, batch=2)
    out = attend(query, key, value, config, causal)
    expected = reference_attention(query, key, value, causal=causal, scale=dim**-0.5, config=config)
    assert error(out, expected) < bound
    assert torch.equal(out, attend(query, key, value, config, causal))  # a race would move


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("config", "bound"), BOUNDS[:3], ids=NAMES[:3])
def test_padding_is_left_out(config: DMAConfig, bound: float, causal: bool) -> None:
    query, key, value = inputs(lengths=(700, 700), batch=2)
    ranges = torch.tensor([[37, 700], [0, 611]], dtype=torch.int32, device=DEVICE)
    out = attend(query, key, value, config, causal, ranges)
    expected = reference_attention(
        query, key, value, causal=causal, scale=128**-0.5, config=config,
        modifiers=Modifiers(query_ranges(700, 700, causal=causal, key_ranges=ranges)),
    )  # fmt: skip
    for row, (start, stop) in enumerate(ranges.tolist()):
        assert error(out[row, :, start:stop], expected[row, :, start:stop]) < bound


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
def test_error_does_not_grow_with_length() -> None:
    query, key, value = inputs((1, 1), (16384, 16384))
    out = attend(query, key, value, AUTO, True)
    expected = reference_attention(query, key, value, causal=True, scale=128**-0.5, config=AUTO)
    assert error(out, expected) < 3e-3


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("config", "bound"), BOUNDS[2:4], ids=NAMES[2:4])
def test_every_number_of_low_blocks(config: DMAConfig, bound: float) -> None:
    # the queries of a precision tile have 0, 0, 1, 2, ... 6 low blocks, those of a program up to two numbers
    query, key, value = inputs(lengths=(1024, 1024), batch=2)
    out = attend(query, key, value, config, True)
    expected = reference_attention(query, key, value, causal=True, scale=128**-0.5, config=config)
    for tile in range(8):
        rows = slice(tile * 128, (tile + 1) * 128)
        assert error(out[..., rows, :], expected[..., rows, :]) < bound


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("tile", "diagonal", "sink"),
    [(128, 128, 0), (128, 256, 384), (128, 384, 128), (256, 256, 256), (512, 512, 0)],
)
def test_consumers_in_different_precision_tiles(tile: int, diagonal: int, sink: int, causal: bool) -> None:
    """A program's 192 queries lie in two tiles, whose low and diagonal blocks are not the same."""
    config = replace(AUTO_TILE, tile=tile, diagonal=diagonal, sink=sink)
    query, key, value = inputs(lengths=(1000, 1300))
    out = attend(query, key, value, config, causal)
    expected = reference_attention(query, key, value, causal=causal, scale=128**-0.5, config=config)
    assert error(out, expected) < 3e-3


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("causal", [True, False])
def test_programs_do_several_tiles(causal: bool) -> None:
    query, key, value = inputs(heads=(16, 4), lengths=(2100, 2100), batch=3)  # 528 tiles
    out = attend(query, key, value, AUTO_TILE, causal)
    expected = reference_attention(query, key, value, causal=causal, scale=128**-0.5, config=AUTO_TILE)
    assert error(out, expected) < 3e-3


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("dim", [64, 128])
def test_scores_may_rise_by_any_amount(dim: int) -> None:
    """A block's scores may be so far above all before it that what was summed counts for nothing."""
    query, key, value = inputs(lengths=(1024, 1024), dim=dim)
    query = query + 6.0  # in units of log2 the scores with key 400 are about 400, the others below 60
    key[:, :, 400] = 6.0
    out = attend(query, key, value, AUTO, True)
    expected = reference_attention(query, key, value, causal=True, scale=dim**-0.5, config=AUTO)
    assert error(out, expected) < 3e-3
