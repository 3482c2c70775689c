"""Speed and memory of a whole model, SDPA against DMA: time to first token, and decode.

At every point, a length of the prompt and a batch size, the attentions take turns: one pass of each,
then the next pass of each. A clock or a temperature that drifts moves both sides of a ratio. One pass is
a prompt of random tokens and then greedy decoding with a cache, as ``generate`` does it.
"""

from __future__ import annotations

import gc
import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dma_hf.policy import DMAFallbackWarning, forget_warnings

from .attention import attention, baseline
from .errors import UsageError
from .failures import reason
from .progress import Advance
from .runs import Run

MEASUREMENTS = (
    "prefill_seconds",
    "prefill_speedup",
    "decode_tokens_per_second",
    "decode_speedup",
    "peak_bytes",
    "attention_seconds",
    "attention_speedup",
    "attention_share",
)
"""The numbers of an entry; None where nothing was measured, or there is nothing to compare with."""

CPU_CONTEXTS = (512, 1024, 2048)
GPU_CONTEXTS = (1024, 8192, 32_768)
"""Tokens of the prompts, unless the command line says otherwise."""


@dataclass(frozen=True)
class Point:
    """Where speed is measured: a prompt of ``context`` tokens, in ``batch`` sequences."""

    context: int
    batch: int


@dataclass(frozen=True)
class Pass:
    """One pass: seconds to the first token, and seconds for the ``new_tokens`` after it.

    ``attention_seconds`` is the part of the first that is spent in attention.
    """

    prefill_seconds: float
    decode_seconds: float
    attention_seconds: float
    peak_bytes: int | None


@dataclass
class Measured:
    """What one attention gave at one point; ``error`` says why it gave nothing."""

    run: Run
    passes: list[Pass] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def prefill_seconds(self) -> float:
        """Median over the passes."""
        return median(one.prefill_seconds for one in self.passes)

    @property
    def decode_seconds(self) -> float:
        """Median over the passes."""
        return median(one.decode_seconds for one in self.passes)

    @property
    def attention_seconds(self) -> float:
        """Median over the passes."""
        return median(one.attention_seconds for one in self.passes)

    @property
    def attention_share(self) -> float:
        """Of the time to the first token, median over the passes."""
        return median(min(1.0, one.attention_seconds / one.prefill_seconds) for one in self.passes)


def default_contexts(device: torch.device, longest: int | None, new_tokens: int) -> list[int]:
    """Lengths of the prompt that suit the device and fit a model's context of ``longest`` tokens.

    Raises:
        UsageError: if none does.
    """
    contexts = CPU_CONTEXTS if device.type == "cpu" else GPU_CONTEXTS
    if longest is None:
        return list(contexts)
    room = longest - new_tokens
    if room < 1:
        raise UsageError(
            f"--new-tokens {new_tokens} leaves no room in the model's context of {longest} tokens"
        )
    return [context for context in contexts if context <= room] or [room]


def passes(runs: int, repeats: int) -> int:
    """How often ``measure_point`` advances: for each run a warm-up and the repeats."""
    return runs * (repeats + 1)


def measure_point(
    model: PreTrainedModel,
    runs: Sequence[Run],
    point: Point,
    *,
    new_tokens: int,
    repeats: int,
    advance: Advance = lambda steps: None,
) -> list[dict[str, Any]]:
    """Times every attention of ``runs`` on ``model`` at ``point``; the first is what ratios are against.

    Whatever stops one of them, most often memory, is its entry's "error", and the rest goes on.

    Args:
        new_tokens: decoded after the first token, in one sequence of the batch.
        repeats: timed passes of each attention; medians count.
        advance: told 1 after each of ``passes(...)`` passes.

    Returns:
        One entry of "runs" in ``speed.json`` for each of ``runs``, in their order.
    """
    results = [Measured(run) for run in runs]
    tokens = random_tokens(model, point)
    timed = partial(_timed_pass, tokens=tokens, new_tokens=new_tokens)
    for step in (partial(_warm_up, tokens=tokens), *[timed] * repeats):
        for result in results:
            _attempt(step, model, result)
            advance(1)
    return [_entry(_name(model, result.run), point, result, results[0], new_tokens) for result in results]


def _name(model: PreTrainedModel, run: Run) -> str:
    return run.name if run.config is not None or baseline(model) == "sdpa" else baseline(model)


