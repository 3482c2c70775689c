"""Two models in lockstep: what differs is seen where it arises, and goes no further."""

from __future__ import annotations

import pytest
import torch
from dma_hf_eval.lockstep import in_lockstep
from dma_hf_eval.tiny_models import TinyModel, tensors, tiny_model
from torch import Tensor

from dma_hf import plugin

LLAMA = tiny_model("llama")


def run(attention: str, tiny: TinyModel = LLAMA) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(tensors(tiny.build(attention)(**tiny.inputs, use_cache=False)))


def test_calls_and_outputs_have_names_and_are_equal_for_equal_models() -> None:
    both = in_lockstep(lambda: run("sdpa"), lambda: run("sdpa"))
    assert list(both.expected) == list(both.actual) == ["logits", "attention call 0", "attention call 1"]
    for name, value in both.expected.items():
        assert torch.equal(value, both.actual[name])


def test_a_difference_is_seen_in_its_call_and_reaches_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    attend, calls = plugin.attend, []

    def wrong_once(*arguments: Tensor, **named: object) -> Tensor:
        calls.append(arguments)
        return attend(*arguments, **named) * (1.5 if len(calls) == 1 else 1)

    monkeypatch.setattr(plugin, "attend", wrong_once)
    both = in_lockstep(lambda: run("sdpa"), lambda: run("dma"))
    assert len(calls) == 2
    first = both.expected["attention call 0"]
    assert (both.actual["attention call 0"] - first).abs().max() > 0.1 * first.abs().max()
    assert torch.equal(both.actual["logits"], both.expected["logits"])


def test_eager_attention_is_intercepted_too() -> None:
    both = in_lockstep(lambda: run("eager"), lambda: run("sdpa"))
    assert len(both.expected) == len(both.actual) == 3
    torch.testing.assert_close(both.actual["attention call 0"], both.expected["attention call 0"])


def test_a_call_too_many_is_no_output_of_the_other() -> None:
    both = in_lockstep(lambda: run("sdpa"), lambda: run("sdpa") and run("sdpa"))
    assert both.actual.keys() - both.expected.keys() == {"attention call 2", "attention call 3"}
