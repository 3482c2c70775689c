"""Result files: JSON that is either complete or not there."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .errors import EvalError, UsageError

SCHEMA = 1
"""Goes up when a field of a results file changes its meaning or disappears."""


def prepare_folder(path: str) -> Path:
    """Makes the folder for results, so that a wrong path is found before the work and not after it.

    Raises:
        UsageError: if it cannot be made.
    """
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder --output '{path}': {error.strerror}") from error
    return folder


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes ``content`` to ``path`` in one step: a reader sees the old file or the whole new one.

    Raises:
        ValueError: if it holds a NaN or an infinity, which JSON does not have.
        EvalError: if the file cannot be written.
    """
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise EvalError(f"cannot write '{path}': {error.strerror}") from error
