"""`memoized`: a cache that `torch.compile` does not complain of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def memoized(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Remembers the results of a pure function of hashable arguments.

    Dynamo warns of every `functools.lru_cache` that it meets: it looks through the cache and traces what
    is behind. A graph is traced once, so here it finds the function itself.
    """
    cached = functools.lru_cache(maxsize=4096)(function)

    @functools.wraps(function)
    def remembered(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return cached(*args, **kwargs)  # type: ignore[arg-type]  # what is not hashable, it refuses

    return remembered
