"""Recorded launches get the addresses of the tensors they are repeated with."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dma_hf import DMAConfig, diagonal_tiled_attention
from dma_hf.kernels import launching
from dma_hf.kernels.launching import Recorder, Recording

CPU = torch.device("cpu")


class Kernel:
    """Stands for a Triton kernel and for what it is compiled to; remembers what it was launched with."""

    arg_names = ("x", "none", "number", "y", "OPTION")

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, stream: int | None = None, **options: Any) -> Kernel:
            addresses = [a.data_ptr() if hasattr(a, "data_ptr") else a for a in args]
            self.launched.append((grid, stream, *addresses, *options.values()))
            return self

        return run


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, some stream."""
    active = SimpleNamespace(get_current_stream=lambda device: 7)
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=active))


def record(kernel: Kernel, query: Tensor, key: Tensor) -> Recording | None:
    """A call of two launches: the second reads one half of the scratch memory that the first wrote."""
    recorder = Recorder(CPU, [query, None, key])
    recorder.empty((3, 5), torch.float32)
    scratch = recorder.empty((2, 64), torch.float32)
    out = recorder.output((4, 4), torch.bfloat16)
    recorder.launch(kernel, (2, 3), query, None, 42, scratch, OPTION="a", num_warps=4)
    recorder.launch(kernel, (1,), scratch[1], None, 43, out.transpose(0, 1), OPTION="b")
    return recorder.recording()


@pytest.mark.usefixtures("no_driver")
def test_a_recording_is_repeated_with_the_addresses_of_other_tensors() -> None:
    kernel = Kernel()
    recording = record(kernel, torch.zeros(8), torch.zeros(9))
    assert recording is not None
    query, key = torch.ones(8), torch.ones(9)
    kernel.launched.clear()
    out = recording([query, None, key])

    (first, second) = kernel.launched
    assert first[:5] == ((2, 3, 1), 7, query.data_ptr(), None, 42)
    assert first[-1] == "a"
    assert second[:2] == ((1, 1, 1), 7)
    assert second[2] == first[5] + 64 * 4  # the half that begins one row on
    assert second[3:] == (None, 43, out.data_ptr(), "b")
    assert out.shape == (4, 4)
    assert out.dtype == torch.bfloat16


@pytest.mark.usefixtures("no_driver")
def test_scratch_memory_is_aligned_and_does_not_overlap() -> None:
    kernel = Kernel()
    recorder = Recorder(CPU, [])
    parts = [recorder.empty((n,), torch.uint8) for n in (1, 300, 256, 7)]
    recorder.output((1,), torch.float32)
    for part in parts:
        recorder.launch(kernel, (1,), part, None, 0, None, OPTION=0)
    recording = recorder.recording()
    kernel.launched.clear()
    recording([])
    starts = [launch[2] for launch in kernel.launched]
    assert [start - starts[0] for start in starts] == [0, 256, 768, 1024]


@pytest.mark.usefixtures("no_driver")
def test_interleaved_inputs_are_not_taken_for_each_other() -> None:
    """Query and key of one projection: the key's address lies inside the query's range."""
    kernel = Kernel()
    both = torch.zeros(4, 2, 8)
    query, key = both.unbind(1)
    recorder = Recorder(CPU, [query, key])
    recorder.output((1,), torch.float32)
    recorder.launch(kernel, (1,), key, None, 0, query, OPTION=0)
    recording = recorder.recording()
    kernel.launched.clear()
    query, key = torch.zeros(4, 16)[:, :8], torch.zeros(4, 16)[:, :8]
    recording([query, key])
    assert kernel.launched[0][2] == key.data_ptr()
    assert kernel.launched[0][5] == query.data_ptr()


@pytest.mark.usefixtures("no_driver")
def test_a_descriptor_gets_the_new_address() -> None:
    kernel = Kernel()
    recorder = Recorder(CPU, [query := torch.zeros(8)])
    recorder.output((1,), torch.float32)
    descriptor = SimpleNamespace(base=query, shape=[8])
    recorder.launch(kernel, (1,), None, None, 0, descriptor, OPTION=0)
    recording = recorder.recording()
    seen: list[int] = []
    launch = recording._launches[0]
    launch.run = lambda *args, stream: seen.append(args[3].base.data_ptr())
    other = torch.zeros(8)
    recording([other])
    assert seen == [other.data_ptr()]
    assert descriptor.base is query


def test_a_recording_keeps_no_tensor_alive() -> None:
    """Or every new length of a prompt would cost the memory of its first call for good."""
    query, key = torch.zeros(8), torch.zeros(9)
    recorder = Recorder(CPU, [query, None, key])
    scratch, out = recorder.empty((4,), torch.float32), recorder.output((4,), torch.float32)
    descriptor = SimpleNamespace(base=key, shape=[9])
    recorder.launch(launched := Kernel(), (1,), query, None, 0, out, OPTION=0)
    recorder.launch(launched, (1,), scratch, None, 0, descriptor, OPTION=0)
    recording = recorder.recording()
    assert recording is not None
    tensors = [weakref.ref(tensor) for tensor in (query, key, scratch, out)]
    launched.launched.clear()
    del recorder, query, key, scratch, out, descriptor
    assert [tensor() for tensor in tensors] == [None] * 4


@pytest.mark.parametrize("inputs", ["one tensor twice", "a tensor from elsewhere"])
def test_what_cannot_be_repeated_is_not_recorded(inputs: str) -> None:
    query = torch.zeros(8)
    recorder = Recorder(CPU, [query, query] if inputs == "one tensor twice" else [query])
    recorder.output((1,), torch.float32)
    other = torch.zeros(8) if inputs == "a tensor from elsewhere" else query
    recorder.launch(Kernel(), (1,), query, None, 0, other, OPTION=0)
    assert recorder.recording() is None


def test_what_is_interpreted_is_not_recorded() -> None:
    class Interpreted(Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: None

    recorder = Recorder(CPU, [query := torch.zeros(8)])
    recorder.output((1,), torch.float32)
    recorder.launch(Interpreted(), (1,), query, None, 0, query, OPTION=0)
    assert recorder.recording() is None


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["auto,min_length=0", "paper", "accurate", "low=mxfp4,high=none"])
def test_a_repeated_call_is_the_first_call(setting: str) -> None:
    config = DMAConfig.parse(setting)

    def inputs(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        shapes = (1, 4, 300, 128), (1, 2, 300, 128), (1, 2, 300, 128)
        return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]

    first = diagonal_tiled_attention(*inputs(0), config=config)
    other = diagonal_tiled_attention(*inputs(1), config=config)
    with torch.cuda.stream(torch.cuda.Stream()):
        again = diagonal_tiled_attention(*inputs(0), config=config)
        torch.cuda.current_stream().synchronize()
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert not torch.equal(other, first)
    # of other alignment: another recording
    shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in inputs(0)]
    torch.testing.assert_close(diagonal_tiled_attention(*shifted, config=config), first, rtol=2e-2, atol=2e-2)
