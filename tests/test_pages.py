"""What the pages of examples/ say is so: tables are those of the code, links lead somewhere, code runs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import nbformat
import pytest
import torch
from dma_hf_eval.readme_tables import MARKED, fill
from dma_hf_eval.report.verdict import MEASURES

from dma_hf import DMAConfig, quantize
from dma_hf.config import PRESETS
from dma_hf.formats import FORMATS, Format
from dma_hf.precision_map import is_high, precision_map
from dma_hf.presets import AUTO_FORMATS

CHECKOUT = Path(__file__).parents[1]
EXAMPLES = CHECKOUT / "examples"
PAGES = sorted(EXAMPLES.glob("*.md"))
DOCUMENTS = [*PAGES, *sorted(EXAMPLES.glob("*.ipynb"))]


def text_of(path: Path) -> str:
    """The prose of a page or a notebook."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def page(name: str) -> str:
    return text_of(EXAMPLES / name)


def rows(text: str, first: str) -> list[list[str]]:
    """The body of the table whose first column is headed `first`, with the code marks taken off."""
    (table,) = re.findall(rf"^\| {first} \|.*\n\|[-|: ]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    lines = table.replace("`", "").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text_of(path))
    local = [link for link in links if not link.startswith("https://")]
    assert [link for link in local if not (EXAMPLES / link).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_tables_of_results_are_those_of_the_results(path: Path) -> None:
    text = text_of(path)
    assert text == fill(text, CHECKOUT, path.parent), (
        f"run: python -m eval.readme_tables examples/{path.name}"
    )


@pytest.mark.parametrize("name", ["formats.md", "presets.md"])
def test_the_python_of_a_page_runs(name: str) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)
    exec(compile(block, name, "exec"), {})


def describe(fmt: Format) -> list[str]:
    names = {"e2m1": "E2M1", "e4m3": "E4M3", "e5m2": "E5M2", "int8": "INT8"}
    scale = {"e8m0": "E8M0", "e4m3": "E4M3", "float32": "float32"}[fmt.scale]
    tokens = f"; {fmt.key_tokens} keys" if fmt.key_tokens > 1 else ""
    packed = quantize(torch.ones(1, 128), fmt.name)
    return [
        "mxfp8 (mxfp8_e4m3)" if fmt.name == "mxfp8" else fmt.name,
        names[fmt.element],
        f"{fmt.element_max:g}",
        f"{fmt.block} channels" if fmt.block else f"the token{tokens}",
        f"{scale}, and float32 for the token" if fmt.global_scale else scale,
        f"{8 * packed.nbytes / 128:g}",
    ]


def test_the_formats_are_those_of_the_code() -> None:
    found = rows(page("formats.md"), "format")
    assert found[:-1] == [describe(fmt) for fmt in FORMATS.values()]
    assert found[-1][0] == "none"


def test_the_presets_are_those_of_the_code() -> None:
    found = {row[0]: row[1:5] for row in rows(page("presets.md"), "preset")}
    fields = ("low", "high", "pv", "min_length")
    assert found == {name: [str(getattr(p, f)) for f in fields] for name, p in PRESETS.items()}
    for name, preset in PRESETS.items():  # the table shows all that they differ in
        shown = {field: getattr(preset, field) for field in fields}
        assert preset == dataclasses.replace(DMAConfig(), **shown), name


def test_what_auto_becomes_is_that_of_the_code() -> None:
    found = [row[1:5] for row in rows(page("presets.md"), "hardware")]
    assert found == [[f"sm_{row.capability}", row.low, row.high, row.pv] for row in AUTO_FORMATS]


def test_the_measured_presets_are_the_presets() -> None:
    (marked,) = MARKED.finditer(page("presets.md"))
    names = [line.split("|")[1].strip() for line in marked[0].splitlines() if line.startswith("| ")]
    assert names == ["attention", "---", "SDPA", *PRESETS]


def test_the_defaults_of_the_map_are_those_of_the_code() -> None:
    found = {row[0]: row[1] for row in rows(page("precision_map.md"), "field")}
    config = DMAConfig()
    widths = {name: str(getattr(config, name)) for name in ("tile", "diagonal", "sink")}
    assert found == {**widths, "layers": ""}


def test_the_shares_of_low_tiles_are_counted() -> None:
    (shares,) = rows(page("precision_map.md"), "tokens")
    (header,) = re.findall(r"^\| tokens \|.*$", page("precision_map.md"), re.MULTILINE)
    for cell, length in zip(shares[1:], header.replace(",", "").split("|")[2:-1], strict=True):
        tiles = int(length) // 128
        if tiles <= 64:
            kinds = precision_map(int(length), int(length), DMAConfig())
            low, computed = int((kinds == 1).sum()), int((kinds > 0).sum())
        else:  # the last row of tiles shows that the count below is the map's
            assert [is_high(tiles - 1, j, DMAConfig(), causal=True) for j in (0, 1, tiles - 1)] == [1, 0, 1]
            computed = tiles * (tiles + 1) // 2
            low = computed - (2 * tiles - 1)
        share = 100 * low / computed
        assert cell == (f"{share:.1f} %" if share > 99 else f"{share:.0f} %")


def test_the_limits_of_the_verdict_are_those_of_the_code() -> None:
    found = [(row[1], row[2]) for row in rows(page("evaluation.md"), "measure")]
    numbers = [tuple(float(cell.removesuffix(" %")) for cell in cells) for cells in found]
    assert numbers == [(measure.safe, measure.care) for measure in MEASURES.values()]


def test_every_command_has_a_row() -> None:
    from dma_hf_eval.commands import MODULES

    found = {row[0].removeprefix("dma-eval ") for row in rows(page("evaluation.md"), "command")}
    commands = {module.__name__.rpartition(".")[2].replace("_", "-") for module in MODULES}
    assert found == commands - {"quick", "tile-map"}
