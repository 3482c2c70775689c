"""A killed evaluation continues where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dma_hf_eval.errors import EvalError
from dma_hf_eval.journal import NO_JOURNAL, Journal, model_fingerprint, text_fingerprint
from dma_hf_eval.loading import load_model

PIECE: dict[str, Any] = {
    "loss": torch.tensor([0.1, 1e-30]),
    "agree": torch.tensor([True]),
    "seconds": 0.1,
    "names": ["a"],
}


def test_a_piece_comes_back_exactly(tmp_path: Path) -> None:
    Journal(tmp_path, "x", model="m").put(PIECE, window=3)
    found = Journal(tmp_path, "x", model="m").get(window=3)
    assert found is not None
    assert all(torch.equal(found.pop(name), PIECE[name]) for name in ("loss", "agree"))
    assert found == {"seconds": 0.1, "names": ["a"]}


def test_other_keys_find_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "x", model="m", context=5)
    journal.put(1.5, window=3)
    assert journal.get(window=4) is None
    assert Journal(tmp_path, "x", model="other", context=5).get(window=3) is None
    assert Journal(tmp_path, "y", model="m", context=5).get(window=3) is None
    assert Journal(tmp_path, "x", context=5, model="m").get(window=3) == 1.5  # whatever the order


def test_finishing_forgets_this_run_only(tmp_path: Path) -> None:
    journal, other = Journal(tmp_path, "x", model="m"), Journal(tmp_path, "x", model="other")
    for one in (journal, other):
        one.put(1, window=1)
        one.put(2, window=2)
    assert (len(journal), len(other)) == (2, 2)
    journal.finish()
    assert (len(journal), len(other)) == (0, 2)


def test_a_damaged_piece_is_measured_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "x")
    journal.put(PIECE, window=1)
    (path,) = tmp_path.rglob("*.pt")
    path.write_bytes(path.read_bytes()[:100])
    assert journal.get(window=1) is None
    journal.put(7, window=1)
    assert journal.get(window=1) == 7


def test_a_piece_cannot_carry_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (print, ("executed",))

    journal = Journal(tmp_path, "x")
    journal.put([Trap()], window=1)
    assert journal.get(window=1) is None


def test_a_full_disk_is_one_error_and_keeps_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, "x")
    journal.put(1, window=1)

    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dma_hf_eval.results.os.replace", full)
        with pytest.raises(EvalError, match="No space left on device"):
            journal.put(2, window=2)
    assert (journal.get(window=1), journal.get(window=2), len(journal)) == (1, None, 1)


def test_no_folder_no_journal() -> None:
    NO_JOURNAL.put(1, window=1)
    assert NO_JOURNAL.get(window=1) is None
    assert len(NO_JOURNAL) == 0
    NO_JOURNAL.finish()


def test_fingerprints_tell_texts_and_models_apart(tiny_folder: Path) -> None:
    assert text_fingerprint("a") == text_fingerprint("a") != text_fingerprint("b")
    assert text_fingerprint(torch.tensor([1, 2])) != text_fingerprint(torch.tensor([2, 1]))
    tiny, builtin = (
        load_model(name, device=torch.device("cpu"), dtype=torch.float32) for name in (str(tiny_folder), None)
    )
    assert model_fingerprint(tiny) == model_fingerprint(tiny) != model_fingerprint(builtin)
    before = model_fingerprint(tiny)
    (tiny_folder / "note.txt").write_text("changed")
    after = model_fingerprint(tiny)
    (tiny_folder / "note.txt").unlink()
    assert after != before
