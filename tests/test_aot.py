"""The kernels compiled for five architectures on a machine without a GPU: instructions, memory, spills.

These tests read machine code; they say that a kernel is built of what the formats call for, not that its
results are right. Results are tested under the interpreter and on Hopper (test_kernel_attention.py).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dma_hf.formats import FORMATS
from dma_hf.policy import operand_kind

pytestmark = pytest.mark.timeout(600)  # the first test waits for all compilations

ROOT = Path(__file__).parent.parent
Report = dict[str, Any]  # a line of `python tests/aot.py`

PAPER, MXFP, MXFP4 = "paper", "low=mxfp4,high=mxfp8", "low=mxfp4,high=none"

# (architecture, configuration, head dimension). Every architecture meets every head dimension; every
# configuration meets every architecture that has instructions of its own for it.
CASES = [
    (80, PAPER, 128), (80, MXFP4, 64), (80, MXFP, 256),
    (89, MXFP4, 128), (89, PAPER, 64), (89, MXFP4, 256),
    (90, PAPER, 128), (90, MXFP, 128), (90, MXFP4, 64), (90, PAPER, 64), (90, MXFP4, 256),
    (100, PAPER, 128), (100, MXFP, 128), (100, MXFP4, 64), (100, PAPER, 64), (100, PAPER, 256),
    (100, MXFP4, 256),
    (120, PAPER, 128), (120, MXFP, 128), (120, MXFP4, 64), (120, PAPER, 256), (120, MXFP4, 256),
]  # fmt: skip

# What a call adds changes the loops: masks are compared or loaded there, scores are capped.
FEATURE_CASES = [
    (90, PAPER, 128, "ranges"), (90, MXFP4, 64, "ranges+softcap+sinks"),
]  # fmt: skip
# Loaded masks take registers: their loops spill, and the assembler serialises wgmma.
MASK_CASES = [(90, PAPER, 128, "bool"), (90, MXFP4, 128, "ranges+bias")]
ALL_CASES = [*CASES, *FEATURE_CASES]

# Shared memory that one program may use, in bytes (CUDA programming guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

WGMMA_SERIALISED = {f"C{number}" for number in range(7510, 7516)}


def _name(case: tuple[Any, ...]) -> str:
    return ":".join(map(str, case))


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Report]]:
    """All cases, compiled by two processes. The tests' own interpreter mode excludes compilation."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    names = [_name(case) for case in (*ALL_CASES, *MASK_CASES)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "aot.py"), *names[half::2]],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for half in (0, 1)
    ]  # fmt: skip
    found: dict[str, list[Report]] = {}
    for process in processes:
        stdout, stderr = process.communicate()
        assert process.returncode == 0, stderr[-4000:]
        for line in stdout.splitlines():
            report = json.loads(line)
            found.setdefault(report["case"], []).append(report)
    assert set(found) == set(names)
    return found


@pytest.fixture
def attention(reports: dict[str, list[Report]]) -> Callable[..., Report]:
    """`attention(capability, config, head_dim)`: the report of that attention kernel."""

    def find(*case: Any) -> Report:
        (report,) = (r for r in reports[_name(case)] if r["name"] == "_attention_kernel")
        return report

    return find


def multiplications(report: Report) -> Counter[str]:
    """PTX tensor-core instructions by what names their operands: MMA kind, or element types."""
    kinds: Counter[str] = Counter()
    for instruction, count in report["mma"].items():
        for kind in ("kind::mxf4nvf4", "kind::mxf4", "kind::mxf8f6f4", "kind::f16", "e4m3.e4m3", "bf16.bf16"):
            if f"{kind}." in f"{instruction}." and "tcgen05.cp" not in instruction:
                kinds[kind] += count
                break
        else:
            kinds[instruction] += count
    return kinds


each_case = pytest.mark.parametrize("case", CASES, ids=_name)
each_case_and_feature = pytest.mark.parametrize("case", ALL_CASES, ids=_name)


@pytest.mark.parametrize("case", [*ALL_CASES, *MASK_CASES], ids=_name)
def test_shared_memory_is_within_the_limit(case: tuple[Any, ...], reports: dict[str, list[Report]]) -> None:
    for report in reports[_name(case)]:
        assert report["shared_bytes"] <= SHARED_LIMIT[case[0]], report["name"]
        assert report["tensor_columns"] <= 512


