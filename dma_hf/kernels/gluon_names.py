"""Gluon under one name: what Triton 3.6 and 3.9 call differently, and values with named fields."""

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.core import _aggregate  # Gluon has no public name for it yet

sync_threads = getattr(gl, "barrier", None) or gl.thread_barrier
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_MEMORY = gl.shared_memory_descriptor
reinterpret = getattr(_MEMORY, "reinterpret", None) or _MEMORY._reinterpret


def record(cls: type) -> Any:
    """A class of annotated fields as a value of Gluon's, made of these fields in their order."""

    def __init__(self: Any, *values: Any) -> None:
        for name, value in zip(cls.__annotations__, values, strict=True):
            setattr(self, name, value)

    __init__.__triton_builtin__ = True  # type: ignore[attr-defined]  # called as it is, not compiled
    cls.__init__ = __init__  # type: ignore[misc]
    return _aggregate(cls)
