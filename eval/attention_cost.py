"""How fast a setting of DMA is expected to be: a cost model of attention, simple enough to check by hand.

Long prompts spend their attention time in score tiles. A tile in one format takes a constant time, so

    time = share of high tiles · time of a high tile + share of low tiles · time of a low tile

summed over the layers, in units of a tile of DMA's kernel without quantisation. What the model leaves
out: quantisation and start-up (they matter below about 8k tokens), rotation, sliding windows (their
layers count as full ones), and everything in the model that is not attention. The time of a tile in
each format is

* measured: from a ``kernels.json`` of ``dma-eval kernels``; one of an H200 comes with the package;
* stated: from the peak rates of a GPU's data sheet, where nothing was measured.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dma_hf import DMAConfig
from dma_hf.formats import NONE

from .errors import UsageError

SHORTEST_MEASURED = 16_384
"""Tokens: below, start-up and quantisation blur what a tile takes."""


@dataclass(frozen=True)
class TileTimes:
    """What a score tile takes in each format, both matrix products, relative to an unquantised one."""

    source: str
    """Where the numbers come from, for people."""
    measured: bool
    formats: Mapping[str, float]
    sdpa: float
    """A tile of PyTorch's SDPA."""


H200_KERNELS = Path(__file__).parent / "results" / "h200" / "kernels.json"

PEAK_BLACKWELL = {
    "mxfp4": 0.625,
    "nvfp4": 0.625,
    "mxfp8": 0.75,
    "mxfp8_e5m2": 0.75,
    "fp8": 0.75,
    "int8": 1.0,
    NONE: 1.0,
}
"""QK^T at 4 (FP4), 2 (FP8) and 1 (16-bit) times the rate of PV, which is as many operations again."""

SDPA = "SDPA"
BUILT_IN = ("h200", "blackwell")


def tile_times(source: str, head_dim: int) -> TileTimes:
    """The times that ``--costs`` names: ``h200``, ``blackwell``, or a ``kernels.json``.

    Args:
        source: the name or the path.
        head_dim: of the model; of what was measured, the nearest head dimension counts.

    Raises:
        UsageError: if it is neither, or the file lacks what is needed.
    """
    if source == "blackwell":
        return TileTimes(
            "peak rates of Blackwell (arithmetic alone, never measured)", False, PEAK_BLACKWELL, sdpa=1.0
        )
    path = H200_KERNELS if source == "h200" else Path(source).expanduser()
    if path.suffix != ".json":
        raise UsageError(f"--costs must be {', '.join(BUILT_IN)} or a kernels.json, got '{source}'")
    try:
        times = measured_tile_times(json.loads(path.read_text(encoding="utf-8")), head_dim)
    except OSError as error:
        raise UsageError(f"cannot read --costs '{source}': {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--costs '{source}' is no kernels.json to work with: {error}") from error
    if source == "h200" and "nvfp4" in times.formats:
        # On Hopper all three run alike: on 16-bit tensor cores, from dequantised elements.
        alike = dict.fromkeys(("mxfp8", "mxfp8_e5m2"), times.formats["nvfp4"])
        return replace(times, formats={**alike, **times.formats})
    return times


def measured_tile_times(kernels: dict[str, Any], head_dim: int) -> TileTimes:
    """The times that a ``kernels.json`` shows, from its causal shapes of at least 16,384 tokens.

    A format's time is the median over these shapes of its time against ``low=none,high=none``, where it
    is the low format: there all but a hundredth of the tiles are low, and the rest is not corrected for.

    Raises:
        ValueError: if there is no such shape, or nothing unquantised or no SDPA to compare with.
    """
    shapes: dict[tuple[int, ...], dict[str, float]] = {}
    for run in kernels["runs"]:
        shape, config = run["shape"], run["config"]
        if run["op"] != "attention" or run["ms"] is None or not shape["causal"]:
            continue
        if config is None and run["provider"] != SDPA:
            continue
        if shape["length"] < SHORTEST_MEASURED or shape["heads"] == shape["kv_heads"]:
            continue
        key = tuple(shape[name] for name in ("head_dim", "length", "batch", "heads", "kv_heads"))
        name = SDPA if config is None else config["low"]
        # of several settings with one low format, the first counts
        shapes.setdefault(key, {}).setdefault(name, run["ms"])
    complete = {key: times for key, times in shapes.items() if NONE in times and SDPA in times}
    if not complete:
        raise ValueError(
            f"it has no causal shape of {SHORTEST_MEASURED:,} tokens or more with SDPA and low=none,high=none"
        )
    nearest = min((key[0] for key in complete), key=lambda measured: abs(measured - head_dim))
    ratios: dict[str, list[float]] = {}
    for key, times in complete.items():
        if key[0] == nearest:
            for name, ms in times.items():
                ratios.setdefault(name, []).append(ms / times[NONE])
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    sdpa = medians.pop(SDPA)
    hardware = kernels["environment"]["hardware"]
    return TileTimes(f"measured on {hardware}, head dimension {nearest}", True, medians, sdpa)


def high_share(config: DMAConfig, length: int) -> float:
    """Share of the tiles of causal attention over ``length`` tokens that are computed in high precision."""
    rows = -(-length // config.tile)
    high = 0
    for row in range(rows):
        diagonal = min(row + 1, config.diagonal_tiles)
        high += diagonal + min(config.sink_tiles, row + 1 - diagonal)
    return high / (rows * (rows + 1) / 2)


def attention_time(config: DMAConfig, length: int, times: TileTimes) -> float:
    """Time of one layer's attention over ``length`` tokens; 1 is DMA's kernel without quantisation.

    Args:
        config: the layer's setting (``DMAConfig.for_layer``).

    Raises:
        UsageError: if nothing is known about one of the formats.
    """
    for format in (config.low, config.high):
        if format not in times.formats:
            raise UsageError(
                f"--costs: no time for the format '{format}'; known are {', '.join(times.formats)}"
            )
    share = high_share(config, length)
    return share * times.formats[config.high] + (1 - share) * times.formats[config.low]


def speed_against_sdpa(layers: Sequence[DMAConfig], length: int, times: TileTimes) -> float:
    """How many times as fast as SDPA the attention of all ``layers`` is expected to be."""
    return times.sdpa * len(layers) / sum(attention_time(config, length, times) for config in layers)
