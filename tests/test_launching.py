"""Recorded launches get the addresses of the tensors they are repeated with."""

from __future__ import annotations

import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from dma_hf import DMAConfig, diagonal_tiled_attention, triton_backend
from dma_hf.kernels import launching
from dma_hf.kernels.launching import Recorder, Recording
from dma_hf.modifiers import NO_MODIFIERS, Modifiers
from dma_hf.triton_backend import triton_attention

CPU = torch.device("cpu")


class Kernel:
    """Stands for a Triton kernel and for what it is compiled to; remembers what it was launched with."""

    arg_names = ("x", "none", "number", "y", "OPTION")

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, stream: int | None = None, **options: Any) -> Kernel:
            # of descriptors, the address
            addresses = [a.base.data_ptr() if hasattr(a, "base") else a for a in args]
            self.launched.append((grid, stream, *addresses, *options.values()))
            return self

        return run


@pytest.fixture(autouse=True)
def no_driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, some stream."""
    if request.node.get_closest_marker("gpu"):
        return
    active = SimpleNamespace(get_current_stream=lambda device: 7)
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=active))


def repeat(recording: Recording | None, *inputs: Tensor | None) -> Tensor:
    assert recording is not None
    return recording([0 if tensor is None else tensor.data_ptr() for tensor in inputs])


def test_a_recording_is_repeated_with_the_addresses_of_other_tensors() -> None:
    """A call of two launches: the second reads one half of the scratch memory that the first wrote."""
    kernel = Kernel()
    query, key = torch.zeros(8), torch.zeros(9)
    recorder = Recorder(CPU, [query, None, key])
    recorder.empty((3, 5), torch.float32)
    scratch = recorder.empty((2, 64), torch.float32)
    out = recorder.output((2, 4), torch.bfloat16)
    recorder.launch(kernel, (2, 3), query, None, 42, scratch, OPTION="a", num_warps=4)
    recorder.launch(kernel, (1,), scratch[1], None, 43, out.transpose(0, 1), OPTION="b")
    recording = recorder.recording(out.transpose(0, 1))

    query, key = torch.ones(8), torch.ones(9)
    kernel.launched.clear()
    out = repeat(recording, query, None, key)
    (first, second) = kernel.launched
    assert first[:5] == ((2, 3, 1), 7, query.data_ptr(), None, 42)
    assert first[-1] == "a"
    assert second[:2] == ((1, 1, 1), 7)
    assert second[2] == first[5] + 64 * 4  # the half that begins one row on
    assert second[3:] == (None, 43, out.data_ptr(), "b")
    assert (out.shape, out.stride(), out.dtype) == ((4, 2), (1, 4), torch.bfloat16)


def test_scratch_memory_is_aligned_and_does_not_overlap() -> None:
    kernel = Kernel()
    recorder = Recorder(CPU, [])
    parts = [recorder.empty((n,), torch.uint8) for n in (1, 300, 256, 7)]
    out = recorder.output((1,), torch.float32)
    for part in parts:
        recorder.launch(kernel, (1,), part, None, 0, None, OPTION=0)
    recording = recorder.recording(out)
    kernel.launched.clear()
    repeat(recording)
    starts = [launch[2] for launch in kernel.launched]
    assert [start - starts[0] for start in starts] == [0, 256, 768, 1024]


def test_interleaved_inputs_are_not_taken_for_each_other() -> None:
    """Query and key of one projection: the key's address lies inside the query's range."""
    kernel = Kernel()
    both = torch.zeros(4, 2, 8)
    query, key = both.unbind(1)
    recorder = Recorder(CPU, [query, key])
    out = recorder.output((1,), torch.float32)
    recorder.launch(kernel, (1,), key, None, 0, query, OPTION=0)
    recording = recorder.recording(out)
    kernel.launched.clear()
    query, key = torch.zeros(4, 16)[:, :8], torch.zeros(4, 16)[:, :8]
    repeat(recording, query, key)
    assert kernel.launched[0][2] == key.data_ptr()
    assert kernel.launched[0][5] == query.data_ptr()


def test_a_descriptor_gets_the_new_address() -> None:
    kernel = Kernel()
    recorder = Recorder(CPU, [query := torch.zeros(8)])
    out = recorder.output((1,), torch.float32)
    descriptor = SimpleNamespace(base=query, shape=[8])
    recorder.launch(kernel, (1,), None, None, 0, descriptor, OPTION=0)
    recording = recorder.recording(out)
    others = torch.zeros(8), torch.zeros(8)
    kernel.launched.clear()
    for other in (*others, others[0]):
        repeat(recording, other)
    assert [launch[5] for launch in kernel.launched] == [t.data_ptr() for t in (*others, others[0])]
    assert descriptor.base is query


def test_a_call_on_another_stream_is_launched_there(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    recorder = Recorder(CPU, [query := torch.zeros(8)])
    out = recorder.output((1,), torch.float32)
    recorder.launch(kernel, (1,), query, None, 0, out, OPTION=0)
    recording = recorder.recording(out)
    kernel.launched.clear()
    for stream in (7, 8, 7):
        active = SimpleNamespace(get_current_stream=lambda device, stream=stream: stream)
        monkeypatch.setattr(launching, "driver", SimpleNamespace(active=active))
        repeat(recording, query)
    assert [launch[1] for launch in kernel.launched] == [7, 8, 7]


def test_a_failure_half_way_does_not_spoil_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses are written only where they changed, so what was written must be known."""
    kernel = Kernel()
    query, key = torch.zeros(8), torch.zeros(8)
    recorder = Recorder(CPU, [query, key])
    out = recorder.output((1,), torch.float32)
    recorder.launch(kernel, (1,), query, None, 0, SimpleNamespace(base=key), OPTION=0)
    recording = recorder.recording(out)
    repeat(recording, query, key)
    with monkeypatch.context() as broken:
        broken.setattr(launching, "with_address", lambda descriptor, address: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            repeat(recording, torch.zeros(8), torch.zeros(8))
    kernel.launched.clear()
    repeat(recording, query, key)
    assert kernel.launched[0][2] == query.data_ptr()
    assert kernel.launched[0][5] == key.data_ptr()


def test_threads_that_share_a_recording_get_their_own_launches() -> None:
    seen: list[tuple[int, int]] = []

    class Slow(Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(x: Any, none: Any, number: Any, y: Any, OPTION: Any, stream: int = 0) -> Kernel:
                time.sleep(0.001)  # lets another thread run
                seen.append((number, x))
                return self

            return run

    kernel = Slow()
    recorder = Recorder(CPU, [query := torch.zeros(8)])
    out = recorder.output((1,), torch.float32)
    for number in range(3):
        recorder.launch(kernel, (1,), query, None, number, out, OPTION=0)
    recording = recorder.recording(out)
    seen.clear()
    inputs = [torch.zeros(8) for _ in range(8)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda tensor: repeat(recording, tensor), inputs))
    calls = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert all([number for number, _ in call] == [0, 1, 2] for call in calls)
    assert {frozenset(x for _, x in call) for call in calls} == {frozenset([t.data_ptr()]) for t in inputs}


def test_a_recording_keeps_no_tensor_alive() -> None:
    """Or every new length of a prompt would cost the memory of its first call for good."""
    query, key = torch.zeros(8), torch.zeros(9)
    recorder = Recorder(CPU, [query, None, key])
    scratch, out = recorder.empty((4,), torch.float32), recorder.output((4,), torch.float32)
    descriptor = SimpleNamespace(base=key, shape=[9])
    recorder.launch(launched := Kernel(), (1,), query, None, 0, out, OPTION=0)
    recorder.launch(launched, (1,), scratch, None, 0, descriptor, OPTION=0)
    recording = recorder.recording(out)
    assert recording is not None
    tensors = [weakref.ref(tensor) for tensor in (query, key, scratch, out)]
    launched.launched.clear()
    del recorder, query, key, scratch, out, descriptor
    assert [tensor() for tensor in tensors] == [None] * 4


def test_what_reads_a_tensor_from_elsewhere_is_not_recorded() -> None:
    recorder = Recorder(CPU, [query := torch.zeros(8)])
    out = recorder.output((1,), torch.float32)
    recorder.launch(Kernel(), (1,), query, None, 0, torch.zeros(8), OPTION=0)
    assert recorder.recording(out) is None


def test_what_is_interpreted_is_not_recorded() -> None:
    class Interpreted(Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: None

    recorder = Recorder(CPU, [query := torch.zeros(8)])
    out = recorder.output((1,), torch.float32)
    recorder.launch(Interpreted(), (1,), query, None, 0, query, OPTION=0)
    assert recorder.recording(out) is None


@pytest.fixture
def backend_kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """In the place of all launches of the Triton backend: one, which takes query, key, value and output."""
    kernel = Kernel()
    kernel.arg_names = ("query", "key", "value", "out")

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, launches: Any, **__: Any) -> Tensor:
        batch, heads, length, _ = query.shape
        out = launches.output((batch, length, heads, value.shape[-1]), query.dtype).transpose(1, 2)
        launches.launch(kernel, (1,), query, key, value, out)
        return out

    monkeypatch.setattr(triton_backend, "prepare", lambda *args, **options: None)
    monkeypatch.setattr(triton_backend, "attend_prepared", attend)
    monkeypatch.setattr(triton_backend, "_recordings", {})
    return kernel


def call(*inputs: Tensor, modifiers: Modifiers = NO_MODIFIERS) -> Tensor:
    return triton_attention(*inputs, causal=True, scale=1.0, config=DMAConfig(), modifiers=modifiers)


def test_a_call_of_the_backend_is_recorded_once(backend_kernel: Kernel) -> None:
    call(*(torch.zeros(1, 2, 4, 16) for _ in range(3)))
    assert len(triton_backend._recordings) == 1
    inputs = [torch.zeros(1, 2, 4, 16) for _ in range(3)]
    out = call(*inputs)
    assert len(triton_backend._recordings) == 1
    assert backend_kernel.launched[-1][2:] == tuple(t.data_ptr() for t in (*inputs, out))
    assert out.transpose(1, 2).is_contiguous()  # stored by tokens


def test_one_tensor_as_key_and_value_is_recorded_on_its_own(backend_kernel: Kernel) -> None:
    query, key, value = (torch.zeros(1, 2, 4, 16) for _ in range(3))
    call(query, key, key)
    assert len(triton_backend._recordings) == 1
    out = call(query, value, value)
    assert len(triton_backend._recordings) == 1
    assert backend_kernel.launched[-1][2:] == tuple(t.data_ptr() for t in (query, value, value, out))
    call(query, key, value)  # two tensors: another recording
    out = call(query, value, key)
    assert len(triton_backend._recordings) == 2
    assert backend_kernel.launched[-1][2:] == tuple(t.data_ptr() for t in (query, value, key, out))


@pytest.mark.parametrize("change", ["shape", "strides", "alignment", "dtype", "softcap", "sinks"])
def test_what_changes_the_launches_is_another_recording(change: str, backend_kernel: Kernel) -> None:
    query, key, value = (torch.zeros(1, 2, 4, 16) for _ in range(3))
    call(query, key, value)
    modifiers = NO_MODIFIERS
    if change == "shape":
        query = torch.zeros(1, 2, 3, 16)
    elif change == "strides":
        value = torch.zeros(1, 4, 2, 16).transpose(1, 2)
    elif change == "alignment":
        key = torch.zeros(2 * 4 * 16 + 1)[1:].view(1, 2, 4, 16)
    elif change == "dtype":
        query, key, value = query.half(), key.half(), value.half()
    else:
        modifiers = Modifiers(softcap=5.0) if change == "softcap" else Modifiers(sinks=torch.zeros(2))
    for _ in range(2):
        call(query, key, value, modifiers=modifiers)
    assert len(triton_backend._recordings) == 2


def test_the_oldest_recording_is_dropped(backend_kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "MAX_RECORDINGS", 2)
    for length in (4, 5, 6):
        call(*(torch.zeros(1, 2, length, 16) for _ in range(3)))
    shapes = [key[5] for key in triton_backend._recordings]
    assert [shape[2] for shape in shapes] == [5, 6]


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


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["auto,min_length=0", "paper"])
def test_one_tensor_as_key_and_value_gives_what_two_give(setting: str) -> None:
    config = DMAConfig.parse(setting)
    query, key = (torch.randn(1, 2, 300, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    two = diagonal_tiled_attention(query, key, key.clone(), config=config)
    for _ in range(2):
        one = diagonal_tiled_attention(query, key, key, config=config)
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["auto,min_length=0", "paper"])
def test_a_profiler_sees_the_launches_of_a_repeated_call(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DMAConfig.parse(setting)
    query, key, value = (torch.randn(1, 2, 300, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    first = diagonal_tiled_attention(query, key, value, config=config)
    direct = diagonal_tiled_attention(query, key, value, config=config)
    launched: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "launch_enter_hook", lambda metadata: launched.append(metadata.get()["name"])
    )
    observed = diagonal_tiled_attention(query, key, value, config=config)
    assert len(launched) >= 4  # statistics, K, attention and its repair
    for out in (direct, observed):
        torch.testing.assert_close(out, first, rtol=0, atol=0)
