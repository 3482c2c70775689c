"""`Modifiers`: what one call of attention changes about softmax(QK^T)V, besides causality."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Modifiers:
    """What a call adds to attention. All None: nothing.

    Attributes:
        query_ranges: int32 [B, M, 4]: the keys that each query sees, see `masks.START`. It says all
            that `causal` would say.
        mask: [B or 1, H or 1, M, N]; bool, True where a query sees a key; or floating point, added to
            the scores in units of the natural logarithm (-inf: not seen).
        softcap: scores become softcap * tanh(score / softcap), before `mask` is added.
        sinks: [H], floating point: a score in each row's softmax that no value belongs to.
    """

    query_ranges: Tensor | None = None
    mask: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is changed."""
        return self.query_ranges is None and self.mask is None and self.softcap is None and self.sinks is None

    @property
    def absolute_scores(self) -> bool:
        """Whether scores must be exact to a constant for each row.

        Softmax takes any constant, so smoothed keys are normally never put right.
        """
        return self.softcap is not None or self.sinks is not None


NO_MODIFIERS = Modifiers()


def additive_mask(mask: Tensor) -> Tensor:
    """A mask as what is added to scores in units of log2, float32.

    The smallest float that a model writes for "not seen" stays finite, so that a row that sees no key
    gets the mean of all values, as in SDPA; only -inf is -inf.
    """
    if mask.dtype == torch.bool:
        return torch.where(mask, 0.0, -torch.inf)
    lowest = torch.finfo(torch.float32).min
    return torch.where(mask == -torch.inf, -torch.inf, (mask.float() * LOG2_E).clamp(min=lowest))
