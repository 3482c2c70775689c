"""How the kernel benchmark measures a call: its time and its memory. All that needs a GPU is here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import UsageError

Call = Callable[[], Any]
"""One launch of what is measured, without arguments."""

# milliseconds, as `do_bench` takes them
WARMUP = 10
REPEAT = 100


class Meter(Protocol):
    """What a benchmark asks of the device it runs on."""

    @property
    def device(self) -> torch.device:
        """Where inputs are made."""

    def milliseconds(self, call: Call) -> float:
        """Median time of a call."""

    def extra_bytes(self, call: Call) -> int:
        """Peak memory of one call beyond what was allocated before it and the tensor it returns."""


class CudaMeter:
    """Measures on the current CUDA device, with events, after a warm-up, on a cold L2 cache.

    Raises:
        UsageError: where there is none.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise UsageError("kernels: needs a CUDA device, and PyTorch finds none")
        self.device = torch.device("cuda", torch.cuda.current_device())

    def milliseconds(self, call: Call) -> float:
        from triton.testing import do_bench

        return float(do_bench(call, warmup=WARMUP, rep=REPEAT, return_mode="median"))

    def extra_bytes(self, call: Call) -> int:
        call()  # what a first call compiles or allocates for good is not its working memory
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        output = result.untyped_storage().nbytes() if isinstance(result, Tensor) else 0
        return max(0, torch.cuda.max_memory_allocated() - before - output)
