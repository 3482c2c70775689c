"""The tables that the terminal shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Run = dict[str, Any]
"""One entry of "runs" in a results file."""

PERPLEXITY_COLUMNS = (
    "attention",
    "perplexity",
    "Δ %",
    "KL SDPA‖DMA",
    "top-1 agreement",
    "recall",
    "seconds",
)
TWO_LINES = {name: name.replace(" ", "\n") for name in ("KL SDPA‖DMA", "top-1 agreement")}
"""Headings that are wider than their numbers, as a terminal of 80 columns needs them."""

PIPED_WIDTH = 160
"""Columns where stdout is no terminal: rich would otherwise squeeze the table into 80."""


def show(title: str, table: Table) -> None:
    """Prints a table to stdout under its title."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPED_WIDTH)
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    # In a narrow terminal the name is what folds: a broken number cannot be read.
    table.add_column(columns[0], overflow="fold", min_width=14)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _fixed(value: float, places: int, sign: str = "") -> str:
    """``value`` with so many decimal places, and never a minus before zeros."""
    return f"{round(value, places) + 0.0:{sign}.{places}f}"


def perplexity_rows(runs: Sequence[Run]) -> list[list[str]]:
    """The cells under ``PERPLEXITY_COLUMNS``: one row per run of ``perplexity.json``.

    The first run is the baseline and has no divergence.
    """
    return [
        [
            run["name"],
            _fixed(run["perplexity"], 4),
            "–" if run["config"] is None else _fixed(run["delta_percent"], 3, "+"),
            "–" if run["config"] is None else _fixed(run["kl_mean"], 5),
            "–" if run["config"] is None else _fixed(100 * run["top1_agreement"], 2) + " %",
            _fixed(run["recall_perplexity"], 4),
            _fixed(run["seconds"], 1),
        ]
        for run in runs
    ]


def recall_rows(runs: Sequence[Run]) -> list[list[str]]:
    """The cells under ``recall_columns``: two rows per run of ``recall.json``, one per measure."""
    rows = []
    for run in runs:
        passkeys = [_fixed(100 * value, 1) + " %" for value in run["passkey_accuracy"].values()]
        second_copies = [_fixed(value, 4) for value in run["second_copy_perplexity"].values()]
        rows += [[run["name"], "passkeys", *passkeys], ["", "second copy", *second_copies]]
    return rows


def recall_columns(runs: Sequence[Run]) -> list[str]:
    """The header of ``recall_rows``: distances in tokens."""
    return ["attention", "measure", *runs[0]["passkey_accuracy"]]


def perplexity_table(runs: Sequence[Run]) -> Table:
    """``perplexity_rows`` for the terminal."""
    table = _table(*(TWO_LINES.get(column, column) for column in PERPLEXITY_COLUMNS))
    for row in perplexity_rows(runs):
        table.add_row(*map(Text, row))
    return table


def recall_table(runs: Sequence[Run]) -> Table:
    """``recall_rows`` for the terminal."""
    table = _table(*recall_columns(runs))
    table.columns[1].justify = "left"
    for row in recall_rows(runs):
        table.add_row(*map(Text, row), end_section=not row[0])
    return table


def _significant(value: float) -> str:
    """Three digits: what is left of a time once its spread is taken off."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


KERNEL_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "ms": ("ms", lambda value: f"{value:.3f}" if value < 10 else f"{value:.2f}"),
    "tflops": ("TFLOP/s", lambda value: _fixed(value, 0)),
    "ratio_to_sdpa_default": ("× SDPA", lambda value: _fixed(value, 2)),
    "gb_per_s": ("GB/s", lambda value: _fixed(value, 0)),
    "ratio_to_copy": ("× copy", lambda value: _fixed(value, 2)),
    "ratio_to_fused": ("time / fused", lambda value: _significant(value)),
    "rel_error": ("rel. error", lambda value: f"{value:.1e}"),
    "extra_bytes": ("extra MiB", lambda value: _fixed(value / 2**20, 1)),
}
"""The measurements of a kernel benchmark by field: heading, and how a value is written."""


def kernel_rows(runs: Sequence[Run], fields: Sequence[str]) -> list[list[str]]:
    """The provider, then the cells of ``fields`` of `KERNEL_COLUMNS`: one row per run of a kernels file.

    A part of a provider's work is indented under it; a provider that failed says why.
    """
    rows = []
    for run in runs:
        name = run["provider"] if run["op"] not in ("quantize", "attend") else f"  {run['op']}"
        if run["op"] == "quantize" and "gb_per_s" in fields:  # there it is all of the work
            name = run["provider"]
        if "error" in run:
            name = f"{name}: {run['error']}"
        values = [(KERNEL_COLUMNS[field][1], run.get(field)) for field in fields]
        rows.append([name, *("–" if value is None else write(value) for write, value in values)])
    return rows


def kernel_table(runs: Sequence[Run], fields: Sequence[str]) -> Table:
    """``kernel_rows`` for the terminal."""
    table = _table("", *(KERNEL_COLUMNS[field][0] for field in fields))
    for row in kernel_rows(runs, fields):
        table.add_row(*map(Text, row))
    return table
