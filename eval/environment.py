"""Where a result comes from: hardware, versions, commit, date and command line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import dma_hf


def describe_environment(
    command: Sequence[str], *, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """What is needed to judge and repeat a result, as plain JSON values.

    Args:
        command: the command line, program name first.
        device: where the model ran.
        dtype: of its weights and activations.
    """
    commit, dirty = _git_commit()
    return {
        "hardware": _hardware(device),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "dma_hf": dma_hf.__version__,
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(command),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {_usable_cores()} cores, {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _usable_cores() -> int | None:
    # A container may use fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _git_commit() -> tuple[str | None, bool | None]:
    """The commit of the checkout this file is in and whether it was changed since.

    Untracked files and results do not count. (None, None) for an installed package, even one that lies inside
    somebody else's checkout. A copy of a clean checkout without its history, as it is sent to another
    machine, may name its commit in DMA_HF_COMMIT.
    """
    exported = os.environ.get("DMA_HF_COMMIT")
    if exported:
        return exported, False
    root = Path(__file__).resolve().parents[1]
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != root:
            return None, None
        # results are what the code writes, not the code
        changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!eval/results")
        return _git(root, "rev-parse", "HEAD"), bool(changes)
    except (OSError, subprocess.CalledProcessError):  # no git, no repository, no commit
        return None, None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
