"""Does "dma" serve a model type? The same random weights under "dma" and under SDPA, for every type there is.

Both low and high are "none", so DMA computes what SDPA computes: what differs is a wrong mask, a lost
argument, a wrong scale, and not precision. Every type is tried in a process of its own, because a model
that crashes or hangs must cost no more than its own row.
"""

from __future__ import annotations

import inspect
import logging
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, get_args
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import dma_hf
from dma_hf import DMAConfig, plugin
from dma_hf.policy import DMAFallbackWarning, is_decode_step

from .errors import first_line
from .isolated import Lost, run_isolated
from .journal import NO_JOURNAL, Journal
from .lockstep import in_lockstep
from .progress import Advance
from .tiny_models import CannotBuildError, TinyModel, tensors, tiny_model

TOLERANCE = 1e-4
"""Largest accepted difference of any output, relative to the largest output where that is above 1."""
LOCKSTEP_TOLERANCE = 1e-5
"""The same for attention calls and outputs in lockstep, which decide where outputs alone cannot."""
TELLING_EFFECT = 100 * TOLERANCE
"""Outputs that change by less when attention gives zeros do not show whether attention is right."""
NEW_TOKENS = 4
PADDING = 5
"""Tokens of padding in the first row of a padded batch."""
TIMEOUT = 300.0
"""Seconds after which a type is given up."""
ADDRESS_SPACE = 16 << 30
EXACT = DMAConfig(low="none", high="none")

