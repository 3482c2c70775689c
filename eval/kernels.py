"""The suites of the kernel benchmark: what each one runs, and which measurements its table shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from .errors import UsageError
from .kernel_ablations import (
    FUSION_CONFIGS,
    FUSION_SHAPES,
    QUANTIZE_CONFIGS,
    QUANTIZE_SHAPES,
    QUANTIZERS,
    TILES_CONFIGS,
    TILES_SHAPE,
    KeyShape,
    compare_quantizers,
    compare_tiles,
    tile_settings,
)
from .kernel_benchmark import Run, compare_attention
from .kernel_inputs import Shape, attention_shapes
from .kernel_masks import MASK_CONFIGS, compare_masks, mask_batches, provider_count
from .kernel_providers import DEFAULT_KERNEL_CONFIGS, attention_providers
from .kernel_timing import Meter
from .progress import Advance
from .runs import parse_config
from .tables import kernel_table, show

FIELDS = {
    "attention": ("ms", "tflops", "ratio_to_sdpa_default", "rel_error", "extra_bytes"),
    "fusion": ("ms", "gb_per_s", "ratio_to_copy", "ratio_to_fused", "extra_bytes"),
    "tiles": ("ms", "tflops", "ratio_to_sdpa_default", "rel_error"),
    "quantize": ("ms", "gb_per_s", "ratio_to_copy", "extra_bytes"),
    "masks": ("ms", "ratio_to_sdpa_default", "rel_error", "extra_bytes", "mask_bytes"),
}
"""The suites, and the columns of their tables."""


@dataclass(frozen=True)
class Plan:
    """One suite, checked and ready to run.

    Attributes:
        suite: its name.
        steps: how often ``run`` advances.
        run: measures with a meter; gives the "runs" of the results file.
    """

    suite: str
    steps: int
    run: Callable[[Meter, Advance], list[Run]]

    @property
    def file_name(self) -> str:
        """Of its results."""
        return "kernels.json" if self.suite == "attention" else f"kernels_{self.suite}.json"


def plan_suite(
    suite: str, configs: Sequence[str] | None, *, quick: bool = False, lengths: Sequence[int] | None = None
) -> Plan:
    """Plans one of the suites in `FIELDS`.

    Args:
        configs: settings of DMA; the suite's own when None.
        quick: the least that tells something.
        lengths: of the attention suite's series, in tokens; None for its own.

    Raises:
        UsageError: a string of ``configs`` is no setting, or one without anything to quantise.
    """
    if suite == "attention":
        shapes = attention_shapes(quick=quick, lengths=lengths)
        providers = attention_providers(configs or DEFAULT_KERNEL_CONFIGS)
        return Plan(
            suite,
            len(shapes) * len(providers),
            lambda meter, advance: compare_attention(shapes, providers, meter, advance),
        )
    if suite == "tiles":
        settings = {
            name: config
            for text in _quantizing(configs or TILES_CONFIGS)
            for name, config in tile_settings(text, quick=quick).items()
        }
        return Plan(
            suite,
            len(settings) + 1,
            lambda meter, advance: compare_tiles(TILES_SHAPE, settings, meter, advance),
        )
    if suite == "masks":
        batches, texts = mask_batches(), list(configs or MASK_CONFIGS)
        for text in texts:
            parse_config(text)
        if quick:
            batches, texts = batches[:1], texts[:1]
        return Plan(
            suite,
            provider_count(batches, texts),
            lambda meter, advance: compare_masks(batches, texts, meter, advance),
        )
    if suite == "fusion":
        key_shapes, default, quantizers = FUSION_SHAPES, FUSION_CONFIGS, QUANTIZERS
    else:
        key_shapes, default, quantizers = QUANTIZE_SHAPES, QUANTIZE_CONFIGS, {"fused": QUANTIZERS["fused"]}
    if quick:
        key_shapes, default = key_shapes[:1], default[:1]
    texts = _quantizing(configs or default)
    return Plan(
        suite,
        len(key_shapes) * len(texts) * len(quantizers),
        lambda meter, advance: compare_quantizers(key_shapes, texts, quantizers, meter, advance),
    )


def _quantizing(configs: Sequence[str]) -> list[str]:
    for text in configs:
        if not parse_config(text).quantizes:
            raise UsageError(f"--config '{text}': quantises nothing, and this suite is about quantising")
    return list(configs)


def show_runs(suite: str, runs: Sequence[Run]) -> None:
    """Prints the suite's tables, one for each shape."""
    for shape, of_shape in groupby(runs, key=lambda run: run["shape"]):
        show(_title(shape), kernel_table(list(of_shape), FIELDS[suite]))


def _title(shape: dict[str, Any]) -> str:
    if "mask" in shape:
        sizes = {name: value for name, value in shape.items() if name not in ("mask", "mask_tokens")}
        tokens = "" if shape["mask_tokens"] is None else f" of {shape['mask_tokens']:,}"
        return f"{shape['mask']}{tokens}: {Shape(**sizes)}"
    return str(Shape(**shape) if "heads" in shape else KeyShape(**shape))
