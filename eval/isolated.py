"""Runs a function on many items, each in a process of its own, so that a crash or a hang costs one item."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any


@dataclass(frozen=True)
class Lost:
    """An item whose process did not come back with a result.

    Attributes:
        why: in one line.
        seconds: how long it ran.
    """

    why: str
    seconds: float


def run_isolated(
    work: Callable[[str], Any],
    items: Sequence[str],
    *,
    jobs: int,
    timeout: float,
    preload: Sequence[str] = (),
) -> Iterator[tuple[str, Any]]:
    """Calls ``work(item)`` for every item, in a new process each.

    Args:
        work: a function at the top of a module; what it returns must be picklable.
        items: in the order in which they start.
        jobs: processes at a time.
        timeout: seconds after which a process is killed.
        preload: modules that every process needs. Where the system can fork, they are imported once,
            by a server from which the processes fork.

    Yields:
        (item, result) in the order in which they finish; the result is ``Lost`` where there is none.
    """
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([work.__module__, *preload])
    todo = list(items)
    running: dict[Connection, tuple[str, Any, float]] = {}
    try:
        while todo or running:
            while todo and len(running) < jobs:
                item = todo.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_report, args=(work, item, sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = (item, process, time.monotonic())
            ready = wait(list(running), timeout=0.5)
            for receiver, (item, process, started) in list(running.items()):
                seconds = time.monotonic() - started
                if receiver in ready:
                    result = _received(receiver, process, seconds)
                elif seconds > timeout:
                    process.kill()
                    result = Lost(f"took longer than {timeout:.0f} s", seconds)
                else:
                    continue
                del running[receiver]
                process.join()
                receiver.close()
                yield item, result
    finally:
        for _, process, _ in running.values():
            process.kill()


def _received(receiver: Connection, process: Any, seconds: float) -> Any:
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        status = process.exitcode
        why = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
        return Lost(f"its process {why}", seconds)
    return Lost(result.why, seconds) if isinstance(result, Lost) else result


def _report(work: Callable[[str], Any], item: str, sender: Connection) -> None:
    try:
        sender.send(work(item))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        sender.send(Lost(f"{type(error).__name__}: {error} ({where.name})", 0.0))
