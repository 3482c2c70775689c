"""The tables that the terminal shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .layers import heads_by_error

Run = dict[str, Any]
"""One entry of "runs" in a results file."""

PERPLEXITY_COLUMNS = (
    "attention",
    "perplexity",
    "Δ %",
    "KL SDPA‖DMA",
    "top-1 agreement",
    "recall",
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


def _change(value: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f"{_fixed(value, 3, '+')} ±{_fixed((high - low) / 2, 3)}"


def perplexity_rows(runs: Sequence[Run]) -> list[list[str]]:
    """The cells under ``PERPLEXITY_COLUMNS``: one row per run of ``perplexity.json``.

    The first run is the baseline and has no divergence. What stands behind ± is half the width of the
    95 % interval.
    """
    return [
        [
            run["name"],
            _fixed(run["perplexity"], 4),
            "–" if run["config"] is None else _change(run["delta_percent"], run["delta_percent_interval"]),
            "–" if run["config"] is None else _fixed(run["kl_mean"], 5),
            "–" if run["config"] is None else _fixed(100 * run["top1_agreement"], 2) + " %",
            _fixed(run["recall_perplexity"], 4),
        ]
        for run in runs
    ]


def position_rows(runs: Sequence[Run]) -> list[list[str]]:
    """The cells under ``position_columns``: SDPA's loss; of other runs its change, and KL."""
    rows = []
    for run in runs:
        measures = {"loss": "loss"} if run["config"] is None else {"Δ loss": "delta_loss", "KL": "kl"}
        for heading, measure in measures.items():
            places, sign = (4, "") if measure == "loss" else (5, "+" if measure == "delta_loss" else "")
            values = [_fixed(part[measure], places, sign) for part in run["by_position"]]
            rows.append(["" if heading == "KL" else run["name"], heading, *values])
    return rows


def position_columns(runs: Sequence[Run]) -> list[str]:
    """The header of ``position_rows``: the last position of each bin."""
    return ["attention", "measure", *(f"to {part['last']:,}" for part in runs[0]["by_position"])]


def position_table(runs: Sequence[Run]) -> Table:
    """``position_rows`` for the terminal."""
    table = _table(*position_columns(runs))
    table.columns[1].justify = "left"
    for row in position_rows(runs):
        table.add_row(*map(Text, row), end_section=row[1] != "Δ loss")
    return table


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
    "ratio_to_chosen": ("× table's", lambda value: _fixed(value, 2)),
    "ratio_to_fused": ("time / fused", lambda value: _significant(value)),
    "rel_error": ("rel. error", lambda value: f"{value:.1e}"),
    "extra_bytes": ("extra MiB", lambda value: _fixed(value / 2**20, 1)),
    "mask_bytes": ("mask MiB", lambda value: _fixed(value / 2**20, 1)),
}
"""The measurements of a kernel benchmark by field: heading, and how a value is written."""


def kernel_rows(runs: Sequence[Run], fields: Sequence[str]) -> list[list[str]]:
    """The provider, then the cells of ``fields`` of `KERNEL_COLUMNS`: one row per run of a kernels file.

    A part of a provider's work is indented under it; a provider that failed says why.
    """
    rows = []
    for run in runs:
        name = run["provider"] if run["op"] not in ("quantize", "attend") else f"  {run['op']}"
        if "blocks" in run or (run["op"] == "quantize" and "gb_per_s" in fields):  # all of the work
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
    """The header of ``speed_rows``: batch x length of each shape, causal unless it says otherwise."""
    shapes = (
        f"{batch} × {length:,}" + (", no mask" if no_mask else "") for no_mask, length, batch in _series(runs)
    )
    return ["head dimension", "attention", *shapes]


