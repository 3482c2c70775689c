"""The notebooks run from top to bottom, and what they show was made that way."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import nbformat
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
execute = runpy.run_path(str(EXAMPLES / "run_notebooks.py"))["execute"]

MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|usr|work|opt|var|mnt|Users)/")


def name_of(path: Path) -> str:
    return path.stem


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook: nbformat.NotebookNode) -> list[int]:
    """In which code cells there are pictures."""
    return [
        number
        for number, cell in enumerate(code_cells(notebook))
        if any("image/png" in output.get("data", {}) for output in cell.outputs)
    ]


def test_there_are_five() -> None:
    assert len(NOTEBOOKS) == 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_runs_and_draws_what_is_kept_in_it(path: Path, tmp_path: Path) -> None:
    ran = execute(path, tmp_path, timeout=120)  # raises for a cell that fails or hangs
    assert pictures(ran) == pictures(nbformat.read(path, as_version=4))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_the_kept_outputs_are_those_of_one_run(path: Path) -> None:
    """From the first cell to the last, without an error, on a machine that cannot be told from them."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert {"stream", "display_data"} <= kinds
    assert "error" not in kinds
    assert not MACHINE_PATH.search(nbformat.writes(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_the_model_is_chosen_in_one_cell(path: Path) -> None:
    cells = [cell.source for cell in code_cells(nbformat.read(path, as_version=4))]
    assert [i for i, source in enumerate(cells) if re.search(r"^MODEL = ", source, re.MULTILINE)] == [0]
    assert "from_pretrained(BUILTIN_FOLDER" not in "".join(cells)
