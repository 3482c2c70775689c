"""What the pages of the project say is so: their code runs, their numbers are those of the results."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from dma_hf_eval.readme_tables import MARKED, fill
from dma_hf_eval.runs import DEFAULT_CONFIGS
from dma_hf_eval.tile_map import draw_tile_map
from matplotlib.image import imread

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
    assert text == fill(text, CHECKOUT), f"run: python -m eval.readme_tables {page}"


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

    def tiles(path: Path) -> np.ndarray:
        (image,) = re.findall(r'href="data:image/png;base64,([^"]*)"', path.read_text(encoding="utf-8"))
        return imread(io.BytesIO(base64.b64decode(image)))

    # The tiles alone: how letters are drawn depends on the version of matplotlib.
    drawn = tiles(tmp_path / "map.svg")
    assert drawn.shape[:2] == (16, 16)
    np.testing.assert_array_equal(tiles(CHECKOUT / "examples" / "images" / "tile_map.svg"), drawn)


def test_the_committed_comparison_is_that_of_the_command_without_options() -> None:
    content = json.loads(read("eval/results/builtin_cpu/perplexity.json"))
    runs = {run["name"]: run for run in content["runs"]}
    assert list(runs) == ["SDPA", *DEFAULT_CONFIGS]
    assert runs["low=none,high=none"]["perplexity"] == pytest.approx(runs["SDPA"]["perplexity"], abs=1e-4)
    for name, run in runs.items():
        assert run["config"] == (None if name == "SDPA" else DMAConfig.parse(name).to_dict())


def test_the_model_cards_training_figures_are_those_of_the_log() -> None:
    recall = json.loads(read("eval/builtin_model/training_log.json"))["recall"]
    accuracy = " | ".join(f"{value:.0%}" for value in recall["passkey_accuracy"].values())
    perplexity = " | ".join(f"{value:.3f}" for value in recall["second_copy_perplexity"].values())
    card = read("eval/builtin_model/README.md")
    assert f"| passkey accuracy, {recall['passkey_samples']} samples | {accuracy} |" in card
    row = f"| perplexity of the second copy, {recall['second_copy_samples']} samples | {perplexity} |"
    assert row in card
