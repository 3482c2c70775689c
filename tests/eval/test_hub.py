"""The hub: asked once, and left alone inside ``hub_access`` when it does not answer."""

from __future__ import annotations

import pytest
from dma_hf_eval import hub
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError


@pytest.mark.parametrize("reachable", [True, False])
def test_an_unreachable_hub_is_not_asked_again(monkeypatch: pytest.MonkeyPatch, reachable: bool) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: reachable)
    with hub.hub_access():
        assert constants.HF_HUB_OFFLINE is not reachable
    assert constants.HF_HUB_OFFLINE is False


def test_no_answer_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://localhost:1")  # nothing listens on port 1
    assert hub.hub_is_reachable.__wrapped__() is False


def wrapped(cause: Exception) -> OSError:
    """As Transformers and Datasets wrap the hub's errors in their own."""
    error = OSError("something went wrong\nin several lines")
    error.__cause__ = cause
    return error


def answered(kind: type[Exception]) -> Exception:
    """An error of the hub's client without the HTTP response that it insists on."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "explanation"),
    [
        (wrapped(answered(GatedRepoError)), "it is gated: accept its terms at https://"),
        (wrapped(answered(RepositoryNotFoundError)), "the hub has no such repository, or it is private"),
        (wrapped(LocalEntryNotFoundError("not there")), "not in the local cache, and the hub cannot be"),
        (ConnectionError("Couldn't reach it"), "not in the local cache, and the hub cannot be reached"),
        (wrapped(ValueError("other")), "something went wrong"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    error: Exception, explanation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert explanation in hub.explain(error, "org/model")
    assert "\n" not in hub.explain(error, "org/model")


def test_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in hub.explain(ConnectionError("offline"), "org/model")
