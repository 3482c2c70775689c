"""The results files of a folder: which there are, which cannot be read and why, which are missing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import UsageError

SCHEMAS = Path(__file__).parents[1] / "schemas"

KINDS = {
    "perplexity": "perplexity and divergence from SDPA",
    "recall": "recall by distance",
    "tasks": "task accuracy",
    "layers": "error by layer and head",
    "speed": "speed and memory of the whole model",
    "kernels": "speed of attention alone",
    "calibrate": "calibration to a quality budget",
    "models": "supported model types",
}
"""The commands whose results a report shows, in its order, and what they measure."""

CONFIGS = ("calibrated.json",)
"""What the commands write beside their results: settings for ``--config``, which the results repeat."""


@dataclass(frozen=True)
class ResultsFile:
    """One file that was read. ``kind`` is the command that wrote it, one of ``KINDS``."""

    name: str
    kind: str
    content: dict[str, Any]

    @property
    def environment(self) -> dict[str, Any]:
        """Where it was measured, see ``environment``."""
        return self.content["environment"]

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Its entries."""
        return self.content["runs"]

    @property
    def on_cpu(self) -> bool:
        """Whether it was measured without a GPU, so that its times say nothing about one."""
        return str(self.environment["device"]).startswith("cpu")


@dataclass
class Results:
    """All results of a folder."""

    folder: Path
    files: list[ResultsFile] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    """File names and why: not JSON, another schema, fields that are missing."""
    unknown: list[str] = field(default_factory=list)
    """Names of JSON files that no command of dma-eval writes."""

    def of(self, kind: str) -> list[ResultsFile]:
        """The files of one kind."""
        return [file for file in self.files if file.kind == kind]

    @property
    def missing(self) -> list[str]:
        """The kinds of which there is no file."""
        return [kind for kind in KINDS if not self.of(kind)]


def read_results(folder: Path) -> Results:
    """Reads ``KIND.json`` and ``KIND_ANYTHING.json`` of ``folder``.

    Raises:
        UsageError: if there is no such folder, or nothing in it that a report could be made of.
    """
    if not folder.is_dir():
        raise UsageError(f"DIR '{folder}': no such folder")
    results = Results(folder)
    for path in sorted(folder.glob("*.json")):
        kind = path.stem.partition("_")[0]
        if path.name in CONFIGS:
            continue
        if kind not in KINDS:
            results.unknown.append(path.name)
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            results.unreadable[path.name] = f"is no JSON: {error}"
            continue
        fault = _fault(content, kind)
        if fault is None:
            results.files.append(ResultsFile(path.name, kind, content))
        else:
            results.unreadable[path.name] = fault
    results.files.sort(key=lambda file: (list(KINDS).index(file.kind), file.name))
    if not results.files:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in results.unreadable.items())
        raise UsageError(
            f"DIR '{folder}' holds no results of dma-eval{' that can be read: ' if reasons else ''}{reasons}"
        )
    return results


def _fault(content: Any, kind: str) -> str | None:
    """Why a file cannot be shown; None if it can. Not a full validation: the tests of the writers do that."""
    schema = _schema(kind)
    if not isinstance(content, dict):
        return "holds no JSON object"
    version = schema["properties"]["schema"].get("const", _schema("common")["$defs"]["schema"]["const"])
    if content.get("schema") != version:
        return (
            f"has schema {content.get('schema')}, and this version of dma-eval reads schema {version}:"
            f" measure again with dma-eval {kind}"
        )
    absent = [name for name in schema["required"] if name not in content]
    absent += [
        f"environment.{name}" for name in _environment_fields() if name not in content.get("environment", {})
    ]
    run_fields = schema["properties"].get("runs", {}).get("items", {}).get("required", [])
    absent += sorted(
        {f"runs[].{name}" for run in content.get("runs", []) for name in run_fields if name not in run}
    )
    if absent:
        return f"lacks {', '.join(absent)}"
    if not content.get("runs", [None]):
        return "holds no runs"
    return None


def _environment_fields() -> list[str]:
    return _schema("common")["$defs"]["environment"]["required"]


@lru_cache(maxsize=len(KINDS) + 1)
def _schema(name: str) -> dict[str, Any]:
    return json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
