"""`RangesMask`: query ranges that look like SDPA's mask to a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .masks import START, STOP


class _Content:
    """What a mask and its aliases share: query ranges, until somebody may have written; then numbers."""

    def __init__(self, ranges: Tensor, key_length: int) -> None:
        self.ranges: Tensor | None = ranges
        self._dense: Tensor | None = None
        self._key_length = key_length

    def dense(self) -> Tensor:
        if self.ranges is not None:
            return dense_mask(self.ranges, self._key_length)
        assert self._dense is not None
        return self._dense

    def become_dense(self) -> None:
        self._dense, self.ranges = self.dense(), None


class RangesMask(Tensor):
    """A bool mask [B, 1, M, N] of which only the query ranges exist (`masks.START`).

    Models get their mask from Transformers and hand it to every layer; most never look at it. For those
    that slice it, add to it, count in it or write into it, any operation does what it does on the mask
    that SDPA would have got.
    """

    _content: _Content

    @staticmethod
    def __new__(cls, ranges: Tensor, key_length: int) -> RangesMask:
        shape = (ranges.shape[0], 1, ranges.shape[1], key_length)
        return cls._of(_Content(ranges, key_length), shape, ranges.device)

    @classmethod
    def _of(cls, content: _Content, shape: tuple[int, ...], device: torch.device) -> RangesMask:
        mask: RangesMask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask._content = content
        return mask

    @property
    def ranges(self) -> Tensor | None:
        """int32 [B, M, 4]; None once somebody may have written into the mask or into a view of it."""
        return self._content.ranges

    def dense(self) -> Tensor:
        """The mask: bool [B, 1, M, N]."""
        return self._content.dense()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"RangesMask({self.ranges!r}, key_length={self.shape[-1]})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls._of(first._content, first.shape, first.device)
        if isinstance(first, RangesMask) and first.ranges is not None:
            if func is torch.ops.aten.clone.default:
                return cls(first.ranges.clone(), first.shape[-1])
            if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, torch.bool):
                # accelerate moves masks to the device of each layer
                device = kwargs.get("device")
                return cls(first.ranges.to(device or first.device), first.shape[-1])
        # what is written into a view must be found in the mask, too
        writes = func._schema.is_mutable or any(out.alias_info for out in func._schema.returns)

        def dense(argument: Any) -> Any:
            if not isinstance(argument, RangesMask):
                return argument
            if writes:
                argument._content.become_dense()
            return argument.dense()

        args, kwargs = tree_map(dense, (args, kwargs))
        return func(*args, **kwargs)


def dense_mask(ranges: Tensor, key_length: int) -> Tensor:
    """Query ranges [B, M, 4] as a bool mask [B, 1, M, key_length]."""
    keys = torch.arange(key_length, device=ranges.device)
    seen = (keys >= ranges[..., START, None]) & (keys < ranges[..., STOP, None])
    return seen.unsqueeze(1)
