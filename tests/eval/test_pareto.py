"""Quality against speed: which settings meet, what a page says, and the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dma_hf_eval.pareto import Point, draw_pareto, missing_presets, pareto_points
from dma_hf_eval.readme_tables import fill, main

from dma_hf import DMAConfig

ENVIRONMENT = {
    "hardware": "NVIDIA H200",
    "dtype": "bfloat16",
    "torch": "2.13.0",
    "triton": "3.9.0",
    "transformers": "5.23.0",
    "date": "2026-01-02T03:04:05+00:00",
}


def quality_run(name: str, kl: float, recall: float) -> dict[str, Any]:
    config = None if name == "SDPA" else DMAConfig.parse(name).to_dict()
    return {"name": name, "config": config, "kl_mean": kl, "recall_perplexity": recall}


def speed_run(name: str, ratio: float | None, **changes: Any) -> dict[str, Any]:
    shape = {"batch": 1, "heads": 32, "kv_heads": 8, "length": 16_384, "head_dim": 128, "causal": True}
    return {
        "op": changes.pop("op", "attention"),
        "provider": name,
        "config": None if name == "SDPA" else DMAConfig.parse(name).to_dict(),
        "shape": {**shape, **changes},
        "ratio_to_sdpa_default": ratio,
    }


QUALITY = {
    "environment": {**ENVIRONMENT, "hardware": "A CPU", "command": "dma-eval perplexity"},
    "runs": [
        quality_run("SDPA", 0.0, 1.25),
        quality_run("auto", 0.002, 1.255),
        quality_run("accurate", 0.0, 1.25),
        quality_run("low=mxfp4", 0.05, 1.5),
    ],
}
SPEED = {
    "environment": {**ENVIRONMENT, "command": "dma-eval kernels"},
    "runs": [
        speed_run("SDPA", 1.0),
        speed_run("auto", 9.9, head_dim=64),
        speed_run("auto", 9.9, length=4096),
        speed_run("auto", 9.9, causal=False),
        speed_run("auto", 9.9, op="attend"),
        speed_run("auto", 1.3),
        speed_run("auto", 9.9, kv_heads=32),
        speed_run("accurate", 1.1),
        speed_run("fast", 1.5),
        speed_run("low=mxfp4", None),
    ],
}
PAGE = """\
before
<!-- pareto: quality.json h200/kernels.json -->
<!-- end of results -->
after
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "h200").mkdir()
    (tmp_path / "pages").mkdir()
    (tmp_path / "quality.json").write_text(json.dumps(QUALITY))
    (tmp_path / "h200" / "kernels.json").write_text(json.dumps(SPEED))
    (tmp_path / "pages" / "page.md").write_text(PAGE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_settings_in_both_files_meet_at_16k() -> None:
    accurate, auto = pareto_points(QUALITY, SPEED)
    assert accurate == Point("accurate", kl=0.0, recall_change=0.0, speed=1.1)
    assert (auto.name, auto.kl, auto.speed) == ("auto", 0.002, 1.3)
    assert auto.recall_change == pytest.approx(0.4)


def test_what_an_older_file_does_not_name_is_at_its_default() -> None:
    run = speed_run("accurate", 1.2)
    del run["config"]["min_length"]
    (point,) = pareto_points(QUALITY, {**SPEED, "runs": [run]})
    assert (point.name, point.speed) == ("accurate", 1.2)


def test_a_page_gets_the_picture_and_its_numbers(folder: Path) -> None:
    main(["pages/page.md"])
    page = (folder / "pages" / "page.md").read_text(encoding="utf-8")
    assert "(../h200/pareto.svg)" in page
    assert "| accurate | 0.00000 | +0.00 % | 1.10 |\n| auto | 0.00200 | +0.40 % | 1.30 |\n" in page
    assert "Quality: `dma-eval perplexity`, on A CPU. Speed: `dma-eval kernels`" in page
    assert page.startswith("before\n")
    assert page.endswith("<!-- end of results -->\nafter\n")
    assert fill(page, folder, folder / "pages") == page
    picture = (folder / "h200" / "pareto.svg").read_text(encoding="utf-8")
    assert "<svg" in picture

    main(["pages/page.md"])
    assert (folder / "h200" / "pareto.svg").read_text(encoding="utf-8") == picture


def test_while_a_preset_is_not_timed_there_is_no_picture(folder: Path) -> None:
    runs = [run for run in SPEED["runs"] if run["provider"] != "auto"]
    (folder / "h200" / "kernels.json").write_text(json.dumps({**SPEED, "runs": runs}))
    assert missing_presets(QUALITY, {**SPEED, "runs": runs}) == ["auto"]
    main(["pages/page.md"])
    page = (folder / "pages" / "page.md").read_text(encoding="utf-8")
    assert "Not measured yet: the speed of auto in the results of `dma-eval kernels`." in page
    assert not (folder / "h200" / "pareto.svg").exists()


def test_the_picture_names_its_settings(tmp_path: Path) -> None:
    import matplotlib

    points = [Point("accurate", 0.0, 0.0, 1.1), Point("fast", 4e-3, 0.7, 1.5)]
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        draw_pareto(points, "on one GPU", tmp_path / "pareto.svg")
    picture = (tmp_path / "pareto.svg").read_text(encoding="utf-8")
    for words in ("accurate", "fast", "SDPA", "on one GPU", "KL from SDPA (nats)"):
        assert words in picture
