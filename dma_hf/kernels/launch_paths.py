"""How a compiled kernel is launched again: as Triton does it, or by Triton's C function alone.

Around that C function Triton's Python looks for hooks, asks for scratch memory and encodes every descriptor
of the copy engine, on each launch anew. Without a driver behind it that took 3 µs for a launch of 30
arguments and 12 µs for one with five descriptors; the C function alone, its arguments prepared, 0.5 and 1.1.

The C function is private. So it is called only where its arguments are known to be what this file writes, and
while no profiler listens; everywhere else the public path launches.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any

import triton
from triton.backends.nvidia import driver as nvidia

STREAM_PLACEHOLDER = 0

_KNOWN_ARGUMENTS = "iiiKKppOOOOOO"
"""What precedes a kernel's own arguments in the C function of Triton 3.6, in the letters of PyArg_ParseTuple.

Grid (3), stream, kernel, cooperative grid, dependent launch, two scratch memories, (warps, CTAs, shared
memory), launch metadata, two hooks. Triton 3.9 has another function; there the public path launches.
"""


@dataclass(frozen=True)
class LaunchPath:
    """A function that launches one compiled kernel on one grid.

    Attributes:
        launch: takes `leading`, then the kernel's arguments, where a pointer is an address.
        leading: what comes first; the stream belongs at `stream_place`.
        expand: a descriptor, by its position among the kernel's descriptors, as the arguments that stand for
            it. Only the first depends on its address.
    """

    launch: Callable[..., None]
    leading: tuple[Any, ...]
    stream_place: int
    expand: Callable[[Any, int], list[Any]]


def public_path(compiled: Any, grid: tuple[int, int, int]) -> LaunchPath:
    """Launches as Triton does."""
    run = compiled[grid]

    def launch(stream: int, *args: Any) -> None:
        run(*args, stream=stream)

    return LaunchPath(launch, (STREAM_PLACEHOLDER,), 0, lambda descriptor, position: [descriptor])


def direct_path(compiled: Any, grid: tuple[int, int, int], descriptors: int) -> LaunchPath | None:
    """Launches with the C function; None where this Triton, or this kernel, asks for more.

    Args:
        descriptors: how many of the kernel's arguments are descriptors.
    """
    launcher: Any = getattr(compiled, "run", None)
    if (
        getattr(nvidia, "_BASE_ARGS_FORMAT", None) != _KNOWN_ARGUMENTS
        or type(launcher) is not nvidia.CudaLauncher
    ):
        return None
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None  # memory that Triton allocates on each launch
    encodings = getattr(compiled.metadata, "tensordesc_meta", None) or ()
    if len(encodings) != descriptors or None in encodings:
        return None  # on hardware without a copy engine a descriptor is other arguments
    launch = launcher.launch
    if descriptors and inspect.isfunction(launch):  # wrapped in what encodes them
        launch = inspect.getclosurevars(launch).nonlocals.get("launcher")
    if not isinstance(launch, BuiltinFunctionType):
        return None
    leading = (
        *grid, STREAM_PLACEHOLDER, compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl,
        None, None, compiled.packed_metadata, None, None, None,
    )  # fmt: skip
    expand = nvidia.make_tensordesc_arg
    return LaunchPath(
        launch, leading, 3, lambda descriptor, position: expand(descriptor, encodings[position])
    )


def launches_are_observed() -> bool:
    """Whether a hook, as profilers set them, wants to be called at each launch."""
    runtime = triton.knobs.runtime
    return _calls(runtime.launch_enter_hook) or _calls(runtime.launch_exit_hook)


def _calls(hook: Any) -> bool:
    # a chain of hooks, which may be empty, or in older code a function
    return hook is not None and bool(getattr(hook, "calls", True))


class _Address:
    """Stands for a tensor in a descriptor: its address."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def with_address(descriptor: Any, address: int) -> Any:
    """A copy of a tensor descriptor for other memory; it keeps no tensor alive."""
    moved = copy.copy(descriptor)
    moved.base = _Address(address)
    return moved
