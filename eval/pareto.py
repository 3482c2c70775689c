"""What each setting costs in quality and buys in speed, in one table and one picture, from two results files.

The quality is that of ``dma-eval perplexity``, the speed that of ``dma-eval kernels``: KL from SDPA against
the time of SDPA's default over the setting's, causal, for 16k tokens at head dimension 128.
``eval.readme_tables`` writes both into the pages that ask for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dma_hf.config import PRESETS

from .pictures import picture_bytes
from .report.settings import baseline_of, identity
from .results import write_file

PICTURE = "pareto.svg"
"""Its name. It lies beside the speeds that it shows."""

SHAPE = {"batch": 1, "length": 16_384, "head_dim": 128, "causal": True}
"""Whose speed counts."""

SMALLEST_KL = 1e-7
"""Nats: what a setting without any divergence is drawn at, as zero has no logarithm."""


@dataclass(frozen=True)
class Point:
    """One setting.

    Attributes:
        name: as the file of qualities has it.
        kl: mean KL of its next-token distribution from SDPA's, in nats.
        recall_change: of the perplexity of a passage that appears a second time, in percent of SDPA's.
        speed: time of SDPA's default over its own.
    """

    name: str
    kl: float
    recall_change: float
    speed: float


def pareto_points(quality: dict[str, Any], speed: dict[str, Any]) -> list[Point]:
    """The settings that both files have, from the slowest to the fastest.

    Args:
        quality: the content of a ``perplexity.json``.
        speed: the content of the attention suite's ``kernels.json``.
    """
    speeds = _speeds(speed)
    baseline = baseline_of(quality["runs"])
    assert baseline is not None  # every perplexity.json has SDPA
    points = [
        Point(
            run["name"],
            run["kl_mean"],
            100 * (run["recall_perplexity"] / baseline["recall_perplexity"] - 1),
            speeds[identity(run["config"])],
        )
        for run in quality["runs"]
        if run["config"] is not None and identity(run["config"]) in speeds
    ]
    return sorted(points, key=lambda point: point.speed)


def missing_presets(quality: dict[str, Any], speed: dict[str, Any]) -> list[str]:
    """The presets among the qualities whose speed was not measured: without them the picture misleads."""
    speeds = _speeds(speed)
    return [
        run["name"]
        for run in quality["runs"]
        if run["name"] in PRESETS and identity(run["config"]) not in speeds
    ]


def _speeds(speed: dict[str, Any]) -> dict[str, float]:
    """Ratio to SDPA's default by identity of the setting; where a shape comes twice, the first counts."""
    found: dict[str, float] = {}
    for run in speed["runs"]:
        if run["op"] != "attention" or run["config"] is None or run["ratio_to_sdpa_default"] is None:
            continue
        if all(run["shape"][name] == value for name, value in SHAPE.items()):
            found.setdefault(identity(run["config"]), run["ratio_to_sdpa_default"])
    return found


def draw_pareto(points: list[Point], title: str, path: Path) -> None:
    """Writes the picture, an SVG, to ``path``. The best settings are at the lower right.

    Raises:
        EvalError: if the file cannot be written.
    """
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for index, point in enumerate(points):
        place = (point.speed, max(point.kl, SMALLEST_KL))
        axes.plot(*place, "o", markersize=8, color=f"C{index}")
        axes.annotate(point.name, place, xytext=(7, 5), textcoords="offset points", fontsize=10)
    axes.axvline(1, color="grey", linewidth=1, linestyle="--")
    axes.annotate(
        "SDPA", (1, 0), xycoords=axes.get_xaxis_transform(), xytext=(4, 5), textcoords="offset points"
    )
    axes.set_yscale("log")
    axes.margins(x=0.2, y=0.15)
    axes.grid(alpha=0.3)
    axes.set(xlabel="speed of attention, × SDPA", ylabel="KL from SDPA (nats)")
    axes.set_title(title, fontsize=10)
    write_file(path, picture_bytes(figure))
