"""The kernel benchmark's suite of masks: padded, packed, sliding-window and prefix batches.

Both sides are called as a model calls them: through the attention functions registered with Transformers,
with the masks that Transformers makes for them. Masks are made once a forward pass, not once a layer, so
making them is not timed; what they hold in memory is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from dma_hf.plugin import dma_attention_forward, dma_mask
from dma_hf.ranges_mask import RangesMask

from .kernel_benchmark import Run, measure_provider, relate
from .kernel_inputs import CHECKED_QUERIES, Inputs, Shape, float32_attention, random_inputs
from .kernel_providers import Operations, Provider
from .kernel_timing import Meter
from .progress import Advance
from .runs import parse_config

MASK_CONFIGS: tuple[str, ...] = ("paper", "low=mxfp4,high=none", "low=int8,high=none")

MaskFunction = Callable[..., Any]


@dataclass(frozen=True)
class Batch:
    """One kind of batch and its sizes.

    Attributes:
        mask: "padded" (left), "packed", "window", "prefix" (bool: the first tokens see each other) or
            "none" (causal).
        shape: of the call. A packed batch is one row of the sequences that a padded one has in its rows.
        lengths: real tokens of each padded row, or of each packed sequence.
        size: tokens of the window or of the prefix.
    """

    mask: str
    shape: Shape
    lengths: tuple[int, ...] = ()
    size: int | None = None

    def describe(self) -> dict[str, Any]:
        """The shape and the mask, as results files hold them."""
        return {**self.shape.describe(), "mask": self.mask, "mask_tokens": self.size}


def uniform_lengths(rows: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Lengths between ``shortest`` and ``longest``, always the same."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(shortest, longest + 1, (rows,), generator=generator).tolist())


def mask_batches(unit: int = 1024, heads: int = 32, kv_heads: int = 8, head_dim: int = 128) -> list[Batch]:
    """The batches of the suite: 8k padded and packed, a 4k window at 32k, and a prefix of 2k at 8k.

    Args:
        unit: what they call 1k: tokens. Smaller makes all of them smaller.
    """

    def shape(batch: int, length: int) -> Shape:
        return Shape(batch, heads, kv_heads, length, head_dim)

    lengths = uniform_lengths(8, unit, 8 * unit)
    return [
        Batch("padded", shape(8, 8 * unit), lengths),
        Batch("packed", shape(1, sum(lengths)), lengths),
        Batch("window", shape(1, 32 * unit), size=4 * unit),
        Batch("prefix", shape(1, 8 * unit), size=2 * unit),
    ]


def make_mask(batch: Batch, make: Callable[..., Tensor | None], device: torch.device) -> Tensor | None:
    """The mask of ``batch`` as ``make`` (`sdpa_mask` or `dma_mask`) makes it; None for plain causal."""
    length = batch.shape.length
    function: MaskFunction = causal_mask_function
    padding = None
    if batch.mask == "padded":
        start = length - torch.tensor(batch.lengths, device=device)
        padding = torch.arange(length, device=device) >= start[:, None]
    elif batch.mask == "packed":
        sequences = torch.arange(len(batch.lengths), device=device)
        ids = sequences.repeat_interleave(torch.tensor(batch.lengths, device=device))
        function = and_masks(function, packed_sequence_mask_function(ids[None]))
    elif batch.mask == "window":
        assert batch.size is not None
        function = sliding_window_causal_mask_function(batch.size)
    elif batch.mask == "prefix":
        function = or_masks(function, lambda b, h, query, key: key < batch.size)
    return make(
        batch_size=batch.shape.batch,
        q_length=length,
        kv_length=length,
        mask_function=function,
        attention_mask=padding,
        # Transformers drops the mask where it believes that causal attention needs none
        allow_is_causal_skip=batch.mask == "none",
        device=device,
    )


def mask_bytes(mask: Tensor | None) -> int:
    """What a mask holds in memory. A query-ranges mask holds four numbers a query."""
    if mask is None:
        return 0
    if isinstance(mask, RangesMask) and mask.ranges is not None:
        return mask.ranges.nbytes
    return mask.untyped_storage().nbytes()


def _layer(shape: Shape, setting: dict[str, Any] | None = None) -> Any:
    """What the attention functions read from the layer that calls them."""
    return SimpleNamespace(
        is_causal=True,
        layer_idx=0,
        num_key_value_groups=shape.heads // shape.kv_heads,
        config=SimpleNamespace(dma_config=setting),
    )


def _forward_provider(name: str, config: str | None, mask: Tensor | None) -> Provider:
    setting = None if config is None else parse_config(config)
    forward: Callable[..., tuple[Tensor, None]] = (
        sdpa_attention_forward if setting is None else dma_attention_forward
    )

    def operations(inputs: Inputs) -> Operations:
        layer = _layer(inputs.shape, None if setting is None else setting.to_dict())

        def call() -> Tensor:
            out, _ = forward(layer, inputs.query, inputs.key, inputs.value, mask, scaling=inputs.scale)
            return out.transpose(1, 2)  # [B, H, N, D]: what `measure_provider` compares

        yield "attention", call

    return Provider(name, operations, setting)


def last_queries_attention(inputs: Inputs, mask: Tensor | None) -> Tensor:
    """float32 attention of the last queries under SDPA's ``mask``: [B, H, queries, D]."""
    if mask is None:
        return float32_attention(inputs)
    queries = min(CHECKED_QUERIES, inputs.shape.length)
    return scaled_dot_product_attention(
        inputs.query[:, :, -queries:].float(),
        inputs.key.float(),
        inputs.value.float(),
        attn_mask=mask[..., -queries:, :],
        scale=inputs.scale,
        enable_gqa=inputs.shape.heads != inputs.shape.kv_heads,
    )


def provider_count(batch: Batch, configs: Sequence[str]) -> int:
    """How often `compare_masks` advances."""
    return (1 + len(configs)) * (2 if batch.mask == "window" else 1)


def compare_masks(batch: Batch, configs: Sequence[str], meter: Meter, advance: Advance) -> list[Run]:
    """Time and memory of a batch under SDPA with its 4-D mask, and under DMA.

    A window is measured next to causal attention without a mask on the same inputs: what it saves.
    Calls ``advance`` after every implementation.

    Returns:
        Entries as `run_entry` makes them, with "mask_bytes", and the mask in "shape". Ratios are to SDPA
        with the mask.
    """
    inputs = random_inputs(batch.shape, meter.device)
    runs: list[Run] = []
    compared = [batch, replace(batch, mask="none", size=None)] if batch.mask == "window" else [batch]
    for part in compared:
        dense = make_mask(part, sdpa_mask, meter.device)
        expected = last_queries_attention(inputs, dense)
        suffix = "" if part is batch else ", causal without a mask"
        masks = [dense] + [make_mask(part, dma_mask, meter.device)] * len(configs)
        del dense
        for config, mask in zip((None, *configs), masks, strict=True):
            name = ("SDPA" if config is None else f"DMA {config}") + suffix
            (run,) = measure_provider(_forward_provider(name, config, mask), inputs, expected, meter)
            # nominal operations of full attention would say nothing here
            run.update(tflops=None, mask_bytes=mask_bytes(mask))
            runs.append(run)
            advance(1)
    for run in runs:
        run["shape"] = batch.describe()
    relate(runs, runs[0]["ms"])
    return runs
