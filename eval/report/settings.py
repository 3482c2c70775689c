"""Settings of DMA across results files: the same configuration is the same setting, whatever its name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dma_hf import DMAConfig
from dma_hf.config import AUTO

from .results import Results

Config = Mapping[str, Any] | None
"""The fields of a ``DMAConfig`` as results files hold them; None is SDPA."""

CALIBRATED = "calibrated"
"""The name of a setting that ``dma-eval calibrate`` chose, if no other file names it."""


@dataclass(frozen=True)
class Setting:
    """One setting of DMA, under the name that its first results carry."""

    name: str
    config: dict[str, Any]

    def matches(self, config: Config) -> bool:
        """Whether a run had this setting."""
        return config is not None and identity(config) == identity(self.config)

    @property
    def depends_on_hardware(self) -> bool:
        """Whether the hardware decides its formats: "auto" is not the same everywhere."""
        return AUTO in (self.config["low"], self.config["high"], self.config.get("pv"))

    @property
    def is_control(self) -> bool:
        """Whether nothing is quantised: it must equal SDPA, and shows how exact the comparison is."""
        formats = (self.config["low"], self.config["high"], self.config.get("pv", "none"))
        return formats == ("none",) * 3 and not self.config.get("layers")


def identity(config: Config) -> str:
    """Equal for equal configurations; what an older file does not have is at its default."""
    if config is not None:
        with suppress(TypeError, ValueError):  # a field or value of another version: as it stands
            config = DMAConfig.from_dict(dict(config)).to_dict()
    return json.dumps(config, sort_keys=True)


def settings_of(results: Results) -> list[Setting]:
    """Every setting that some file has runs of, in the order of the files."""
    found: dict[str, Setting] = {}
    for file in results.files:
        if file.kind == "calibrate":
            config = file.content["config"]
            found.setdefault(identity(config), Setting(CALIBRATED, config))
        for run in file.content.get("runs", []):
            config = run.get("config")
            if isinstance(config, dict):
                name = str(run.get("name") or run.get("provider", "")).removeprefix("DMA ")
                found.setdefault(identity(config), Setting(name, config))
    return list(found.values())


def baseline_of(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The run of SDPA, None if there is none."""
    return next((run for run in runs if run["config"] is None), None)


def run_of(runs: Sequence[Mapping[str, Any]], setting: Setting) -> Mapping[str, Any] | None:
    """The first run with this setting, None if there is none."""
    return next((run for run in runs if setting.matches(run["config"])), None)
