"""Runs the notebooks of this folder from top to bottom, and keeps what their cells show.

    python examples/run_notebooks.py                  all of them
    python examples/run_notebooks.py 01_quickstart    one

A notebook runs in an empty folder, so it can rely on nothing that lies beside it. What differs from machine
to machine is left out of what is kept: progress bars and log lines (stderr), and the paths of folders.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parent
CHECKOUT = EXAMPLES.parent


def execute(path: Path, folder: Path, timeout: float = 180) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in ``folder``.

    Args:
        path: of the notebook, which stays as it is.
        folder: where its cells run.
        timeout: of one cell, in seconds.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
        nbclient.exceptions.CellTimeoutError: if one takes too long.
    """
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=timeout, resources=resources, record_timing=False)
    client.execute()
    return notebook


def without_machine(text: str) -> str:
    """``text`` without the folders that exist on this machine only."""
    for path, name in ((CHECKOUT, "dma_hf"), (Path(tempfile.gettempdir()), "tmp"), (Path.home(), "~")):
        text = text.replace(f"{path}/", f"{name}/")
    return text


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Leaves what a reader wants to see of the outputs."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if "text" in output:
                output["text"] = without_machine(output["text"])
            for kind, content in output.get("data", {}).items():
                if kind.startswith("text/"):
                    output["data"][kind] = without_machine(content)
    notebook.metadata["language_info"] = {"name": "python"}  # not the version that happened to run


def main(names: list[str]) -> None:
    """Runs the notebooks called ``names``, all of them by default, and writes them back."""
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder))
        tidy(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
