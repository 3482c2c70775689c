"""The journal of a long evaluation: its finished pieces, so that a killed run continues where it stopped.

A command opens one journal in its ``--output`` (``commands.session.open_journal``), asks it for every
piece of work before doing it, and writes down every piece right after:

    journal = open_journal(options, "recall", environment, model=model_fingerprint(model), samples=6)
    for distance in distances:
        found = journal.get(distance=distance, config=run.describe()["config"])
        if found is None:
            found = measure(distance)
            journal.put(found, distance=distance, config=run.describe()["config"])
    write_results(options, "recall.json", content)
    journal.finish()

The key of a journal is all that every piece depends on (model, hardware, versions, sizes); a run with
another key is another run, and neither finds nor disturbs these pieces. The key of a piece is what tells
it from the other pieces. Both are JSON values. A piece is a number, a string, a tensor, or lists and
dictionaries of such: it comes back exactly as it was, so a continued run gives the result that an
uninterrupted one gives.

Each piece is a file of its own, complete or not there, in the hidden folder ``.NAME-KEY.partial``.
``finish`` removes the folder once the results are written. Without ``--output`` nothing is kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from .loading import BUILTIN_FOLDER, BUILTIN_MODEL, LanguageModel
from .results import write_file

Piece = Any


class Journal:
    """The finished pieces of the run ``name`` with this ``key``. With no folder it keeps nothing.

    Raises:
        TypeError: if the key, or a later piece's key, is not made of JSON values.
    """

    def __init__(self, folder: Path | None, name: str, **key: Any) -> None:
        self.folder = None if folder is None else folder / f".{name}-{_digest(key)}.partial"

    def __len__(self) -> int:
        """How many pieces are finished."""
        if self.folder is None:
            return 0
        return sum(1 for _ in self.folder.glob("*.pt"))

    def get(self, **piece: Any) -> Piece | None:
        """What was written down for ``piece``, on the CPU; None if it is not finished."""
        path = self._path(piece)
        if path is None or not path.is_file():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            return None  # damaged from outside: measured again and overwritten

    def put(self, value: Piece, **piece: Any) -> None:
        """Writes ``piece`` down as finished with the result ``value``, which must not be None.

        Raises:
            EvalError: if it cannot be written. What was finished before stays.
        """
        path = self._path(piece)
        if path is not None:
            data = io.BytesIO()
            torch.save(value, data)
            write_file(path, data.getvalue())

    def finish(self) -> None:
        """Forgets the pieces: the results that they went into are written."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, piece: dict[str, Any]) -> Path | None:
        return None if self.folder is None else self.folder / f"{_digest(piece)}.pt"


NO_JOURNAL = Journal(None, "none")
"""Finds nothing and keeps nothing."""


def text_fingerprint(text: str | torch.Tensor) -> str:
    """What tells a text, or its tokens, from another one: for the key of a journal."""
    data = text.encode() if isinstance(text, str) else text.cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def model_fingerprint(model: LanguageModel) -> list[Any]:
    """What tells a model from another one: the commit on the hub, or the files of its folder.

    The files are told apart by size and date: a checkpoint of 100 GB is not read twice.
    """
    commit = getattr(model.model.config, "_commit_hash", None)
    folder = BUILTIN_FOLDER if model.name == BUILTIN_MODEL else Path(model.name).expanduser()
    files = sorted(path for path in folder.glob("*") if path.is_file()) if folder.is_dir() else []
    return [
        model.name,
        commit,
        *([path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files),
    ]


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
