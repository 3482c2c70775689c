"""The bundled tasks, as task files of lm-eval: they need no download."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
"""For lm-eval's ``--include_path``."""
GROUP = "dma"
"""The group of tasks that a context of 4,096 tokens holds."""
