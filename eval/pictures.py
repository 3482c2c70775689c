"""Figures as files that are the same whenever the figure is."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure


def picture_bytes(figure: Figure, format: str = "svg", **options: Any) -> bytes:
    """The content of a file with ``figure``. ``options`` are those of ``Figure.savefig``."""
    image = io.BytesIO()
    # with a fixed salt and no date the same figure is the same file
    with matplotlib.rc_context({"svg.hashsalt": "dma-hf"}):
        metadata = {"Date": None} if format == "svg" else None
        figure.savefig(image, format=format, metadata=metadata, **options)
    return image.getvalue()
