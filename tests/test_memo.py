"""`memoized`: once for each set of arguments, and no cache for `torch.compile` to look through."""

from __future__ import annotations

import pytest

from dma_hf.memo import memoized


def test_a_result_is_computed_once_for_each_set_of_arguments():
    calls = []

    @memoized
    def double(number: int, *, offset: int = 0) -> int:
        """Twice a number."""
        calls.append(number)
        return 2 * number + offset

    assert [double(2), double(2), double(3), double(2, offset=1)] == [4, 4, 6, 5]
    assert calls == [2, 3, 2]
    assert double.__doc__ == "Twice a number."


def test_arguments_must_be_hashable():
    with pytest.raises(TypeError, match="unhashable"):
        memoized(len)([1])
