"""Two models in lockstep: each attention call of the second gets the inputs that the first one's got.

The outputs of a model cannot judge attention where one float32 rounding makes another output of them, as in
a detector that keeps the best of nearly equal proposals, or where they hardly depend on it. Its calls can:
every result is compared, then replaced by the first model's, so that no difference reaches the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import Tensor
from transformers import AttentionInterface

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Lockstep:
    """What two models gave.

    Attributes:
        expected, actual: the outputs of the first and the second, and their attention calls as
            "attention call 0", "attention call 1", ... [B, M, H, Dv].
    """

    expected: dict[str, Tensor]
    actual: dict[str, Tensor]


def in_lockstep(first: Callable[[], Outputs], second: Callable[[], Outputs]) -> Lockstep:
    """Runs two models of the same weights on the same inputs.

    Only calls that go through Transformers' AttentionInterface are compared and replaced; code of a
    model's own is the same in both.

    Args:
        first: runs the model that is right, and returns its outputs.
        second: runs the other one, whose attention calls must come in the same order.
    """
    right: list[Tensor] = []
    given: list[Tensor] = []

    def keep(out: Tensor) -> Tensor:
        right.append(out.clone())  # models may write into what they get
        return out

    def replaced(out: Tensor) -> Tensor:
        given.append(out)
        return right[len(given) - 1].clone() if len(given) <= len(right) else out

    with _attention_results(keep):
        expected = dict(first())
    with _attention_results(replaced):
        actual = dict(second())
    return Lockstep(expected | _named(right), actual | _named(given))


def _named(results: list[Tensor]) -> dict[str, Tensor]:
    return {f"attention call {number}": result for number, result in enumerate(results)}


@contextmanager
def _attention_results(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Lets `change` see and replace the result of every call through the AttentionInterface."""
    find = AttentionInterface.get_interface

    def changed(self: AttentionInterface, implementation: str, default: Callable[..., Any]) -> Any:
        attention = find(self, implementation, default)

        def call(*arguments: Any, **named: Any) -> tuple[Any, ...]:
            out, *weights = attention(*arguments, **named)
            return change(out), *weights

        return call

    with patch.object(AttentionInterface, "get_interface", changed):
        yield