Outcome = Literal["kernel", "sdpa", "no attention", "refused", "wrong", "not built"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
"""How a type can end.

kernel: most of its attention calls run as DMA. sdpa: most are handed to SDPA, or to eager attention where
Transformers has no SDPA for it. no attention: it computes none. refused: "dma" raises an error. wrong: a
token is not SDPA's, or an output, and neither is the attention in lockstep. not built: no tiny model of it
runs here.
"""

SAMPLE = (
    # decoders: plain, sliding, chunked, soft-capped, with sinks, latent, of experts
    "llama",
    "qwen3",
    "mistral",
    "phi3",
    "gemma2",
    "gemma3_text",
    "cohere2",
    "llama4_text",
    "gpt_oss",
    "deepseek_v3",
    "mixtral",
    "qwen3_moe",
    "olmo2",
    "gpt2",
    "gpt_neox",
    "opt",
    "stablelm",
    "starcoder2",
    "jamba",
    # encoders
    "bert",
    "roberta",
    "albert",
    "distilbert",
    "modernbert",
    "electra",
    # encoders and decoders
    "t5",
    "bart",
    "marian",
    "pegasus",
    # vision
    "vit",
    "dinov2",
    "clip",
    "siglip",
    "beit",
    # audio
    "whisper",
    "wav2vec2",
    "hubert",
    # several at once
    "llava",
    "qwen2_vl",
    "gemma3",
    "idefics3",
)
"""What CI checks of all the types: one of each kind of attention."""


@dataclass
class Calls:
    """Attention calls of one run, decode steps left out (those are SDPA's by policy)."""

    kernel: int = 0
    sdpa: int = 0


@contextmanager
def counted_calls(*, mute: bool = False) -> Iterator[Calls]:
    """Counts what the plugin does with the attention calls it gets.

    Args:
        mute: replace every attention output by zeros, to see whether a comparison would notice.
    """
    calls = Calls()
    attend, sdpa = _of_plugin("attend"), _of_plugin("sdpa_attention_forward")

    def counted_attend(query: Tensor, key: Tensor, *arguments: Any, **named: Any) -> Tensor:
        if not is_decode_step(query.shape[2], key.shape[2]):
            calls.kernel += 1
        out = attend(query, key, *arguments, **named)
        return torch.zeros_like(out) if mute else out

    def counted_sdpa(
        module: torch.nn.Module, query: Tensor, key: Tensor, *arguments: Any, **named: Any
    ) -> tuple[Tensor, None]:
        if not is_decode_step(query.shape[2], key.shape[2]):
            calls.sdpa += 1
        out, weights = sdpa(module, query, key, *arguments, **named)
        return torch.zeros_like(out) if mute else out, weights

    with (
        patch.object(plugin, "attend", counted_attend),
        patch.object(plugin, "sdpa_attention_forward", counted_sdpa),
    ):
        yield calls


def _of_plugin(name: str) -> Any:
    # what the plugin calls by these names, which it imports for itself
    return getattr(plugin, name)


@contextmanager
def fallback_reasons() -> Iterator[list[str]]:
    """Collects why dma handed something over, each reason once."""
    reasons: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", DMAFallbackWarning)
        try:
            yield reasons
        finally:
            reasons += dict.fromkeys(str(warning.message) for warning in caught)


class _AttentionOperations(TorchDispatchMode):
    """Whether anything like attention is computed, by whatever code: SDPA, or a softmax over scores."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        known = ("scaled_dot_product", "softmax", "logsumexp")
        if any(part in name for part in known) and args[0].ndim >= 3:
            self.found = True
        return func(*args, **(kwargs or {}))


# -- one type ------------------------------------------------------------------------------------------


def check(model_type: str) -> dict[str, Any]:
    """Compares one model type under "dma" and SDPA.

    Returns:
        the type's entry of "runs" in `models.json`.
    """
    started = time.monotonic()
    entry = _empty_entry(model_type)
    try:
        tiny = tiny_model(model_type, None)
        entry |= {"class": tiny.model_class.__name__, "relaxed": list(tiny.relaxed)}
        _compare(tiny, entry)
    except CannotBuildError as error:
        entry["why"] = first_line(error)
    entry["seconds"] = round(time.monotonic() - started, 2)
    return entry


def _empty_entry(model_type: str) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "class": None,
        "outcome": "not built",
        "why": None,
        "baseline": None,
        "checked": [],
        "no_generate": None,
        "max_error": None,
        "effect": None,
        "lockstep_error": None,
        "kernel_calls": 0,
        "sdpa_calls": 0,
        "relaxed": [],
        "seconds": 0.0,
    }


def _compare(tiny: TinyModel, entry: dict[str, Any]) -> None:
    baseline = _baseline(tiny)
    entry["baseline"] = baseline.config._attn_implementation
    with _AttentionOperations() as operations:
        expected = {"forward": _run(baseline, tiny.inputs)}
    cases = padded_inputs(tiny, baseline)
    for name, inputs in cases.items():
        with suppress(Exception):  # inputs on which SDPA does not run tell nothing about DMA
            expected[name] = _run(baseline, inputs)
    worst, calls = 0.0, Calls()
    lockstep: float | None = None
    try:
        with fallback_reasons() as reasons:
            model = dma_hf.configure(tiny.build("dma"), EXACT)
            for name in expected:
                with counted_calls() as counted:
                    outputs = _run(model, cases[name])
                if name == "forward":
                    calls = counted
                worst = max(worst, largest_difference(expected[name], outputs, cases[name]))
                entry["checked"].append(name)
            wrong_tokens = _compare_generate(tiny, baseline, model, entry)
            with counted_calls(mute=True):
                muted = _run(model, tiny.inputs)
            effect = largest_difference(expected["forward"], muted, tiny.inputs)
            # the model makes much of one rounding, or little of attention
            if worst > TOLERANCE or (calls.kernel and effect < TELLING_EFFECT):
                lockstep = max(_lockstep_difference(baseline, model, cases[name]) for name in expected)
    except Exception as error:
        entry |= {"outcome": "refused", "why": f"{type(error).__name__}: {first_line(error)}"}
        return
    if calls == Calls() and operations.found and not reasons:
        reasons.append("its attention is code of its own, under every implementation")
    if lockstep is not None and (worst > TOLERANCE or lockstep > LOCKSTEP_TOLERANCE):
        reasons.append(
            f"an output differs by {worst:.1e}; in lockstep with SDPA, the attention by {lockstep:.1e}"
        )
    entry |= {
        "max_error": _json_number(worst),
        "effect": _json_number(effect),
        "lockstep_error": None if lockstep is None else _json_number(lockstep),
        "kernel_calls": calls.kernel,
        "sdpa_calls": calls.sdpa,
        "why": "; ".join(reasons) or None,
    }
    if lockstep is not None and lockstep > LOCKSTEP_TOLERANCE:
        entry["outcome"] = "wrong"
    elif wrong_tokens is not None:
        entry |= {"outcome": "wrong", "why": wrong_tokens}
    elif not operations.found:
        entry |= {"outcome": "no attention", "why": None}
    else:
        entry["outcome"] = "kernel" if calls.kernel > calls.sdpa else "sdpa"


def _lockstep_difference(
    baseline: PreTrainedModel, model: PreTrainedModel, inputs: Mapping[str, Any]
) -> float:
    """The largest difference of any attention call and output, where none reaches the next call."""
    both = in_lockstep(lambda: _run(baseline, inputs), lambda: _run(model, inputs))
    return largest_difference(both.expected, both.actual, inputs)


def _json_number(value: float) -> float | None:
    return float(f"{value:.2g}") if isfinite(value) else None  # JSON has no infinity


def _baseline(tiny: TinyModel) -> PreTrainedModel:
    """The model with SDPA, or with what Transformers chooses where it has no SDPA for it.

    That is eager attention, but SDPA in those of its parts that have it, as under "dma".
    """
    try:
        model = tiny.build("sdpa")
        _run(model, tiny.inputs)
    except Exception:
        return tiny.build(None)
    return model


def padded_inputs(tiny: TinyModel, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """What is compared: the inputs as they are and, of a text, with padding on either side."""
    cases = {"forward": tiny.inputs}
    if "input_ids" not in tiny.inputs or "attention_mask" not in inspect.signature(model.forward).parameters:
        return cases
    for name, padding in (("left padding", slice(None, PADDING)), ("right padding", slice(-PADDING, None))):
        mask = torch.ones(tiny.inputs["input_ids"].shape[:2], dtype=torch.long)
        mask[0, padding] = 0
        cases[name] = {**tiny.inputs, "attention_mask": mask}
    return cases


def _run(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)  # of models that draw numbers
    with torch.no_grad():
        return dict(tensors(model(**inputs)))


def _compare_generate(
    tiny: TinyModel, baseline: PreTrainedModel, model: PreTrainedModel, entry: dict[str, Any]
) -> str | None:
    """Greedy tokens of a left-padded batch under both; returns what is wrong, None if nothing is."""
    if not baseline.can_generate():
        return None
    inputs = {n: v for n, v in tiny.inputs.items() if n != "decoder_input_ids"}
    if "input_ids" in inputs:
        mask = torch.ones(inputs["input_ids"].shape[:2], dtype=torch.long)
        mask[0, :PADDING] = 0
        inputs["attention_mask"] = mask
    try:
        expected = _generate(baseline, inputs)
    except Exception as error:
        # what cannot be generated from these inputs with SDPA tells nothing about DMA
        entry["no_generate"] = f"{type(error).__name__}: {first_line(error)}"
        return None
    tokens = _generate(model, inputs)
    entry["checked"].append("generate")
    if not torch.equal(tokens, expected):
        return f"generate() gives {tokens.tolist()} and not {expected.tolist()}"
    return None


def _generate(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    settings = model.generation_config
    settings.eos_token_id = None
    if settings.decoder_start_token_id is None and settings.bos_token_id is None:
        settings.decoder_start_token_id = settings.bos_token_id = 1
    torch.manual_seed(0)
    with torch.no_grad():
        tokens = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
    return tokens if isinstance(tokens, Tensor) else tokens[0]


def largest_difference(
    expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], inputs: Mapping[str, Any]
) -> float:
    """The largest difference of two outputs, relative to the largest value of each where that is above 1.

    Rows of tokens that are padding are left out. An output that is missing, has another shape or is not
    finite where the other is makes it infinite.
    """
    worst = 0.0
    mask = inputs.get("attention_mask")
    for name in expected.keys() | actual.keys():
        left, right = expected.get(name), actual.get(name)
        if left is None or right is None or left.shape != right.shape:
            return float("inf")
        if mask is not None and left.ndim >= 3 and left.shape[0] == mask.shape[0]:
            summary = left.shape[1] - mask.shape[1]  # VideoPrism appends a token of its own
            if summary in (0, 1):
                real = pad(mask.bool(), (0, summary), value=True)
                left, right = left[real], right[real]
        finite = left.isfinite()
        if not torch.equal(finite, right.isfinite()):
            return float("inf")
        left, right = left[finite].double(), right[finite].double()
        if left.numel():
            scale = max(1.0, float(left.abs().max()))
            worst = max(worst, float((left - right).abs().max()) / scale)
    return worst


# -- all types -----------------------------------------------------------------------------------------


def sweep(
    model_types: Sequence[str],
    *,
    jobs: int = 2,
    journal: Journal = NO_JOURNAL,
    advance: Advance | None = None,
) -> list[dict[str, Any]]:
    """Checks model types, each in its own process.

    Args:
        model_types: keys of Transformers' `CONFIG_MAPPING`.
        jobs: processes at a time.
        journal: keeps what is finished, so that a sweep that was killed goes on.
        advance: is told of each finished type.

    Returns:
        their entries, in the same order.
    """
    entries = {name: found for name in model_types if (found := journal.get(model_type=name)) is not None}
    todo = [name for name in model_types if name not in entries]
    if advance is not None:
        advance(len(entries))
    for name, result in run_isolated(
        _check_alone, todo, jobs=jobs, timeout=TIMEOUT, preload=("transformers.generation",)
    ):
        if isinstance(result, Lost):
            result = {**_empty_entry(name), "why": result.why, "seconds": round(result.seconds, 2)}
        entries[name] = result
        journal.put(result, model_type=name)
        if advance is not None:
            advance(1)
    return [entries[name] for name in model_types]


def _check_alone(model_type: str) -> dict[str, Any]:
    """`check`, in a process that does nothing else."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    _limit_memory()
    return check(model_type)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not a Unix
        return
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))


def counts(entries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many types ended how, every outcome named."""
    found = Counter(entry["outcome"] for entry in entries)
    return {outcome: found[outcome] for outcome in OUTCOMES}
