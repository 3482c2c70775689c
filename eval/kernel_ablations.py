"""The kernel benchmark's other suites: what fusing the quantiser buys, what tiles cost, and bandwidths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dma_hf import DMAConfig, quantize
from dma_hf.formats import NONE
from dma_hf.transforms import key_mean, rotate

from .kernel_benchmark import Run, failure, measure_provider, relate, run_entry
from .kernel_inputs import DTYPE, Shape, float32_attention, structured_inputs
from .kernel_providers import SDPA, dma_provider, key_quantizer
from .kernel_timing import Call, Meter
from .progress import Advance
from .runs import parse_config

FUSION_CONFIGS: tuple[str, ...] = ("paper", "low=mxfp4,high=mxfp8")
QUANTIZE_CONFIGS: tuple[str, ...] = (
    "paper",
    "paper,rotate=true",
    "paper,smooth_k=false",
    "low=mxfp8,high=mxfp8",
    "low=mxfp4,high=none",
    "low=fp8,high=none",
    "low=int8,high=none",
)
TILES_CONFIGS = ("paper",)
TILES_SHAPE = Shape(1, 32, 8, 16_384, 128)
DIAGONAL_TILES = (0, 1, 2, 4, 8)
SINK_TILES = (0, 1, 2)


@dataclass(frozen=True)
class KeyShape:
    """K alone: [batch, kv_heads, length, head_dim] in bfloat16."""

    batch: int
    kv_heads: int
    length: int
    head_dim: int

    @property
    def nbytes(self) -> int:
        """Bytes of K."""
        return self.batch * self.kv_heads * self.length * self.head_dim * DTYPE.itemsize

    def describe(self) -> dict[str, Any]:
        """The fields, as results files hold them."""
        return asdict(self)

    def __str__(self) -> str:
        size = self.nbytes / 2**20
        return (
            f"K of {self.batch} × {self.length:,} tokens, {self.kv_heads} heads,"
            f" head dimension {self.head_dim} ({size:,.0f} MiB)"
        )


# 256 MiB and more: the caches hold none of it
FUSION_SHAPES: tuple[KeyShape, ...] = (KeyShape(8, 8, 16_384, 128),)
QUANTIZE_SHAPES: tuple[KeyShape, ...] = (
    *FUSION_SHAPES,
    KeyShape(16, 8, 16_384, 64),
    KeyShape(1, 8, 16_384, 128),
)


def random_key(shape: KeyShape, device: torch.device) -> Tensor:
    """K [batch, kv_heads, length, head_dim], normally distributed around a mean per channel."""
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.batch, shape.kv_heads, shape.length, shape.head_dim)
    key = torch.randn(size, generator=generator, device=device, dtype=DTYPE)
    return key + torch.randn(shape.head_dim, generator=generator, device=device, dtype=DTYPE)


# ---- the quantiser: fused, in separate passes, in PyTorch


def separate_passes(key: Tensor, config: DMAConfig) -> Call:
    """The fused quantiser taken apart: mean, smoothing, low format, high format, each its own launch.

    Every pass after the first reads what the one before wrote: K smoothed, in K's own type. The passes
    themselves are as good as the fused one: the same kernels, with one format at a time.
    """
    low = replace(config, high=NONE, smooth_k=False)
    high = replace(config, low=NONE, smooth_k=False)

    def call() -> object:
        smoothed = key
        if config.smooth_k:
            smoothed = key - key.mean(2, keepdim=True, dtype=torch.float32).to(key.dtype)
        return [key_quantizer(smoothed, part)() for part in (low, high) if part.quantizes]

    return call


def eager_pytorch(key: Tensor, config: DMAConfig) -> Call:
    """The same in eager PyTorch: ``dma_hf.quantize``, the definition, after smoothing and rotation."""

    def call() -> object:
        x = key.float()
        if config.smooth_k:
            x = x - key_mean(x)
        if config.rotate:
            x = rotate(x)
        formats = {config.low, config.high} - {NONE}
        return [quantize(x, name, scale_rule=config.scale_rule) for name in sorted(formats)]

    return call


Quantizers = dict[str, Callable[[Tensor, DMAConfig], Call]]

QUANTIZERS: Quantizers = {
    "fused": key_quantizer,
    "separate passes": separate_passes,
    "eager PyTorch": eager_pytorch,
}


def compare_quantizers(
    shape: KeyShape,
    configs: Sequence[str],
    quantizers: Quantizers,
    meter: Meter,
    advance: Advance,
) -> list[Run]:
    """Time and bandwidth of every quantiser in every setting, next to a copy of K.

    The bytes counted are those of the first quantiser, the fused one, for all of them: K read (twice
    with smoothing, whose mean must be known first), and what it writes. So GB/s compare as times do; a
    quantiser that moves more bytes than these shows it as less bandwidth. Calls ``advance`` after every
    quantiser.

    Returns:
        Entries as `run_entry` makes them, with "bytes", "gb_per_s", "ratio_to_copy" (of bandwidths) and
        "ratio_to_fused" (of times; above 1 is slower than the first quantiser).
    """
    key = random_key(shape, meter.device)
    copy_ms = _copy_milliseconds(key, meter)
    copy_rate = _rate(2 * shape.nbytes, copy_ms)
    run = run_entry("copy", "torch.Tensor.copy_", shape.describe(), config=None)
    runs = [{**run, "ms": copy_ms, "bytes": 2 * shape.nbytes, "gb_per_s": copy_rate}]
    for text in configs:
        config = parse_config(text)
        fused_ms = written = None
        for name, make_call in quantizers.items():
            run = run_entry("quantize", f"{text}: {name}", shape.describe(), config=config.to_dict())
            try:
                call = make_call(key, config)
                written = _bytes_written(call()) if written is None else written
                moved = shape.nbytes * (2 if config.smooth_k else 1) + written
                run["extra_bytes"] = meter.extra_bytes(call)
                ms = meter.milliseconds(call)
                fused_ms = fused_ms or ms
                run.update(ms=ms, includes_quantization=True, bytes=moved, gb_per_s=_rate(moved, ms))
                run.update(ratio_to_copy=run["gb_per_s"] / copy_rate, ratio_to_fused=ms / fused_ms)
            except Exception as error:  # as in `measure_provider`
                run["error"] = failure(error)
            runs.append(run)
            advance(1)
    return runs


def _copy_milliseconds(key: Tensor, meter: Meter) -> float:
    copy = torch.empty_like(key)
    return meter.milliseconds(lambda: copy.copy_(key))


def _bytes_written(result: Any) -> int:
    parts = result if isinstance(result, list) else [result]
    return sum(part.nbytes for part in parts)


def _rate(count: int, ms: float) -> float:
    """GB/s."""
    return count / ms / 1e6


# ---- how many tiles to keep in high precision


def tile_settings(text: str, *, quick: bool = False) -> dict[str, DMAConfig]:
    """The settings of the tile ablation by name: ``text`` with other numbers of tiles.

    The last one computes everything in the high format: what more tiles converge to.
    """
    config = parse_config(text)
    diagonals, sinks = (DIAGONAL_TILES[:3], (1,)) if quick else (DIAGONAL_TILES, SINK_TILES)
    settings = {
        f"{text}: diagonal {diagonal}, sink {sink}": replace(
            config, diagonal=diagonal * config.tile, sink=sink * config.tile
        )
        for diagonal in diagonals
        for sink in sinks
    }
    return {**settings, f"{text}: all in {config.high}": replace(config, low=config.high)}


def compare_tiles(shape: Shape, settings: dict[str, DMAConfig], meter: Meter, advance: Advance) -> list[Run]:
    """Error and time by number of diagonal and sink tiles, on `structured_inputs`, next to SDPA.

    Returns:
        Entries as `run_entry` makes them, with "diagonal_tiles" and "sink_tiles". Calls ``advance``
        after SDPA and after every setting.
    """
    inputs = structured_inputs(shape, meter.device)
    expected = float32_attention(inputs)
    runs = measure_provider(SDPA, inputs, expected, meter)
    advance(1)
    for name, config in settings.items():
        # the quantiser does not depend on the tiles: its part is no news
        measured = measure_provider(dma_provider(name, config, parts=False), inputs, expected, meter)
        for run in measured:
            run.update(diagonal_tiles=config.diagonal_tiles, sink_tiles=config.sink_tiles)
        runs += measured
        advance(1)
    relate(runs, runs[0]["ms"])
    return runs
