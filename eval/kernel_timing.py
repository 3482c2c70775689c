"""How the kernel benchmark measures a call: its time and its memory. All that needs a GPU is here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import UsageError

Call = Callable[[], Any]
"""One launch of what is measured, without arguments."""

# milliseconds
WARMUP = 10
MEASURED = 100
# a call of 128k tokens is longer than MEASURED, and one of 1k would be repeated thousands of times
LEAST_REPEATS, MOST_REPEATS = 3, 200


class Meter(Protocol):
    """What a benchmark asks of the device it runs on."""

    @property
    def device(self) -> torch.device:
        """Where inputs are made."""

    def milliseconds(self, call: Call) -> float:
        """Median time of a call."""

    def extra_bytes(self, call: Call) -> int:
        """Peak memory of one call beyond what was allocated before it and the tensor it returns."""

    def works(self) -> bool:
        """Whether the device still answers. After a fault it fails whatever it is asked to do."""


class CudaMeter:
    """Measures on the current CUDA device, with events, after a warm-up, on a cold L2 cache.

    Raises:
        UsageError: where there is none.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise UsageError("kernels: needs a CUDA device, and PyTorch finds none")
        self.device = torch.device("cuda", torch.cuda.current_device())
        # Triton's do_bench clears as much. It takes long enough for the host to be ahead of the GPU again, or
        # a short call would be timed by how fast Python launches it.
        self._cache = torch.empty(256 * 2**20, dtype=torch.int8, device=self.device)

    def milliseconds(self, call: Call) -> float:
        # Triton's do_bench makes seven calls before the first that counts, and then only one of a call
        # that takes longer than what it is told to spend: seconds, and no median, at 128k tokens.
        _, estimate = self._times(call, 2)
        for _ in range(int(WARMUP / estimate)):
            call()
        repeats = min(max(int(MEASURED / estimate), LEAST_REPEATS), MOST_REPEATS)
        return median(self._times(call, repeats))

    def _times(self, call: Call, repeats: int) -> list[float]:
        events = []
        for _ in range(repeats):
            self._cache.zero_()  # whatever the last call left in the L2 cache is gone
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def extra_bytes(self, call: Call) -> int:
        call()  # what a first call compiles or allocates for good is not its working memory
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        output = result.untyped_storage().nbytes() if isinstance(result, Tensor) else 0
        return max(0, torch.cuda.max_memory_allocated() - before - output)

    def works(self) -> bool:
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
            return True
        return False
