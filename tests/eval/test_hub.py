"""The hub: asked once, and left alone inside ``hub_access`` when it does not answer."""

from __future__ import annotations

import pytest
from dma_hf_eval import hub
from huggingface_hub import constants


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
