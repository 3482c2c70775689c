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


def speed_columns(runs: Sequence[Run]) -> list[str]:
    """The header of ``speed_rows``: batch x length of each shape in the series."""
    return ["head dimension", "attention", *(f"{batch} × {length:,}" for batch, length in _series(runs))]


def speed_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Speed against SDPA's default over the length: a row per head dimension and provider.

    Of a kernels file, the causal series whose shapes all have the same number of tokens in a batch or
    batch 1, with the heads of the first run; providers that never ran are left out.
    """
    ratios = {
        (run["shape"]["head_dim"], run["provider"], run["shape"]["batch"], run["shape"]["length"]): run
        for run in runs
        if _in_series(run, runs)
    }
    rows = []
    for head_dim in dict.fromkeys(key[0] for key in ratios):
        for provider in dict.fromkeys(key[1] for key in ratios if key[0] == head_dim):
            measured = [ratios.get((head_dim, provider, *shape), {}) for shape in _series(runs)]
            values = [run.get("ratio_to_sdpa_default") for run in measured]
            if any(value is not None for value in values):
                cells = ["–" if value is None else f"{value:.2f}" for value in values]
                rows.append([str(head_dim), provider, *cells])
    return rows


def _in_series(run: Run, runs: Sequence[Run]) -> bool:
    shape, first = run["shape"], runs[0]["shape"]
    same = all(shape[name] == first[name] for name in ("heads", "kv_heads", "causal"))
    tokens = first["batch"] * first["length"]
    whole = shape["batch"] * shape["length"] == tokens or (shape["batch"] == 1 and shape["length"] > tokens)
    return bool(run["op"] == "attention" and same and whole)


def _series(runs: Sequence[Run]) -> list[tuple[int, int]]:
    shapes = {(r["shape"]["length"], r["shape"]["batch"]) for r in runs if _in_series(r, runs)}
    return [(batch, length) for length, batch in sorted(shapes)]
