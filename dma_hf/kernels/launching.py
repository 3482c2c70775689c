"""Launches, direct or recorded: what Triton finds out about a call's arguments is found out once.

Triton looks at every argument of every launch, to see whether it has compiled a kernel for such arguments.
One call of DMA is six launches of up to 80 arguments, which took 1,150 µs of host time on a machine where
SDPA takes 19 µs. But for calls of the same shapes, strides, alignment and setting all that is the same. So
the first call is recorded, and later ones hand the compiled kernels their addresses.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from .launch_paths import LaunchPath, direct_path, launches_are_observed, public_path, with_address

ALIGNMENT = 256
"""Of scratch tensors, in bytes: no less than what fresh tensors have, as kernels are compiled for it."""

ENCODED_DESCRIPTORS = 16
"""Addresses for which a launch remembers a descriptor; an allocator gives out the same few again."""


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


class Recorder(Launches):
    """Launches, and remembers how.

    A call can be repeated if its launches take nothing but `inputs`, as they are, and memory from here. Where
    two inputs are one tensor, they must be one in every call that repeats this one.
    """

    def __init__(self, device: torch.device, inputs: Sequence[Tensor | None]) -> None:
        super().__init__(device)
        # inputs are known by what they are, not by where: two may lie interleaved in one allocation
        self._input_slots = {id(tensor): i for i, tensor in enumerate(inputs) if tensor is not None}
        # an address that varies from call to call has a slot: of an input, the scratch memory, the output
        self._scratch_slot, self._output_slot = len(inputs), len(inputs) + 1
        self._spans: list[tuple[int, int, int, int]] = []  # (first address, end, slot, offset of the first)
        self._scratch_bytes = 0
        self._keep: list[Tensor] = []  # no address is given out twice
        self._complete = True
        self._public = _Launches(len(inputs) + 3)
        self._direct: _Launches | None = _Launches(len(inputs) + 3)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = super().empty(shape, dtype)
        self._register(tensor, self._scratch_slot, self._scratch_bytes)
        self._scratch_bytes += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        return tensor

    def output(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = super().output(shape, dtype)
        self._register(tensor, self._output_slot, 0)
        return tensor

    def _register(self, tensor: Tensor, slot: int, offset: int) -> None:
        start = tensor.data_ptr()
        self._spans.append((start, start + tensor.numel() * tensor.element_size(), slot, offset))
        self._keep.append(tensor)

    def _find(self, tensor: Tensor) -> tuple[int, int] | None:
        """Slot of a tensor's memory, and where in it the tensor begins, in bytes."""
        if id(tensor) in self._input_slots:
            return self._input_slots[id(tensor)], 0
        address = tensor.data_ptr()
        for start, stop, slot, offset in self._spans:
            if start <= address < stop:
                return slot, address - start + offset
        return None

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        compiled = kernel[grid](*args, **options)
        if compiled is None:  # Triton's interpreter compiles nothing
            self._complete = False
            return
        values = [*args, *(options[name] for name in kernel.arg_names[len(args) :])]
        found: list[tuple[int, int] | None] = []
        for value in values:
            tensor = value if isinstance(value, Tensor) else _base(value)
            found.append(None if tensor is None else self._find(tensor))
            if tensor is not None and found[-1] is None:
                self._complete = False
                return
        x, y, z = (*grid, 1, 1)[:3]
        self._public.add(public_path(compiled, (x, y, z)), values, found)
        direct = direct_path(compiled, (x, y, z), sum(_base(value) is not None for value in values))
        if direct is None:
            self._direct = None
        elif self._direct is not None:
            self._direct.add(direct, values, found)

    def recording(self, result: Tensor) -> Recording | None:
        """What was recorded; None if a launch read something else.

        Args:
            result: the output, seen as the call returns it.
        """
        if not self._complete or self._find(result) != (self._output_slot, 0):
            return None
        return Recording(self._public, self._direct, self._scratch_bytes, result)


class _Launches:
    """Launches of which only addresses change, and where those stand in their arguments."""

    def __init__(self, slots: int) -> None:
        self._launches: list[tuple[Callable[..., None], list[Any]]] = []
        # of each slot: (arguments, place, offset in bytes, what makes a descriptor of the address)
        self._uses: list[list[tuple[list[Any], int, int, Callable[[int], Any] | None]]]
        self._uses = [[] for _ in range(slots)]
        self._nowhere = [-1] * slots
        self._addresses = self._nowhere

    def add(self, path: LaunchPath, values: list[Any], found: list[tuple[int, int] | None]) -> None:
        """Another launch; `found` has the (slot, offset) of values with an address."""
        args = list(path.leading)
        self._uses[-1].append((args, path.stream_place, 0, None))
        descriptors = 0
        for value, where in zip(values, found, strict=True):
            if where is None:
                args.append(value)
                continue
            encode = None
            place = len(args)
            if isinstance(value, Tensor):
                args.append(0)
            else:
                descriptor = with_address(value, value.base.data_ptr())
                encode = _encoder(path, descriptor, descriptors)
                args.extend(path.expand(descriptor, descriptors))
                descriptors += 1
            self._uses[where[0]].append((args, place, where[1], encode))
        self._launches.append((path.launch, args))

    def run(self, addresses: list[int]) -> None:
        """Launch everything, with `addresses` for the slots; the last is the stream."""
        before = self._addresses
        if addresses != before:
            self._addresses = self._nowhere  # should anything fail half way
            for slot, address in enumerate(addresses):
                if address != before[slot]:
                    for args, place, offset, encode in self._uses[slot]:
                        args[place] = address + offset if encode is None else encode(address + offset)
            self._addresses = addresses
        for launch, args in self._launches:
            launch(*args)


def _encoder(path: LaunchPath, descriptor: Any, position: int) -> Callable[[int], Any]:
    @lru_cache(maxsize=ENCODED_DESCRIPTORS)
    def encode(address: int) -> Any:
        return path.expand(with_address(descriptor, address), position)[0]

    return encode


class Recording:
    """The launches of one call, for others with inputs of the same shapes, strides and alignment."""

    def __init__(
        self, public: _Launches, direct: _Launches | None, scratch_bytes: int, result: Tensor
    ) -> None:
        self._public, self._direct, self._scratch_bytes = public, direct, scratch_bytes
        self._shape, self._strides = result.shape, result.stride()
        self._dtype, self._device = result.dtype, result.device
        self._lock = threading.Lock()  # addresses are written into what threads share

    def __call__(self, inputs: Sequence[int]) -> Tensor:
        """Launch on the current stream with inputs at other addresses; gives the result."""
        device = self._device
        out = torch.empty_strided(self._shape, self._strides, dtype=self._dtype, device=device)
        scratch = torch.empty(self._scratch_bytes, dtype=torch.uint8, device=device)
        stream = driver.active.get_current_stream(device.index)
        addresses = [*inputs, scratch.data_ptr(), out.data_ptr(), stream]
        direct = self._direct
        launches = self._public if direct is None or launches_are_observed() else direct
        with self._lock:
            launches.run(addresses)
        return out


def _base(value: Any) -> Tensor | None:
    """The tensor that a descriptor describes; None of anything else."""
    base = getattr(value, "base", None)
    return base if isinstance(base, Tensor) else None
