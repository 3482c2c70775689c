"""The tables that the terminal shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

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


def perplexity_table(runs: Sequence[dict[str, Any]]) -> Table:
    """One row per run of ``perplexity.json``; the first is the baseline and has no divergence."""
    table = _table("attention", "perplexity", "Δ %", "KL\nSDPA‖DMA", "top-1\nagreement", "recall", "seconds")
    for run in runs:
        baseline = run["config"] is None
        table.add_row(
            Text(run["name"]),
            _fixed(run["perplexity"], 4),
            "–" if baseline else _fixed(run["delta_percent"], 3, "+"),
            "–" if baseline else _fixed(run["kl_mean"], 5),
            "–" if baseline else _fixed(100 * run["top1_agreement"], 2) + " %",
            _fixed(run["recall_perplexity"], 4),
            _fixed(run["seconds"], 1),
        )
    return table


def recall_table(runs: Sequence[dict[str, Any]]) -> Table:
    """Two rows per run of ``recall.json``: both measures, by distance in tokens."""
    distances = list(runs[0]["passkey_accuracy"])
    table = _table("attention", "measure", *distances)
    table.columns[1].justify = "left"
    for run in runs:
        accuracy, perplexity = run["passkey_accuracy"], run["second_copy_perplexity"]
        passkeys = [_fixed(100 * accuracy[distance], 1) + " %" for distance in distances]
        second_copies = [_fixed(perplexity[distance], 4) for distance in distances]
        table.add_row(Text(run["name"]), "passkeys", *passkeys)
        table.add_row("", "second copy", *second_copies, end_section=True)
    return table
