"""What the pages of the project say is so: their code runs, their numbers are those of the results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from dma_hf_eval.report import MARKED, fill
from dma_hf_eval.runs import DEFAULT_CONFIGS
from dma_hf_eval.tile_map import draw_tile_map

from dma_hf import DMAConfig

CHECKOUT = Path(__file__).parents[2]
PAGES = ("README.md", "eval/builtin_model/README.md")


def read(page: str) -> str:
    return (CHECKOUT / page).read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)  # it loads the built-in model by its relative path
    (block,) = re.findall(r"```python\n(.*?)```", read("README.md"), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["out"].shape == (1, 8, 300, 64)
    assert names["generated"].shape[1] > names["prompt"].input_ids.shape[1]
    assert names["model"].config.dma_config == DMAConfig(low="mxfp4", rotate=True).to_dict()


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_those_of_the_results(page: str) -> None:
    text = read(page)
    assert MARKED.search(text)
    assert text == fill(text, CHECKOUT), f"run: python -m eval.report {page}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", read(page)) if not link.startswith("https://")]
    missing = [link for link in links if not (CHECKOUT / page).parent.joinpath(link).exists()]
    assert missing == []


def test_the_readme_has_one_test_command() -> None:
    commands = re.findall(r"^python3 -m venv .*pytest$", read("README.md"), re.MULTILINE)  # as .ci/run does
    assert len(commands) == 1


def test_the_readmes_picture_is_the_default_tile_map(tmp_path: Path) -> None:
    draw_tile_map(DMAConfig(), 2048, tmp_path / "map.svg")

    def cells(path: Path) -> list[str]:
        # the pixels of the map; the letters around it depend on the version of matplotlib
        return re.findall(r'xlink:href="data:image/png;base64,([^"]*)"', path.read_text(), re.DOTALL)

    assert cells(tmp_path / "map.svg")
    assert cells(CHECKOUT / "examples" / "images" / "tile_map.svg") == cells(tmp_path / "map.svg")


def test_the_committed_comparison_is_that_of_the_command_without_options() -> None:
    content = json.loads(read("eval/results/builtin_cpu/perplexity.json"))
    runs = {run["name"]: run for run in content["runs"]}
    assert list(runs) == ["SDPA", *DEFAULT_CONFIGS]
    assert runs["low=none,high=none"]["perplexity"] == pytest.approx(runs["SDPA"]["perplexity"], abs=1e-4)
    for name, run in runs.items():
        assert run["config"] == (None if name == "SDPA" else DMAConfig.parse(name).to_dict())