def speed_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Speed against SDPA's default over the length: a row per head dimension and provider.

    Of a kernels file, the shapes with the heads of the first one; providers that never ran are left out.
    """
    ratios = {
        (run["shape"]["head_dim"], run["provider"], *_place(run)): run
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
    same = all(shape[name] == first[name] for name in ("heads", "kv_heads"))
    return bool(run["op"] == "attention" and same)


def _place(run: Run) -> tuple[bool, int, int]:
    shape = run["shape"]
    return not shape["causal"], shape["length"], shape["batch"]


def _series(runs: Sequence[Run]) -> list[tuple[bool, int, int]]:
    return sorted({_place(run) for run in runs if _in_series(run, runs)})


LAYER_COLUMNS = ("attention", "head", "rel. error", "cosine", "mass in\nhigh tiles")


def layer_rows(content: dict[str, Any], worst: int) -> list[list[str]]:
    """The cells under ``LAYER_COLUMNS`` of ``layers.json``: each run's mean, then its worst heads."""
    rows = []
    for run in content["runs"]:
        heads = heads_by_error(content["layers"], run)
        means = [
            sum(values) / len(heads)
            for values in (
                [head.relative_error for head in heads],
                [head.cosine_similarity for head in heads],
                [head.high_mass or 0.0 for head in heads],
            )
        ]
        named = [(run["name"], f"mean of {len(heads)}", *means)]
        named += [("", f"layer {head.layer}, head {head.head}", *head[2:]) for head in heads[:worst]]
        for name, which, error, cosine, mass in named:
            share = "–" if run["high_mass"] is None else _fixed(100 * mass, 1) + " %"
            rows.append([name, which, f"{error:.2e}", _fixed(cosine, 6), share])
    return rows


def layer_table(content: dict[str, Any], worst: int) -> Table:
    """``layer_rows`` for the terminal."""
    table = _table(*LAYER_COLUMNS)
    table.columns[1].justify = "left"
    rows = layer_rows(content, worst)
    for row, following in zip(rows, [*rows[1:], rows[0]], strict=True):
        table.add_row(*map(Text, row), end_section=bool(following[0]))
    return table


def _decimals(value: float | None, places: int) -> str:
    return "–" if value is None else f"{value:,.{places}f}"


MODEL_SPEED_COLUMNS = (
    "attention",
    "context",
    "batch",
    "first\ntoken s",
    "×",
    "decode\ntokens/s",
    "×",
    "peak\nGiB",
    "attention\nshare",
    "×",
)


def model_speed_rows(runs: Sequence[Run]) -> list[list[str]]:
    """The cells under ``MODEL_SPEED_COLUMNS``: one row per run of ``speed.json``; what failed says why."""
    rows = []
    for run in runs:
        share, peak = run["attention_share"], run["peak_bytes"]
        rows.append(
            [
                f"{run['name']}: {run['error']}" if "error" in run else run["name"],
                f"{run['context']:,}",
                str(run["batch"]),
                "–" if run["prefill_seconds"] is None else _significant(run["prefill_seconds"]),
                _decimals(run["prefill_speedup"], 2),
                _decimals(run["decode_tokens_per_second"], 1),
                _decimals(run["decode_speedup"], 2),
                "–" if peak is None else _decimals(peak / 2**30, 1),
                "–" if share is None else f"{100 * share:.0f} %",
                _decimals(run["attention_speedup"], 2),
            ]
        )
    return rows


def model_speed_table(runs: Sequence[Run]) -> Table:
    """``model_speed_rows`` for the terminal."""
    table = _table(*MODEL_SPEED_COLUMNS)
    points = [(run["context"], run["batch"]) for run in runs]
    for row, here, following in zip(model_speed_rows(runs), points, [*points[1:], None], strict=True):
        table.add_row(*map(Text, row), end_section=here != following)
    return table


