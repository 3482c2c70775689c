"""`RangesMask`: query ranges that look like SDPA's mask to a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .masks import START, STOP


class _Content:
    """What a mask and its aliases share: query ranges, until somebody may have written; then numbers."""

    def __init__(self, ranges: Tensor, key_length: int, dtype: torch.dtype) -> None:
        self.ranges: Tensor | None = ranges
        self._dense: Tensor | None = None
        self._key_length, self._dtype = key_length, dtype

    def dense(self) -> Tensor:
        if self.ranges is not None:
            seen = dense_mask(self.ranges, self._key_length)
            if self._dtype == torch.bool:
                return seen
            zero, hidden = (
                seen.new_full((), x, dtype=self._dtype) for x in (0, torch.finfo(self._dtype).min)
            )
            return torch.where(seen, zero, hidden)
        assert self._dense is not None
        return self._dense

    def become_dense(self) -> None:
        self._dense, self.ranges = self.dense(), None


class RangesMask(Tensor):
    """A mask [B, 1, M, N] of which only the query ranges exist (`masks.START`).

    Models get their mask from Transformers and hand it to every layer; most never look at it. For those
    that slice it, add to it, count in it or write into it, any operation does what it does on the mask
    that SDPA would have got: bool; or, with a floating-point `dtype`, on the additive mask that "eager"
    would have got.
    """

    _content: _Content

    @staticmethod
    def __new__(cls, ranges: Tensor, key_length: int, dtype: torch.dtype = torch.bool) -> RangesMask:
        shape = (ranges.shape[0], 1, ranges.shape[1], key_length)
        return cls._of(_Content(ranges, key_length, dtype), shape, dtype, ranges.device)

    @classmethod
    def _of(
        cls, content: _Content, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> RangesMask:
        mask: RangesMask = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        mask._content = content
        return mask

    @property
    def ranges(self) -> Tensor | None:
        """int32 [B, M, 4]; None once somebody may have written into the mask or into a view of it."""
        return self._content.ranges

    def dense(self) -> Tensor:
        """The mask: [B, 1, M, N] in `dtype`."""
        return self._content.dense()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"RangesMask({self.ranges!r}, key_length={self.shape[-1]})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as no class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # under inference_mode composite operations such as `to` arrive whole, not as what they are made of
        parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        first: Any = args[0] if args else None
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls._of(first._content, first.shape, first.dtype, first.device)
        if isinstance(first, RangesMask) and first.ranges is not None:
            if func is torch.ops.aten.clone.default:
                return cls(first.ranges.clone(), first.shape[-1], first.dtype)
            if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, first.dtype):
                # accelerate moves masks to the device of each layer
                device = kwargs.get("device")
                return cls(first.ranges.to(device or first.device), first.shape[-1], first.dtype)
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
