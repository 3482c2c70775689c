"""The environment that results carry."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
import torch
from dma_hf_eval import environment
from dma_hf_eval.environment import describe_environment

import dma_hf


def test_versions_and_command() -> None:
    found = describe_environment(
        ["dma-eval", "perplexity", "--text", "a b.txt"], device=torch.device("cpu"), dtype=torch.float32
    )
    assert json.loads(json.dumps(found)) == found
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    assert found["python"] == platform.python_version()
    assert (found["torch"], found["dma_hf"]) == (torch.__version__, dma_hf.__version__)
    assert found["command"] == "dma-eval perplexity --text 'a b.txt'"
    assert "cores" in found["hardware"]
    assert datetime.fromisoformat(found["date"]).tzinfo is not None


def test_the_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "eval").mkdir()
    module = tmp_path / "eval" / "environment.py"
    module.write_text("first")
    monkeypatch.setattr(environment, "__file__", str(module))
    git("init")
    assert environment._git_commit() == (None, None)  # no commit yet
    git("add", ".")
    git("commit", "-m", "one")
    commit, dirty = environment._git_commit()
    assert commit is not None
    assert (len(commit), dirty) == (40, False)
    module.write_text("second")
    assert environment._git_commit() == (commit, True)

    # Installed somewhere below a checkout: that checkout is not ours.
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "venv" / "eval" / "environment.py"))
    (tmp_path / "venv").mkdir()
    assert environment._git_commit() == (None, None)
