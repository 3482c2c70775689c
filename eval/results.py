"""Result files: complete or not there."""

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
        UsageError: if it cannot be made, or nothing can be written into it.
    """
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder --output '{path}': {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write into the folder --output '{path}'")
    return folder


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes ``content`` to ``path`` as ``write_file`` does.

    Raises:
        ValueError: if it holds a NaN or an infinity, which JSON does not have.
        EvalError: if the file cannot be written.
    """
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_file(path, text.encode())


def write_file(path: Path, content: bytes) -> None:
    """Writes ``content`` to ``path`` in one step: a reader sees the old file or the whole new one.

    The folder is made if it is missing.

    Raises:
        EvalError: if the file cannot be written.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(handle)  # before the new name: a full disk or a crash must not leave it empty
            os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise EvalError(f"cannot write '{path}': {error.strerror}") from error
