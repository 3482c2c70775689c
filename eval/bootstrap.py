"""Confidence interval of a mean, by drawing blocks of the measurements again and again.

The paired bootstrap of Efron and Tibshirani (1993): the values are differences of two runs on the same
tokens, so what is hard about a token counts in neither's favour. Neighbouring tokens share their context
and are no independent measurements, so whole blocks of them are drawn (Künsch, 1989).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

FEWEST_BLOCKS = 20
"""Of a short text: too few blocks to draw from make an interval that is too narrow."""
CHUNK = 1 << 22  # drawn blocks at a time


@dataclass(frozen=True)
class Bootstrap:
    """How an interval is made.

    block: consecutive values that are drawn together (fewer, where there would be under 20 blocks).
    resamples: how often the mean is taken anew. confidence: of the interval, which lies between
    percentiles of these means. seed: of the draws; the same values give the same interval.
    """

    block: int = 256
    resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        """The fields, as results files hold them."""
        return asdict(self)

    def interval(self, values: Tensor) -> tuple[float, float]:
        """The lower and upper end of the mean of ``values``, a tensor ``[values]`` in their order.

        Raises:
            ValueError: if there are no values.
        """
        if values.numel() == 0:
            raise ValueError("values must not be empty: there is no mean")
        blocks = values.double().split(max(1, min(self.block, len(values) // FEWEST_BLOCKS)))
        sums = torch.stack([block.sum() for block in blocks])
        sizes = torch.tensor([len(block) for block in blocks], dtype=torch.float64)
        generator = torch.Generator().manual_seed(self.seed)
        means = []
        for some in torch.arange(self.resamples).split(max(1, CHUNK // len(blocks))):
            drawn = torch.randint(len(blocks), (len(some), len(blocks)), generator=generator)
            means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
        tail = (1 - self.confidence) / 2
        low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
        return low, high
