"""Which function launches a compiled kernel again: Triton's C function where that is safe, else Triton."""

from __future__ import annotations

from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dma_hf.kernels import launch_paths, launching
from dma_hf.kernels.launch_paths import direct_path, launches_are_observed
from dma_hf.kernels.launching import Recorder, Recording

CPU = torch.device("cpu")
KNOWN = launch_paths._KNOWN_ARGUMENTS


class Launcher:
    """Stands for Triton's launcher of one kernel, with all that its Python looks at."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid, launch_pdl = False, False

    def __init__(self, wrapped: bool) -> None:
        self.launched: list[tuple[Any, ...]] = []

        def launch(*args: Any) -> None:
            self.launched.append(args)

        launcher = launch

        def encoding(*args: Any) -> None:
            launcher(*args)

        self.launch = encoding if wrapped else launch


class Compiled:
    """Stands for a kernel and what it is compiled to: a pointer, a number, and perhaps a descriptor."""

    function, packed_metadata = 99, (4, 1, 0)

    def __init__(self, descriptors: int = 0) -> None:
        self.arg_names = ("x", "n", "source")[: 2 + descriptors]
        self.run = Launcher(wrapped=descriptors > 0)
        self.metadata = SimpleNamespace(tensordesc_meta=["swizzle"] * descriptors)
        self.public: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, stream: int | None = None) -> Compiled:
            self.public.append(args)
            return self

        return run


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The Triton whose C function is known; gives the addresses of the descriptors that it encoded."""
    addresses: list[int] = []

    def encode(descriptor: Any, meta: Any) -> list[Any]:
        addresses.append(descriptor.base.data_ptr())
        return [f"{meta} at {addresses[-1]}", *descriptor.shape]

    nvidia = SimpleNamespace(_BASE_ARGS_FORMAT=KNOWN, CudaLauncher=Launcher, make_tensordesc_arg=encode)
    monkeypatch.setattr(launch_paths, "nvidia", nvidia)
    monkeypatch.setattr(launch_paths, "BuiltinFunctionType", FunctionType)
    active = SimpleNamespace(get_current_stream=lambda device: 7)
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=active))
    return addresses


def record(compiled: Compiled, tensor: Tensor) -> Recording:
    recorder = Recorder(CPU, [tensor])
    out = recorder.output((1,), torch.float32)
    descriptors = [SimpleNamespace(base=tensor, shape=[2, 4])] * (len(compiled.arg_names) - 2)
    recorder.launch(compiled, (5, 6), tensor, 3, *descriptors)
    recording = recorder.recording(out)
    assert recording is not None
    compiled.public.clear()
    return recording


def test_the_c_function_gets_the_arguments_in_its_order(encoded: list[int]) -> None:
    compiled = Compiled()
    recording = record(compiled, torch.zeros(8))
    recording([4096])
    grid, flags, scratch, hooks = (5, 6, 1), (False, False), (None, None), (None, None, None)
    assert compiled.run.launched == [(*grid, 7, 99, *flags, *scratch, (4, 1, 0), *hooks, 4096, 3)]
    assert compiled.public == []


def test_a_descriptor_is_encoded_once_for_each_address(encoded: list[int]) -> None:
    compiled = Compiled(descriptors=1)
    recording = record(compiled, torch.zeros(8))
    encoded.clear()
    for address in (4096, 8192, 4096, 4096, 8192):
        recording([address])
    assert encoded == [4096, 8192]
    launched = [args[13:] for args in compiled.run.launched]
    assert launched == [
        (address, 3, f"swizzle at {address}", 2, 4) for address in (4096, 8192, 4096, 4096, 8192)
    ]


def test_few_encoded_descriptors_are_kept(encoded: list[int]) -> None:
    recording = record(Compiled(descriptors=1), torch.zeros(8))
    encoded.clear()
    addresses = [4096 * (1 + i) for i in range(launching.ENCODED_DESCRIPTORS + 1)]
    for address in (*addresses, addresses[0]):
        recording([address])
    assert encoded == [*addresses, addresses[0]]


def test_a_profiler_that_listens_gets_public_launches(
    encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = Compiled(descriptors=1)
    recording = record(compiled, torch.zeros(8))
    recording([4096])
    with monkeypatch.context() as profiler:
        profiler.setattr(launch_paths.triton.knobs.runtime, "launch_enter_hook", lambda metadata: None)
        recording([8192])
    recording([4096])
    assert [args[13] for args in compiled.run.launched] == [4096, 4096]
    ((x, number, descriptor),) = compiled.public
    assert (x, number, descriptor.base.data_ptr()) == (8192, 3, 8192)


@pytest.mark.parametrize(
    ("hook", "observed"),
    [
        (None, False),
        (SimpleNamespace(calls=[]), False),
        (SimpleNamespace(calls=[print]), True),
        (print, True),
    ],
)
@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_hook_is_noticed(name: str, hook: Any, observed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launches_are_observed()
    monkeypatch.setattr(launch_paths.triton.knobs.runtime, name, hook)
    assert launches_are_observed() is observed


def test_only_what_is_known_is_launched_directly(encoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    grid = (1, 1, 1)
    assert direct_path(Compiled(), grid, 0) is not None
    assert direct_path(Compiled(1), grid, 1) is not None

    compiled = Compiled()
    monkeypatch.setattr(compiled.run, "profile_scratch_size", 16)
    assert direct_path(compiled, grid, 0) is None, "Triton allocates memory on each launch"
    compiled = Compiled()
    compiled.run.launch = SimpleNamespace()
    assert direct_path(compiled, grid, 0) is None, "not a function of C"
    compiled = Compiled(1)
    compiled.metadata.tensordesc_meta = None
    assert direct_path(compiled, grid, 1) is None, "hardware without a copy engine"
    monkeypatch.setattr(launch_paths.nvidia, "_BASE_ARGS_FORMAT", "iiiKKOOOO")
    assert direct_path(Compiled(), grid, 0) is None, "a C function with other arguments"
    monkeypatch.delattr(launch_paths.nvidia, "_BASE_ARGS_FORMAT")
    assert direct_path(Compiled(), grid, 0) is None, "a Triton that has another C function"


def test_one_launch_that_cannot_be_direct_makes_the_recording_public(encoded: list[int]) -> None:
    """One order of launches is one path: the public one does them all."""
    direct, public = Compiled(), Compiled()
    public.run.global_scratch_size = 16  # type: ignore[misc]
    recorder = Recorder(CPU, [tensor := torch.zeros(8)])
    out = recorder.output((1,), torch.float32)
    for compiled in (direct, public, direct):
        recorder.launch(compiled, (1,), tensor, 3)
    recording = recorder.recording(out)
    assert recording is not None
    direct.public.clear()
    recording([4096])
    assert direct.public == [(4096, 3)] * 2
    assert direct.run.launched == []
