"""Where in a model DMA's error arises: the attention output of every head against exact attention.

The model runs once a window, with SDPA. A probe in place of the attention function sees the queries,
keys and values of one layer at a time, computes every run's attention on them, and hands SDPA's
result on. So every layer is measured on the activations of the undisturbed model, and no layer pays
for the errors of those before it.

Exact attention is float32, computed a block of queries after the other; a probe keeps sums only. The
largest tensors are one layer's queries, keys, values and outputs, and ``CHUNK_ELEMENTS`` scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import dma_hf
from dma_hf import DMAConfig
from dma_hf.masks import START, STOP
from dma_hf.plugin import dma_attention_forward, dma_mask
from dma_hf.precision_map import precision_spans
from dma_hf.ranges_mask import RangesMask

from .attention import attention
from .errors import EvalError, UsageError
from .failures import Failures
from .journal import NO_JOURNAL, Journal
from .progress import Advance
from .runs import SDPA, Run
from .windows import Window

PROBE = "dma_eval_layer_probe"
"""The probe's name as an attention implementation of Transformers."""
CHUNK_ELEMENTS = 1 << 26
"""Scores computed at a time, 256 MiB in float32 (but never less than one key head's block of queries)."""
LONGEST_BLOCK = 128
"""Queries in a block, unless a setting's tiles are smaller."""


@dataclass(frozen=True)
class LayerErrors:
    """What one run measured: a list a layer, in it a value a query head."""

    run: Run
    layers: list[int]
    """The layers' indices in the model."""
    relative_error: list[list[float]]
    """‖out − exact‖ / ‖exact‖ over all tokens and channels."""
    cosine_similarity: list[list[float]]
    """Of a token's output and the exact one, mean over tokens."""
    high_mass: list[list[float]] | None
    """Share of the attention probability in tiles of high precision, mean over tokens. None for SDPA."""

    def summary(self) -> dict[str, Any]:
        """The run as results files hold it."""
        return {
            **self.run.describe(),
            "relative_error": self.relative_error,
            "cosine_similarity": self.cosine_similarity,
            "high_mass": self.high_mass,
        }


