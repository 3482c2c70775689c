"""The tile map of a setting as a picture: which tile of the score matrix is computed in which format."""

from __future__ import annotations

from pathlib import Path

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dma_hf import DMAConfig
from dma_hf.precision_map import precision_map

from .errors import EvalError, UsageError
from .pictures import picture_bytes

FILE_TYPES = (".svg", ".png")
COLORS = ("#ffffff", "#cfe3f5", "#1f5f99")  # not visited, low, high
LONGEST = 1 << 17  # 1,024 tiles of 128: more cannot be told apart


def draw_tile_map(config: DMAConfig, tokens: int, path: Path) -> None:
    """Draws the map of causal self-attention over ``tokens`` tokens; the name's suffix is the format.

    Raises:
        UsageError: if the suffix is none of ``FILE_TYPES``, or ``tokens`` is more than ``LONGEST``.
        EvalError: if the file cannot be written.
    """
    if path.suffix not in FILE_TYPES:
        raise UsageError(f"--output '{path}' must end in {', '.join(FILE_TYPES)}")
    if tokens > LONGEST:
        raise UsageError(f"--tokens must be at most {LONGEST}, got {tokens}")
    tiles = precision_map(tokens, tokens, config)
    edge = len(tiles) * config.tile

    figure = Figure(figsize=(4.2, 4.2))
    axes = figure.add_subplot()
    axes.imshow(
        tiles.numpy(),
        cmap=ListedColormap(COLORS),
        vmin=0,
        vmax=2,
        interpolation="none",
        extent=(0, edge, edge, 0),
    )
    if len(tiles) <= 32:  # grid lines between the tiles, as long as they leave room for colour
        axes.hlines(range(0, edge, config.tile), 0, edge, color="white", linewidth=0.8)
        axes.vlines(range(0, edge, config.tile), 0, edge, color="white", linewidth=0.8)
    ticks = [edge * quarter // 4 for quarter in range(5)]
    axes.set(xticks=ticks, yticks=ticks, xlabel="key position (tokens)", ylabel="query position (tokens)")
    handles = [
        Patch(facecolor=COLORS[2], label=f"high: {config.high}\n(diagonal and sink)"),
        Patch(facecolor=COLORS[1], label=f"low: {config.low}"),
        Patch(facecolor=COLORS[0], edgecolor="#bbbbbb", label="not computed\n(causal)"),
    ]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    try:
        path.write_bytes(picture_bytes(figure, path.suffix[1:], dpi=120, bbox_inches="tight"))
    except OSError as error:
        raise EvalError(f"cannot write '{path}': {error.strerror}") from error
