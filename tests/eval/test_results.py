"""Result files are complete or not there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from dma_hf_eval.errors import EvalError, UsageError
from dma_hf_eval.results import prepare_folder, write_json


def test_content_survives(tmp_path: Path) -> None:
    path = prepare_folder(str(tmp_path / "new" / "results")) / "x.json"
    write_json(path, {"name": "Δ", "value": 0.1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "Δ", "value": 0.1}
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_nan_is_refused_and_the_old_file_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"value": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"value": math.nan})
    assert json.loads(path.read_text()) == {"value": 1}


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dma_hf_eval.results.os.replace", full)
    with pytest.raises(EvalError, match="No space left on device"):
        write_json(tmp_path / "x.json", {"value": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot make the folder --output"):
        prepare_folder(str(tmp_path / "file" / "results"))
