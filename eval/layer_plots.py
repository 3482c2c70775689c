"""The picture of where DMA's error arises: heads by layers, one row of maps a setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from .pictures import picture_bytes
from .results import write_file

CELL = 0.16
"""Inches a head, where there are many."""
ERROR_COLORS, MASS_COLORS = "YlOrRd", "YlGnBu"


def draw_layer_heatmaps(content: dict[str, Any], path: Path) -> None:
    """Draws the runs of ``layers.json``: relative error, and attention mass in tiles of high precision.

    All settings share one logarithmic colour scale for the error. SDPA, whose error is that of rounding
    alone, is left out: it would take up the scale. Settings with the same tiles have the same mass,
    which is drawn once.

    Raises:
        EvalError: if the file cannot be written.
    """
    runs = [run for run in content["runs"] if run["config"] is not None]
    errors = [_grid(run["relative_error"]) for run in runs]
    # an error of zero has no logarithm: it gets the palest colour
    found = np.concatenate([grid[grid > 0] for grid in errors])
    low, high = (found.min(), found.max()) if found.size else (1e-8, 1.0)
    scale = LogNorm(low, max(high, low * 10))
    masses_drawn: list[list[list[float]]] = []
    layers, heads = errors[0].shape
    width, height = max(2.6, CELL * heads), max(1.8, CELL * layers)
    figure = Figure(figsize=(2 * width + 3.2, len(runs) * (height + 0.9)), layout="constrained")
    grid_of_axes = figure.subplots(len(runs), 2, squeeze=False)
    for (left, right), run, error in zip(grid_of_axes, runs, errors, strict=True):
        image = left.imshow(error.clip(low), cmap=ERROR_COLORS, norm=scale, aspect="auto")
        figure.colorbar(image, ax=left)
        left.set_title(f"{run['name']}\nrelative error", fontsize=9)
        _label(left, content["layers"], heads)
        if run["high_mass"] in masses_drawn:
            right.set_axis_off()
            continue
        masses_drawn.append(run["high_mass"])
        image = right.imshow(_grid(run["high_mass"]), cmap=MASS_COLORS, norm=Normalize(0, 1), aspect="auto")
        figure.colorbar(image, ax=right)
        right.set_title(f"{run['name']}\nattention mass in high tiles", fontsize=9)
        _label(right, content["layers"], heads)
    write_file(path, picture_bytes(figure))


def _grid(rows: list[list[float]]) -> np.ndarray:
    """[layers, heads]; where layers differ in their number of heads, NaN for those that are not there."""
    grid = np.full((len(rows), max(map(len, rows))), np.nan)
    for i, row in enumerate(rows):
        grid[i, : len(row)] = row
    return grid


def _label(axes: Any, layers: list[int], heads: int) -> None:
    axes.set(xlabel="head", ylabel="layer")
    rows = range(0, len(layers), max(1, len(layers) // 8))
    axes.set_yticks(list(rows), [str(layers[i]) for i in rows])
    axes.set_xticks(range(0, heads, max(1, heads // 8)))
