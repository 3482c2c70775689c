"""What a comparison runs: SDPA first, then DMA in each setting asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dma_hf import DMAConfig

from .errors import UsageError

DEFAULT_CONFIGS = (
    "paper",
    "paper,rotate=true",
    "low=mxfp4,high=mxfp8",
    "low=mxfp8,high=mxfp8",
    "low=none,high=none",
)
"""The published setting, with rotation, with MXFP4, MXFP8 everywhere, and nothing quantised."""


@dataclass(frozen=True)
class Run:
    """One attention to evaluate, under the name its results carry. ``config`` None is SDPA."""

    name: str
    config: DMAConfig | None

    def describe(self) -> dict[str, Any]:
        """The name and settings, as results files hold them."""
        return {"name": self.name, "config": None if self.config is None else self.config.to_dict()}


SDPA = Run("SDPA", None)


def parse_config(text: str) -> DMAConfig:
    """The setting that ``--config`` names, as ``DMAConfig.parse`` reads it.

    Raises:
        UsageError: if it names no preset, field, format or value that exists.
    """
    try:
        return DMAConfig.parse(text)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--config '{text}': {error}") from error


def parse_runs(configs: Sequence[str]) -> list[Run]:
    """SDPA and one run per string of ``parse_config``, which raises for what it cannot read."""
    return [SDPA, *(Run(text, parse_config(text)) for text in configs)]
