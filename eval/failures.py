"""Runs that fail while the others go on: one line each, and the error that the command ends with.

failures = Failures()
for run in runs:
    with failures.catch(run):
        results.append(measure(run))
write_results(...)              # of what was finished, with failures.describe() as its "failed"
failures.raise_any()            # the exit status says that something is missing
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import EvalError, first_line
from .runs import Run


class Failures:
    """The runs that failed and why. ``run in failures`` asks for one of them."""

    def __init__(self) -> None:
        self._failed: list[dict[str, Any]] = []
        self._exit_status = EvalError.exit_status

    def __contains__(self, run: Run) -> bool:
        return any(failed["name"] == run.name for failed in self._failed)

    def __len__(self) -> int:
        return len(self._failed)

    @contextmanager
    def catch(self, run: Run) -> Iterator[None]:
        """Takes note of any error inside this context as that of ``run``, and goes on after it.

        SDPA's errors pass through: without it there is nothing to compare the others with.
        """
        try:
            yield
        except Exception as error:
            if run.config is None:
                raise
            why = reason(error)
            print(f"dma-eval: '{run.name}' failed, the others go on: {why}", file=sys.stderr)
            if not self._failed:
                self._exit_status = getattr(error, "exit_status", EvalError.exit_status)
            self._failed.append({**run.describe(), "error": why})
            # The frames of the error hold the tensors that filled the memory.
            error.__traceback__ = error.__cause__ = error.__context__ = None
        if run in self:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def describe(self) -> list[dict[str, Any]]:
        """The failed runs as results files hold them: name, config and error."""
        return list(self._failed)

    def raise_any(self) -> None:
        """Ends the command with the exit status of the first failure, if there was one.

        Raises:
            EvalError: that says which runs are missing from the results.
        """
        if self._failed:
            names = ", ".join(f"'{failed['name']}'" for failed in self._failed)
            summary = EvalError(f"the results lack {names}, which failed")
            summary.exit_status = self._exit_status
            raise summary


def reason(error: Exception) -> str:
    """Why a run failed, in one line. The type is named where the message alone may say nothing."""
    if is_out_of_memory(error):
        return "out of memory (try a smaller --context, or --dtype bfloat16)"
    if isinstance(error, (EvalError, NotImplementedError, ValueError)):
        return first_line(error)
    return f"{type(error).__name__}: {first_line(error)}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, on a GPU or for the CPU's tensors."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