class ExactRows(NamedTuple):
    """Exact attention of some queries and heads, and where its probability lies."""

    heads: slice
    queries: slice
    output: Tensor
    """Float32 [heads, queries, Dv]."""
    high_mass: Tensor
    """Float32 [configs, heads]: probability in tiles of high precision, summed over the queries."""


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ranges: Tensor | None = None,
    *,
    scale: float,
    configs: Sequence[DMAConfig | None],
) -> Iterator[ExactRows]:
    """Causal attention in float32, a block of queries at a time, without a tensor of N x N elements.

    Args:
        query: [H, N, D]; key: [Hkv, N, D]; value: [Hkv, N, Dv], H a multiple of Hkv.
        ranges: which keys each query sees, int32 [N, 4] (see `dma_hf.masks`); all up to its own if None.
        scale: multiplies QK^T.
        configs: in whose tiles of high precision to sum the probability; None is SDPA, which has none.
    """
    heads, length, _ = query.shape
    kv_heads = key.shape[0]
    group = heads // kv_heads
    query, key, value = query.unflatten(0, (kv_heads, group)), key.float(), value.float()
    # tiles are powers of two: a block of the smallest size lies in one row of tiles of every setting
    block = min([LONGEST_BLOCK, *(config.tile for config in configs if config is not None)])
    for start in range(0, length, block):
        queries = slice(start, min(start + block, length))
        visible = queries.stop
        hidden = ~_seen(ranges, queries, query.device)
        kv_count = max(1, CHUNK_ELEMENTS // (group * block * visible))
        for first in range(0, kv_heads, kv_count):
            kv = slice(first, min(first + kv_count, kv_heads))
            rows = query[kv, :, queries].float().flatten(1, 2) * scale  # [kv, G * queries, D]
            scores = (rows @ key[kv, :visible].transpose(-1, -2)).unflatten(1, (group, -1))
            probabilities = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
            output = (probabilities.flatten(1, 2) @ value[kv, :visible]).unflatten(1, (group, -1))
            high_mass = probabilities.new_zeros(len(configs), output.shape[0] * group)
            for sums, config in zip(high_mass, configs, strict=True):
                if config is None:
                    continue
                for span in precision_spans(start // config.tile, visible, config, causal=True):
                    if span.high:
                        sums += probabilities[..., span.start : span.stop].sum((-1, -2)).flatten()
            query_heads = slice(kv.start * group, kv.stop * group)
            yield ExactRows(query_heads, queries, output.flatten(0, 1), high_mass)


def _seen(ranges: Tensor | None, queries: slice, device: torch.device) -> Tensor:
    """Which keys up to the last of ``queries`` each of them sees: bool [queries, keys]."""
    columns = torch.arange(queries.stop, device=device)
    if ranges is None:
        return columns <= columns[queries, None]
    rows = ranges[queries]
    return (columns >= rows[:, START, None]) & (columns < rows[:, STOP, None])


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, ranges: Tensor | None, **kwargs: Any
) -> Tensor:
    """SDPA's result, [1, N, H, Dv]. Where it needs a mask, it gets that of a block of queries at a time."""
    if ranges is None:
        plain: Tensor = sdpa_attention_forward(module, query, key, value, None, **kwargs)[0]
        return plain
    blocks = []
    for start in range(0, query.shape[2], LONGEST_BLOCK):
        queries = slice(start, min(start + LONGEST_BLOCK, query.shape[2]))
        blocks.append(
            scaled_dot_product_attention(
                query[:, :, queries],
                key[:, :, : queries.stop],
                value[:, :, : queries.stop],
                attn_mask=_seen(ranges, queries, query.device),
                scale=kwargs["scaling"],
                enable_gqa=True,
            )
        )
    return torch.cat(blocks, dim=2).transpose(1, 2).contiguous()


Sums = dict[str, Tensor]
"""Of one layer, over tokens, in float64 on the CPU or the model's device:

``squared_error``, ``cosine`` and ``high_mass`` [runs, heads], ``squared_norm`` [heads] and ``tokens`` [].
"""


class LayerProbe:
    """An attention function for Transformers that measures every run's error and returns SDPA's result.

    Args:
        runs: the attentions.
        failures: takes note of runs that fail, which are left out from then on.
        advance: told 1 after each layer.
    """

    def __init__(self, runs: Sequence[Run], failures: Failures, advance: Advance) -> None:
        self.runs = runs
        self.failures = failures
        self.layers: dict[int, Sums] = {}
        self._advance = advance

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """One layer: query [1, H, N, D], key [1, Hkv, N, D], value [1, Hkv, N, Dv] -> [1, N, H, Dv]."""
        layer = int(getattr(module, "layer_idx", len(self.layers)))
        ranges = _ranges(module, layer, attention_mask, kwargs)
        sdpa = _sdpa(module, query, key, value, ranges, scaling=scaling, **kwargs)
        outputs: list[Tensor | None] = [None] * len(self.runs)
        for r, run in enumerate(self.runs):
            if run.config is None:
                outputs[r] = sdpa[0].transpose(0, 1)
            elif run not in self.failures:
                dma_hf.configure(module, run.config)
                with self.failures.catch(run):
                    inputs = (module, query, key, value, attention_mask)
                    out = dma_attention_forward(*inputs, scaling=scaling, **kwargs)[0]
                    outputs[r] = out[0].transpose(0, 1)
        configs = [run.config and run.config.for_layer(layer) for run in self.runs]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        exact = exact_attention(query[0], key[0], value[0], ranges, scale=scale, configs=configs)
        self.layers[layer] = _compare(outputs, exact)
        self._advance(1)
        return sdpa, None


def _ranges(module: nn.Module, layer: int, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
    """The keys that each query sees, int32 [N, 4]; None where these are all up to its own.

    Raises:
        UsageError: if the layer computes what `exact_attention` is not the exact result of.
    """
    causal = kwargs.get("is_causal")
    found = {
        "is not causal": not (getattr(module, "is_causal", True) if causal is None else causal),
        "caps its scores (softcap)": kwargs.get("softcap") is not None,
        "has attention sinks (s_aux)": kwargs.get("s_aux") is not None,
        "has a position bias": kwargs.get("position_bias") is not None,
        "has a mask of its own": mask is not None
        and not (isinstance(mask, RangesMask) and mask.ranges is not None),
    }
    for what, present in found.items():
        if present:
            raise UsageError(f"layer {layer} {what}; 'layers' measures causal attention without that")
    ranges = mask.ranges if isinstance(mask, RangesMask) else None
    return None if ranges is None else ranges[0]


def _compare(outputs: Sequence[Tensor | None], exact_rows: Iterator[ExactRows]) -> Sums:
    """Sums of what ``outputs`` differ from the exact rows by: one [H, N, Dv] a run, None if it failed."""
    heads, tokens, _ = next(out.shape for out in outputs if out is not None)
    device = next(out.device for out in outputs if out is not None)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, heads, dtype=torch.float64, device=device)

    runs = len(outputs)
    squared_error, cosine, high_mass, squared_norm = zeros(runs), zeros(runs), zeros(runs), zeros()
    for rows in exact_rows:
        squared_norm[rows.heads] += rows.output.square().sum((-1, -2))
        high_mass[:, rows.heads] += rows.high_mass
        for r, whole in enumerate(outputs):
            if whole is None:
                continue
            output = whole[rows.heads, rows.queries].float()
            squared_error[r, rows.heads] += (output - rows.output).square().sum((-1, -2))
            cosine[r, rows.heads] += torch.cosine_similarity(output, rows.output, dim=-1).sum(-1)
    return {
        "squared_error": squared_error,
        "cosine": cosine,
        "high_mass": high_mass,
        "squared_norm": squared_norm,
        "tokens": torch.tensor(tokens, dtype=torch.float64),
    }


def compare_layers(
    model: PreTrainedModel,
    tokens: Tensor,
    runs: Sequence[Run],
    windows: Sequence[Window],
    *,
    failures: Failures,
    advance: Advance = lambda steps: None,
    journal: Journal = NO_JOURNAL,
) -> list[LayerErrors]:
    """Measures every head of every layer of ``model`` on windows of a text.

    Args:
        model: a causal language model in evaluation mode.
        tokens: the text, LongTensor [tokens].
        runs: the attentions; SDPA is one of them, to show the error that rounding alone makes.
        windows: which tokens to read, each window a sequence of its own.
        failures: takes note of the runs that fail; the results lack them.
        advance: told 1 after each layer of each window.
        journal: where finished windows are kept.

    Raises:
        UsageError: if a layer's attention is more than causal attention, with or without a window.
        EvalError: if the model's activations are not finite.
    """
    if SDPA not in runs:
        raise ValueError("runs must have SDPA among them")
    total: dict[int, Sums] = {}
    for window in windows:
        measured: dict[int, Sums] | None = journal.get(start=window.start)
        if measured is None:
            measured = _measure_window(model, tokens[window.inputs], runs, failures, advance)
            if not len(failures):  # a continued run tries again what failed
                journal.put(measured, start=window.start)
        else:
            advance(len(measured))
        for layer, sums in measured.items():
            so_far = total.setdefault(layer, {name: torch.zeros_like(value) for name, value in sums.items()})
            for name, value in sums.items():
                so_far[name] += value
    return [_errors(run, r, total) for r, run in enumerate(runs) if run not in failures]


def _measure_window(
    model: PreTrainedModel, tokens: Tensor, runs: Sequence[Run], failures: Failures, advance: Advance
) -> dict[int, Sums]:
    """The sums of every layer, on the CPU, from one pass over ``tokens`` [tokens]."""
    probe = LayerProbe(runs, failures, advance)
    with _probing(model, probe), torch.inference_mode():
        # the decoder without its head: nobody reads the logits
        model.base_model(tokens.to(model.device)[None], use_cache=False)
    if not probe.layers:
        raise EvalError("layers: the model never called its attention function")
    return {
        layer: {name: value.cpu() for name, value in sums.items()} for layer, sums in probe.layers.items()
    }


def _errors(run: Run, r: int, layers: dict[int, Sums]) -> LayerErrors:
    """What the sums say about run number ``r``."""
    order = sorted(layers)
    errors, cosines, masses = [], [], []
    for layer in order:
        sums = layers[layer]
        error = (sums["squared_error"][r] / sums["squared_norm"]).sqrt()
        if not bool(error.isfinite().all()):
            raise EvalError(
                f"run '{run.name}': the attention output of layer {layer} has no finite error"
                " (for float16 try --dtype bfloat16)"
            )
        errors.append(error.tolist())
        cosines.append((sums["cosine"][r] / sums["tokens"]).tolist())
        masses.append((sums["high_mass"][r] / sums["tokens"]).tolist())
    return LayerErrors(run, order, errors, cosines, None if run.config is None else masses)


@contextmanager
def _probing(model: PreTrainedModel, probe: LayerProbe) -> Iterator[None]:
    AttentionInterface.register(PROBE, probe)
    AttentionMaskInterface.register(PROBE, dma_mask)
    with attention(model, None):  # puts implementation and settings back as they were
        model.set_attn_implementation(PROBE)
        yield


class Head(NamedTuple):
    """One head of a results file's run, by its error."""

    layer: int
    head: int
    relative_error: float
    cosine_similarity: float
    high_mass: float | None


def heads_by_error(layers: Sequence[int], run: dict[str, Any]) -> list[Head]:
    """The heads of a run of ``layers.json``, the worst relative error first; ``layers`` are its indices."""
    masses = run["high_mass"] or [[None] * len(row) for row in run["relative_error"]]
    heads = [
        Head(layer, h, error, run["cosine_similarity"][i][h], masses[i][h])
        for i, layer in enumerate(layers)
        for h, error in enumerate(run["relative_error"][i])
    ]
    return sorted(heads, key=lambda head: -head.relative_error)