CALIBRATION_COLUMNS = ("layer", "low", "high", "diagonal", "sink", "KL alone", "time")
BUDGET_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Budgets to show beside the one asked for, as multiples of it."""


def calibration_rows(content: dict[str, Any]) -> list[list[str]]:
    """The cells under ``CALIBRATION_COLUMNS`` of ``calibrate.json``: one row a layer."""
    rows = []
    for index, layer in enumerate(content["layers"]):
        candidate = content["candidates"][layer["candidate"]]
        config = candidate["config"]
        quantised = config["low"] != "none"
        rows.append(
            [
                str(index),
                config["low"],
                config["high"],
                str(config["diagonal"]) if quantised else "–",
                str(config["sink"]) if quantised else "–",
                f"{layer['kl_alone'][layer['candidate']]:.1e}",
                _fixed(candidate["time"], 2),
            ]
        )
    return rows


def calibration_table(content: dict[str, Any]) -> Table:
    """``calibration_rows`` for the terminal."""
    table = _table(*CALIBRATION_COLUMNS)
    for row in calibration_rows(content):
        table.add_row(*map(Text, row))
    return table


def budget_rows(content: dict[str, Any]) -> list[list[str]]:
    """KL budgets around the calibrated one, and the speed that the ladder of ``calibrate.json`` predicts."""
    centre = content["budget"]["limit"]
    if content["budget"]["measure"] != "kl":
        centre = content["quality"]["kl"]
    rows = []
    for factor in BUDGET_FACTORS:
        kept = [rung for rung in content["ladder"] if rung["estimated_kl"] <= factor * centre]
        if kept:
            fastest = max(rung["speed_against_sdpa"] for rung in kept)
            relative = fastest / content["costs"]["sdpa"]
            rows.append([f"{factor * centre:.1e}", _fixed(fastest, 3), _fixed(relative, 3)])
    return rows


def budget_table(content: dict[str, Any]) -> Table:
    """``budget_rows`` for the terminal."""
    table = _table("KL budget\n(estimated)", "× SDPA", "× unquantised")
    for row in budget_rows(content):
        table.add_row(*map(Text, row))
    return table


TASK_COLUMNS = ("attention", "task", "metric", "value ± stderr", "Δ", "p", "lost", "gained")


def task_rows(runs: Sequence[Run]) -> list[list[str]]:
    """The cells under ``TASK_COLUMNS`` of ``tasks.json``: for each metric of each task a row per run."""
    rows = []
    for position, first in enumerate(runs[0]["results"]):
        for run in runs:
            result = run["results"][position]
            error, flipped, p_value = result["stderr"], result["flipped"], result["p_value"]
            value = _decimals(result["value"], 4) + ("" if error is None else f" ± {_fixed(error, 4)}")
            head = [run["name"], first["task"], first["metric"]] if run is runs[0] else [run["name"], "", ""]
            rows.append(
                [
                    *head,
                    value,
                    "–" if result["delta"] is None else _fixed(result["delta"], 4, "+"),
                    "–" if p_value is None else f"{p_value:.2g}",
                    "–" if flipped is None else str(len(flipped["lost"])),
                    "–" if flipped is None else str(len(flipped["gained"])),
                ]
            )
    return rows


def task_table(runs: Sequence[Run]) -> Table:
    """``task_rows`` for the terminal."""
    table = _table(*TASK_COLUMNS)
    for column in table.columns[1:3]:
        column.justify = "left"
    rows = task_rows(runs)
    for row, following in zip(rows, [*rows[1:], rows[0]], strict=True):
        table.add_row(*map(Text, row), end_section=bool(following[1]))
    return table


MODEL_COLUMNS = (
    "model type",
    "class",
    "attention",
    "DMA calls",
    "SDPA calls",
    "max. error",
    "in lockstep",
    "seconds",
    "why",
)


def model_rows(runs: Sequence[Run]) -> list[list[str]]:
    """The cells under ``MODEL_COLUMNS``: one row per run of ``models.json``."""
    return [
        [
            run["model_type"],
            run["class"] or "–",
            run["outcome"],
            str(run["kernel_calls"]),
            str(run["sdpa_calls"]),
            "–" if run["max_error"] is None else f"{run['max_error']:.1e}",
            "–" if run["lockstep_error"] is None else f"{run['lockstep_error']:.1e}",
            _fixed(run["seconds"], 1),
            run["why"] or "",
        ]
        for run in runs
    ]


def models_table(runs: Sequence[Run]) -> Table:
    """``model_rows`` for the terminal."""
    table = _table(*MODEL_COLUMNS)
    for column in (1, 2, 8):
        table.columns[column].justify = "left"
    for column in (1, 8):
        table.columns[column].no_wrap = False
        table.columns[column].overflow = "fold"
    for row in model_rows(runs):
        table.add_row(*map(Text, row))
    return table


def model_counts_table(counts: dict[str, int]) -> Table:
    """How many model types ended how, for the terminal."""
    table = _table("attention", "model types")
    for outcome, count in counts.items():
        table.add_row(outcome, str(count))
    return table