def random_tokens(model: PreTrainedModel, point: Point) -> Tensor:
    """A prompt [batch, context] of random tokens, the same on every device."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (point.batch, point.context), generator=generator).to(model.device)


def run_pass(model: PreTrainedModel, tokens: Tensor, new_tokens: int) -> Pass:
    """Reads the prompt [batch, context], then decodes ``new_tokens`` tokens, with the attention now set."""
    device = model.device
    with torch.inference_mode():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = _now(device)
        with attention_timer(device) as attention_seconds:
            token, cache = _prefill(model, tokens)
            first = _now(device)
        for _ in range(new_tokens):
            output = model(token, past_key_values=cache, use_cache=True)
            token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        last = _now(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Pass(first - start, last - first, attention_seconds(), peak)


def _prefill(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Any]:
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1  # as generate() does: the other tokens' logits are for nobody
    output = model(tokens, **options)
    return output.logits[:, -1:].argmax(-1), output.past_key_values


def _warm_up(model: PreTrainedModel, result: Measured, tokens: Tensor) -> None:
    """Compiles kernels, fills the allocator's pools, and takes down what DMA says about how it runs."""
    forget_warnings()  # it says everything once, and here every attention must say it
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_pass(model, tokens, new_tokens=1)
    said = (str(warning.message) for warning in caught if issubclass(warning.category, DMAFallbackWarning))
    result.notes = list(dict.fromkeys(said))


def _timed_pass(model: PreTrainedModel, result: Measured, tokens: Tensor, new_tokens: int) -> None:
    result.passes.append(run_pass(model, tokens, new_tokens))


@contextmanager
def attention_timer(device: torch.device) -> Iterator[Callable[[], float]]:
    """Times the attention function of every layer of the models that run inside.

    That is what Transformers looks up by ``attn_implementation``: from Q, K and V after their rotary
    embedding to the output before its projection, DMA's quantisation included. Gives a function that
    returns the seconds so far. On a GPU the marks are events, a few microseconds a layer: little enough
    to be inside what is timed.
    """
    lookup = ALL_ATTENTION_FUNCTIONS.get_interface
    marks: list[tuple[Any, Any]] = []

    def timed_lookup(*arguments: Any, **options: Any) -> Callable[..., Any]:
        function = lookup(*arguments, **options)

        def timed(*inputs: Any, **settings: Any) -> Any:
            start = _mark(device)
            output = function(*inputs, **settings)
            marks.append((start, _mark(device)))
            return output

        return timed

    def seconds() -> float:
        if device.type != "cuda":
            return sum(end - start for start, end in marks)
        torch.cuda.synchronize(device)
        return sum(start.elapsed_time(end) for start, end in marks) / 1000  # from milliseconds

    # on the instance that all models share; deleting it brings the class's own method back
    setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", timed_lookup)  # noqa: B010
    try:
        yield seconds
    finally:
        delattr(ALL_ATTENTION_FUNCTIONS, "get_interface")


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _attempt(step: Callable[..., None], model: PreTrainedModel, result: Measured) -> None:
    """One step of the work with the attention of ``result``, unless that failed before."""
    if result.error is not None:
        return
    try:
        with attention(model, result.run.config):
            step(model, result)
    except Exception as error:  # whatever stops one attention, the others go on
        result.error = reason(error)
    if result.error is not None and model.device.type == "cuda":
        gc.collect()  # what the failed call left behind is not the next one's
        with suppress(RuntimeError):  # a device that is beyond repair fails here too
            torch.cuda.empty_cache()


def _entry(
    name: str, point: Point, result: Measured, baseline_result: Measured, new_tokens: int
) -> dict[str, Any]:
    """The entry of "runs" in ``speed.json``: see its schema."""
    entry: dict[str, Any] = {
        "name": name,
        "config": result.run.describe()["config"],
        "context": point.context,
        "batch": point.batch,
        **dict.fromkeys(MEASUREMENTS),
        "prefill_seconds_all": [],
        "decode_seconds_all": [],
        "notes": result.notes,
    }
    if result.error is not None:
        return {**entry, "error": result.error}
    entry["prefill_seconds"] = result.prefill_seconds
    entry["prefill_seconds_all"] = [one.prefill_seconds for one in result.passes]
    entry["decode_tokens_per_second"] = point.batch * new_tokens / result.decode_seconds
    entry["decode_seconds_all"] = [one.decode_seconds for one in result.passes]
    entry["peak_bytes"] = max((one.peak_bytes for one in result.passes if one.peak_bytes), default=None)
    entry["attention_seconds"] = result.attention_seconds
    entry["attention_share"] = result.attention_share
    if baseline_result.error is None:
        entry["prefill_speedup"] = baseline_result.prefill_seconds / result.prefill_seconds
        entry["decode_speedup"] = baseline_result.decode_seconds / result.decode_seconds
        if result.attention_seconds > 0:  # a model may have attention of its own
            entry["attention_speedup"] = baseline_result.attention_seconds / result.attention_seconds
    return entry
