"""The report's pictures: SVG that stands in the page, in the page's own text colour and font.

Matplotlib draws; text and axes come out in ``currentColor``, so they follow a light or dark page, and the
series' colours are readable on both.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..layer_plots import draw_layer_heatmaps
from .numbers import tokens
from .results import ResultsFile
from .verdict import MEASURES

INK = "#010203"
"""Stands for the page's text colour; no series has it."""
BASELINE_COLOR = "#888888"
COLORS = ("#3b82c4", "#d9822b", "#3fa36b", "#b65fc0", "#d1495b", "#4fa3a5", "#b8962a", "#8c7ae6")
MARKERS = "osD^vPX*"
WIDTH = 5.6
"""Inches, of 72 units: text stays readable where a phone shrinks the picture."""
SHRINK, GROW = 0.8, 1.4
"""How far a picture follows the width of the page, in pixels a unit; beyond that it scrolls."""
SMALLEST_KL = 1e-7
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be found, and takes the page's font
    "svg.hashsalt": "dma-hf",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
}

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Points (x, y) by name; SDPA's name may be among them."""


def style() -> AbstractContextManager[None]:
    """Matplotlib's settings for a picture of the report: on while it is made and while it is saved."""
    return matplotlib.rc_context(STYLE)


def color(name: str, settings: Sequence[str]) -> str:
    """A setting's colour, the same in every picture of a report."""
    return COLORS[settings.index(name) % len(COLORS)] if name in settings else BASELINE_COLOR


def marker(name: str, settings: Sequence[str]) -> str:
    """Likewise its marker, for who cannot tell the colours."""
    return MARKERS[settings.index(name) % len(MARKERS)] if name in settings else "."


def interval_plot(
    rows: Sequence[tuple[str, float, Sequence[float]]], settings: Sequence[str], xlabel: str, identifier: str
) -> str:
    """Changes with their intervals, one row each: (name, value, (low, high)). Zero is SDPA."""
    with style():
        lines = 1 + max(name.count("\n") for name, _, _ in rows)
        figure = Figure(figsize=(WIDTH, 0.8 + (0.1 + 0.2 * lines) * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for y, (name, value, (low, high)) in enumerate(rows):
            setting = name.split("\n")[0]
            spread = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar(
                value,
                y,
                xerr=spread,
                fmt=marker(setting, settings),
                color=color(setting, settings),
                capsize=3,
            )
        axes.axvline(0, color=BASELINE_COLOR, linewidth=1)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=9)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(xlabel)
        return to_svg(figure, identifier)


def line_panels(
    panels: Sequence[tuple[str, Series]],
    settings: Sequence[str],
    xlabel: str,
    identifier: str,
    *,
    lengths: bool = False,
    reference: float | None = None,
) -> str:
    """Lines over a length in tokens, one panel for each (ylabel, series), with one legend for all.

    Args:
        lengths: whether x is logarithmic, as lengths of prompts are.
        reference: a horizontal line through the first panel: SDPA, in a ratio to it.
    """
    with style():
        figure = Figure(figsize=(WIDTH, 0.6 + 2.2 * len(panels)), layout="constrained")
        all_axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
        for axes, (ylabel, series) in zip(all_axes, panels, strict=True):
            for name, points in series.items():
                x, y = zip(*sorted(points), strict=True)
                dashes = "-" if name in settings else "--"
                axes.plot(
                    x,
                    y,
                    dashes,
                    marker=marker(name, settings),
                    color=color(name, settings),
                    label=name,
                    markersize=5,
                )
            axes.set_ylabel(ylabel)
            if lengths:
                _length_axis(axes, [x for points in series.values() for x, _ in points])
        if reference is not None:
            all_axes[0].axhline(reference, color=BASELINE_COLOR, linewidth=1, linestyle="--")
        all_axes[-1].set_xlabel(xlabel)
        handles: dict[str, Any] = {}
        for axes in all_axes:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=2, fontsize=9)
        return to_svg(figure, identifier)


def pareto_plot(
    points: Mapping[str, tuple[float, float]], settings: Sequence[str], xlabel: str, identifier: str
) -> str:
    """Quality against speed: (ratio to SDPA, KL in nats) by setting. The best are at the lower right."""
    with style():
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for name, (ratio, kl) in points.items():
            kl = max(kl, SMALLEST_KL)  # zero has no logarithm
            axes.plot(
                ratio, kl, marker(name, settings), color=color(name, settings), markersize=8, label=name
            )
        axes.set_yscale("log")
        axes.axvline(1, color=BASELINE_COLOR, linewidth=1, linestyle="--")
        for limit in (MEASURES["kl"].safe, MEASURES["kl"].care):
            axes.axhline(limit, color=BASELINE_COLOR, linewidth=1, linestyle=":")
        axes.margins(x=0.1, y=0.1)
        axes.set(xlabel=xlabel, ylabel="KL from SDPA (nats)")
        figure.legend(loc="outside upper left", ncols=2, fontsize=9)
        return to_svg(figure, identifier)


def layer_heatmaps(file: ResultsFile, identifier: str) -> str:
    """The maps of ``dma-eval layers``."""
    with tempfile.TemporaryDirectory() as folder, style(), matplotlib.rc_context({"axes.grid": False}):
        path = Path(folder) / "layers.svg"
        draw_layer_heatmaps(file.content, path)
        return inline(path.read_text(encoding="utf-8"), identifier)


def _length_axis(axes: Axes, lengths: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    ticks = sorted({int(length) for length in lengths})
    while len(ticks) > 8:
        ticks = ticks[::-2][::-1]  # every other one, the longest kept
    axes.set_xticks(ticks, [tokens(tick) for tick in ticks])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    axes.set_ylim(0 if low > 0 else low, high)


def to_svg(figure: Figure, identifier: str) -> str:
    """The figure as SVG to stand in a page; ``identifier`` keeps its ids apart from other pictures'."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return inline(text.getvalue(), identifier)


def inline(svg: str, identifier: str) -> str:
    """A whole SVG file as an element of a page: no prologue, ids of its own, the page's colour and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", svg, flags=re.DOTALL)  # a style would be the page's
    referred_to = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    for name in re.findall(r' id="([^"]+)"', svg):  # all others are in nobody's use, and may be double
        new = f' id="{identifier}-{name}"' if name in referred_to else ""
        svg = svg.replace(f' id="{name}"', new)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{identifier}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{identifier}-\1"', svg)
    svg = re.sub(r"font-family: [^;\"]+", "font-family: inherit", svg)
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r'(<svg[^>]*) height="[\d.]+pt"', r"\1", svg, count=1)  # the viewBox gives the proportions

    def limits(match: re.Match[str]) -> str:
        width = float(match[2])
        return f'{match[1]} style="min-width: {SHRINK * width:.0f}px; max-width: {GROW * width:.0f}px"'

    return re.sub(r'(<svg[^>]*) width="([\d.]+)pt"', limits, svg, count=1)
