"""Launches, direct or recorded: what Triton finds out about a call's arguments is found out once.

Triton looks at every argument of every launch, to see whether it has compiled a kernel for such arguments.
One call of DMA is five launches of up to 80 arguments, which took 1,150 µs of host time on a machine where
SDPA takes 19 µs. But for calls of the same shapes, strides, alignment and setting all that is the same. So
the first call is recorded, and later ones hand the compiled kernels their addresses.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

ALIGNMENT = 256
"""Of scratch tensors, in bytes: no less than what fresh tensors have, as kernels are compiled for it."""


class Launches:
    """Where the launchers of the kernels get scratch memory and launch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Scratch memory, for as long as the call."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def output(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the call's result."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Launch a Triton kernel."""
        kernel[grid](*args, **options)


class _Address:
    """Stands for a tensor in a descriptor: its address."""

    address = 0

    def data_ptr(self) -> int:
        return self.address


@dataclass
class _Launch:
    run: Callable[..., None]
    args: list[Any]
    # (place in args, slot, offset in bytes)
    pointers: list[tuple[int, int, int]] = field(default_factory=list)
    # (address of a descriptor in args, slot, offset in bytes)
    descriptors: list[tuple[_Address, int, int]] = field(default_factory=list)


class Recorder(Launches):
    """Launches, and remembers how.

    A call can be repeated if its launches take nothing but `inputs`, as they are, and memory from here.
    """

    def __init__(self, device: torch.device, inputs: Sequence[Tensor | None]) -> None:
        super().__init__(device)
        # inputs are known by what they are, not by where: two may lie interleaved in one allocation
        self._input_slots = {id(tensor): i for i, tensor in enumerate(inputs) if tensor is not None}
        self._spans: list[tuple[int, int]] = [(0, 0)] * len(inputs)
        self._scratch_bytes = 0
        self._scratch: list[tuple[int, int]] = []  # (slot, offset in the scratch memory)
        self._output: tuple[int, tuple[int, ...], torch.dtype] | None = None
        self._launches: list[_Launch] = []
        # one tensor in two places says nothing of two tensors
        self._complete = len(self._input_slots) == sum(tensor is not None for tensor in inputs)
        self._inputs = len(inputs)
        self._keep: list[Tensor] = []  # no address is given out twice

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = super().empty(shape, dtype)
        self._scratch.append((self._register(tensor), self._scratch_bytes))
        self._scratch_bytes += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        return tensor

    def output(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = super().output(shape, dtype)
        self._output = (self._register(tensor), tuple(shape), dtype)
        return tensor

    def _register(self, tensor: Tensor) -> int:
        self._spans.append(_span(tensor))
        self._keep.append(tensor)
        return len(self._spans) - 1

    def _slot(self, tensor: Tensor) -> tuple[int, int] | None:
        if id(tensor) in self._input_slots:
            return self._input_slots[id(tensor)], 0
        address = tensor.data_ptr()
        for slot, (start, stop) in enumerate(self._spans):
            if start <= address < stop:
                return slot, address - start
        return None

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        compiled = kernel[grid](*args, **options)
        if compiled is None:  # Triton's interpreter compiles nothing
            self._complete = False
            return
        values = [*args, *(options[name] for name in kernel.arg_names[len(args) :])]
        launch = _Launch(compiled[(*grid, 1, 1)[:3]], values)
        for place, value in enumerate(values):
            base = getattr(value, "base", None)  # of a tensor descriptor
            tensor = value if isinstance(value, Tensor) else base
            if not isinstance(tensor, Tensor):
                continue
            found = self._slot(tensor)
            if found is None:
                self._complete = False
            elif base is None:
                launch.pointers.append((place, *found))
                values[place] = 0  # a recording keeps no tensor alive
            else:
                address = _Address()
                values[place] = copy.copy(value)
                values[place].base = address
                launch.descriptors.append((address, *found))
        self._launches.append(launch)

    def recording(self) -> Recording | None:
        """What was recorded; None if a launch read something else."""
        if not self._complete or self._output is None:
            return None
        return Recording(
            self.device, self._inputs, self._launches, self._scratch, self._scratch_bytes, self._output
        )


class Recording:
    """The launches of one call, for others with inputs of the same shapes, strides and alignment."""

    def __init__(
        self,
        device: torch.device,
        inputs: int,
        launches: list[_Launch],
        scratch: list[tuple[int, int]],
        scratch_bytes: int,
        output: tuple[int, tuple[int, ...], torch.dtype],
    ) -> None:
        self._device, self._inputs, self._launches = device, inputs, launches
        self._scratch, self._scratch_bytes, self._output = scratch, scratch_bytes, output
        self._addresses = [0] * (inputs + len(scratch) + 1)
        self._lock = threading.Lock()  # addresses are written into what threads share

    def __call__(self, inputs: Sequence[Tensor | None]) -> Tensor:
        """Launch with other inputs, as many as were recorded; gives the output."""
        slot, shape, dtype = self._output
        out = torch.empty(shape, dtype=dtype, device=self._device)
        scratch = torch.empty(self._scratch_bytes, dtype=torch.uint8, device=self._device)
        start = scratch.data_ptr()
        stream = driver.active.get_current_stream(self._device.index)
        with self._lock:
            addresses = self._addresses
            for i, tensor in enumerate(inputs):
                addresses[i] = 0 if tensor is None else tensor.data_ptr()
            for i, offset in self._scratch:
                addresses[i] = start + offset
            addresses[slot] = out.data_ptr()
            for launch in self._launches:
                args = launch.args
                for place, i, offset in launch.pointers:
                    args[place] = addresses[i] + offset
                for address, i, offset in launch.descriptors:
                    address.address = addresses[i] + offset
                launch.run(*args, stream=stream)
        return out


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address of a contiguous tensor, and the one behind the last."""
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()
