"""Reads Transformers' mask functions: what pattern of keys a model asks for.

Transformers describes a mask as a composition of small functions of (batch, head, query, key) indices
(`transformers.masking_utils`). Evaluated, they give M x N numbers; read, they give a few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

MaskFunction = Callable[..., Any]


@dataclass(frozen=True)
class Pattern:
    """Keys that form one range for each query.

    Attributes:
        causal: no key behind the query.
        left, right: how many keys before and behind itself a query sees, at most.
        chunk: only keys of the query's own chunk of so many tokens.
        sequence_ids: integer [B, N]: only keys with the query's number (packed sequences).
    """

    causal: bool = False
    left: int | None = None
    right: int | None = None
    chunk: int | None = None
    sequence_ids: Tensor | None = None

    def limits(self, key_length: int, key_offset: int = 0) -> Pattern:
        """The same without a window or chunk that reaches beyond all keys.

        Args:
            key_length, key_offset: how many keys there are, and the position of the first.
        """
        left = None if self.left is None or self.left >= key_length - 1 else self.left
        right = None if self.right is None or self.right >= key_length - 1 else self.right
        chunk = None if self.chunk is None or self.chunk >= key_offset + key_length else self.chunk
        return replace(self, left=left, right=right, chunk=chunk)


def read_mask_function(function: MaskFunction) -> Pattern | None:
    """The pattern of a mask function; None for one that this module cannot read.

    The functions close over their numbers, so their names and closures say what they do. One that is not
    known, or changes in a later Transformers, is not guessed at: its mask is made the ordinary way.
    """
    if function is causal_mask_function:
        return Pattern(causal=True)
    if function is bidirectional_mask_function:
        return Pattern()
    if getattr(function, "__module__", None) != causal_mask_function.__module__:
        return None
    closure = _closure(function)
    match getattr(function, "__qualname__", "").partition(".")[0], closure:
        case "and_masks", {"mask_functions": functions}:
            return _intersection(functions)
        case "sliding_window_overlay", {"sliding_window": int(window)}:
            return Pattern(left=window - 1)
        case "sliding_window_bidirectional_overlay", {"sliding_window": int(window)}:
            return Pattern(left=window, right=window)
        case "chunked_overlay", {"chunk_size": int(size)}:
            return Pattern(chunk=size)
        case "packed_sequence_mask_function", {"packed_sequence_mask": Tensor() as ids}:
            return Pattern(sequence_ids=ids)
        case "remap_positions_for_packed_sequence", {"mask_function": inner}:
            # positions of a sequence rise by one, so distances are what they were; where its chunks
            # begin is not
            pattern = read_mask_function(inner)
            return None if pattern is None or pattern.chunk is not None else pattern
    return None


def _closure(function: MaskFunction) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _intersection(functions: tuple[MaskFunction, ...]) -> Pattern | None:
    result = Pattern()
    for function in functions:
        part = read_mask_function(function)
        if part is None:
            return None
        for name in ("chunk", "sequence_ids"):
            if getattr(result, name) is not None and getattr(part, name) is not None:
                return None
        result = Pattern(
            causal=result.causal or part.causal,
            left=_smaller(result.left, part.left),
            right=_smaller(result.right, part.right),
            chunk=part.chunk if result.chunk is None else result.chunk,
            sequence_ids=part.sequence_ids if result.sequence_ids is None else result.sequence_ids,
        )
    if result.chunk is not None and result.sequence_ids is not None:
        # versions of Transformers differ in where the chunks of packed sequences begin
        return None
    return result


def _smaller(first: int | None, second: int | None) -> int | None:
    if first is None or second is None:
        return second if first is None else first
    return min(first, second)
