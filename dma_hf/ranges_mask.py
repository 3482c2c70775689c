"""`RangesMask`: query ranges that look like SDPA's mask to a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .masks import START, STOP


class RangesMask(Tensor):
    """A bool mask [B, 1, M, N] of which only the query ranges exist (`masks.START`).

    Models get their mask from Transformers and hand it to every layer; most never look at it. For those
    that slice it, add to it or count in it, any operation makes the mask that SDPA would have got.

    Attributes:
        ranges: int32 [B, M, 4].
    """

    ranges: Tensor

    @staticmethod
    def __new__(cls, ranges: Tensor, key_length: int) -> RangesMask:
        shape = (ranges.shape[0], 1, ranges.shape[1], key_length)
        mask: RangesMask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=ranges.device)
        mask.ranges = ranges
        return mask

    def dense(self) -> Tensor:
        """The mask: bool [B, 1, M, N]."""
        return dense_mask(self.ranges, self.shape[-1])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"RangesMask({self.ranges!r}, key_length={self.shape[-1]})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].ranges, args[0].shape[-1])
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, torch.bool):
            # accelerate moves masks to the device of each layer
            device = kwargs.get("device")
            return cls(args[0].ranges.to(device or args[0].device), args[0].shape[-1])
        args, kwargs = tree_map(lambda x: x.dense() if isinstance(x, RangesMask) else x, (args, kwargs))
        return func(*args, **kwargs)


def dense_mask(ranges: Tensor, key_length: int) -> Tensor:
    """Query ranges [B, M, 4] as a bool mask [B, 1, M, key_length]."""
    keys = torch.arange(key_length, device=ranges.device)
    seen = (keys >= ranges[..., START, None]) & (keys < ranges[..., STOP, None])
    return seen.unsqueeze(1)