@each_case_and_feature
def test_no_spills_where_the_time_goes(case: tuple[Any, ...], attention: Callable[..., Report]) -> None:
    loops = attention(*case)["loops"]
    assert len(loops) == 2  # high tiles, low tiles
    for loop in loops:
        assert loop.get("STL", 0) + loop.get("LDL", 0) == 0


@pytest.mark.parametrize("case", [c for c in ALL_CASES if c[0] == 90], ids=_name)
def test_hopper_does_not_serialise_wgmma(case: tuple[Any, ...], attention: Callable[..., Report]) -> None:
    assert not WGMMA_SERIALISED & set(attention(*case)["notes"])


# What a configuration's low and high tiles multiply with. The rest of a kernel's multiplications is
# probabilities times V, in bfloat16.
EXPECTED_KINDS = {
    (80, PAPER): {"bf16.bf16"},
    (80, MXFP): {"bf16.bf16"},
    (80, MXFP4): {"bf16.bf16"},
    (89, PAPER): {"bf16.bf16"},
    (89, MXFP4): {"e4m3.e4m3", "bf16.bf16"},
    (90, PAPER): {"bf16.bf16"},
    (90, MXFP): {"e4m3.e4m3", "bf16.bf16"},
    (90, MXFP4): {"e4m3.e4m3", "bf16.bf16"},
    (100, PAPER): {"kind::mxf4nvf4", "kind::mxf8f6f4", "kind::f16"},
    (100, MXFP): {"kind::mxf4", "kind::mxf8f6f4", "kind::f16"},
    (100, MXFP4): {"kind::mxf4", "kind::f16"},
    (120, PAPER): {"kind::mxf4nvf4", "kind::mxf8f6f4", "bf16.bf16"},
    (120, MXFP): {"kind::mxf4nvf4", "kind::mxf8f6f4", "bf16.bf16"},
    (120, MXFP4): {"kind::mxf4nvf4", "bf16.bf16"},
}


@each_case
def test_tensor_cores_multiply_the_formats(
    case: tuple[int, str, int], attention: Callable[..., Report]
) -> None:
    capability, config, _ = case
    report = attention(*case)
    kinds = {k for k in multiplications(report) if not k.startswith("tcgen05.cp")}
    assert kinds == EXPECTED_KINDS[capability, config]
    unit = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}[capability]
    for instruction in report["mma"]:
        assert instruction.startswith(unit)
        assert ("block_scale" in instruction) == ("kind::mx" in instruction)


def test_block_sizes_of_the_scales(attention: Callable[..., Report]) -> None:
    def scaled(*case: Any) -> str:
        return " ".join(i for i in attention(*case)["mma"] if "mxf4" in i)

    # NVFP4: 16 elements a scale, which Triton 3.6 writes as four scales for the 64 elements of a step
    assert re.search("block16|scale_vec::4X", scaled(100, PAPER, 128))
    assert re.search("block32|scale_vec::2X", scaled(100, MXFP, 128))
    assert "scale_vec::4X" in scaled(120, PAPER, 128)
    assert "scale_vec::2X" in scaled(120, MXFP, 128)


@pytest.mark.parametrize("case", [c for c in CASES if c[0] == 100], ids=_name)
def test_hardware_copies_scales_to_tensor_memory(
    case: tuple[int, str, int], attention: Callable[..., Report]
) -> None:
    copies = [i for i in attention(*case)["mma"] if i.startswith("tcgen05.cp")]
    # the copy moves four scales of a row at once; MX rows of 64 elements have two
    assert bool(copies) == (case != (100, MXFP4, 64))


OPERANDS = {
    "16bit": "bf16, dequantised",
    "e4m3": "FP8 E4M3",
    "int8": "INT8",
    "scaled": "block-scaled, native",
}


def test_the_page_says_what_runs_where() -> None:
    lines = ["| format | sm_80 | sm_89 | sm_90 | sm_100 | sm_120 |", "|---|---|---|---|---|---|"]
    for name in FORMATS:
        kinds = (OPERANDS[operand_kind(name, capability)] for capability in SHARED_LIMIT)
        lines.append(f"| `{name}` | " + " | ".join(kinds) + " |")
    page = (ROOT / "examples" / "hardware.md").read_text(encoding="utf-8")
    assert "\n".join(lines) in page, "examples/hardware.md should hold:\n" + "\n".join(lines)
