"""The suites of the kernel benchmark: what each one runs, and which measurements its table shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import dma_hf
from dma_hf.tuning import HEAD_DIMS

from .errors import UsageError
from .journal import NO_JOURNAL, Journal, text_fingerprint
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
from .kernel_compile import Launch, launch_of
from .kernel_inputs import Shape
from .kernel_masks import MASK_CONFIGS, compare_masks, mask_batches, provider_count
from .kernel_providers import (
    DEFAULT_OTHERS,
    FORMAT_CONFIGS,
    OTHERS,
    PRESET_CONFIGS,
    SDPA,
    dma_providers,
)
from .kernel_timing import Meter
from .kernel_tuning import check_head_dim, describe, measure_cell, tuning_cells, verdict
from .progress import Advance
from .runs import parse_config
from .tables import kernel_table, show

FIELDS = {
    "attention": ("ms", "tflops", "ratio_to_sdpa_default", "rel_error", "extra_bytes"),
    "fusion": ("ms", "gb_per_s", "ratio_to_copy", "ratio_to_fused", "extra_bytes"),
    "tiles": ("ms", "tflops", "ratio_to_sdpa_default", "rel_error"),
    "quantize": ("ms", "gb_per_s", "ratio_to_copy", "extra_bytes"),
    "masks": ("ms", "ratio_to_sdpa_default", "rel_error", "extra_bytes", "mask_bytes"),
    "tune": ("ms", "tflops", "ratio_to_chosen", "rel_error"),
}
"""The suites, and the columns of their tables."""


@dataclass(frozen=True)
class Part:
    """What is measured together, and kept or repeated together: all of a suite on one shape.

    A ratio needs both of its sides under the same clocks, so a part that was interrupted starts again.

    Attributes:
        shape: as results files hold it.
        settings: what is compared, as JSON values: with the shape, all that the part depends on.
        steps: how often ``run`` advances.
        run: measures with a meter; gives entries of "runs" of the results file.
        launches: what can be compiled before.
    """

    shape: dict[str, Any]
    settings: Any
    steps: int
    run: Callable[[Meter, Advance], list[Run]]
    launches: tuple[Launch, ...] = ()

    def key(self, suite: str) -> dict[str, Any]:
        """What tells this part from the others in a journal."""
        return {"suite": suite, "shape": self.shape, "settings": self.settings}


@dataclass(frozen=True)
class Plan:
    """One suite, checked and ready to run."""

    suite: str
    parts: list[Part]

    @property
    def file_name(self) -> str:
        """Of its results."""
        return "kernels.json" if self.suite == "attention" else f"kernels_{self.suite}.json"


def plan_attention(
    shapes: Sequence[Shape], configs: Sequence[str] | None = None, others: Sequence[str] = DEFAULT_OTHERS
) -> Plan:
    """Plans the suite "attention".

    Args:
        configs: settings of DMA. When None the presets, and on one shape of each head dimension the
            formats by themselves, from which `attention_cost` predicts.
        others: names in `OTHERS`.

    Raises:
        UsageError: a string of ``configs`` is no setting.
    """
    parts = []
    for shape in shapes:
        texts = configs or (*PRESET_CONFIGS, *(FORMAT_CONFIGS if _shows_formats(shape) else ()))
        providers = [SDPA, *(OTHERS[name] for name in others), *dma_providers(texts)]
        settings = [(p.name, None if p.config is None else p.config.to_dict()) for p in providers]
        run = partial(compare_attention, shape, providers)
        launches = tuple(launch_of(shape, p.config) for p in providers if p.config is not None)
        parts.append(Part(shape.describe(), settings, len(providers), run, launches))
    return Plan("attention", parts)


def plan_tuning(capability: int, head_dims: Sequence[int] | None = None) -> Plan:
    """Plans the measurement of the table in dma_hf/tuning.py for a GPU of this compute capability.

    Args:
        capability: 90 for sm_90.
        head_dims: to measure at; None for the classes of the table.

    Raises:
        UsageError: a head dimension that the kernels do not serve.
    """
    for head_dim in head_dims or ():
        check_head_dim(head_dim)
    return Plan(
        "tune",
        [
            Part(
                cell.describe(),
                {"config": _described([cell.config]), "candidates": list(map(describe, cell.candidates))},
                len(cell.candidates),
                partial(measure_cell, cell),
                tuple(launch_of(cell.shape, parse_config(cell.config), b) for b in cell.candidates),
            )
            for cell in tuning_cells(capability, head_dims or HEAD_DIMS)
        ],
    )


def _shows_formats(shape: Shape) -> bool:
    return (shape.batch, shape.length) == (1, 16_384) and shape.causal and shape.heads != shape.kv_heads


def plan_suite(suite: str, configs: Sequence[str] | None, *, quick: bool = False) -> Plan:
    """Plans one of the other suites in `FIELDS`.

    Args:
        configs: settings of DMA; the suite's own when None.
        quick: the least that tells something.

    Raises:
        UsageError: a string of ``configs`` is no setting, or one without anything to quantise.
    """
    if suite == "tiles":
        settings = {
            name: config
            for text in _quantizing(configs or TILES_CONFIGS)
            for name, config in tile_settings(text, quick=quick).items()
        }
        run = partial(compare_tiles, TILES_SHAPE, settings)
        described = {name: config.to_dict() for name, config in settings.items()}
        return Plan(suite, [Part(TILES_SHAPE.describe(), described, len(settings) + 1, run)])
    if suite == "masks":
        batches, texts = mask_batches(), list(configs or MASK_CONFIGS)
        if quick:
            batches, texts = batches[:1], texts[:1]
        described = _described(texts)
        return Plan(
            suite,
            [
                Part(
                    batch.describe(),
                    described,
                    provider_count(batch, texts),
                    partial(compare_masks, batch, texts),
                )
                for batch in batches
            ],
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
        [
            Part(
                shape.describe(),
                _described(texts),
                len(texts) * len(quantizers),
                partial(compare_quantizers, shape, texts, quantizers),
            )
            for shape in key_shapes
        ],
    )


def _described(texts: Sequence[str]) -> dict[str, Any]:
    return {text: parse_config(text).to_dict() for text in texts}


def _quantizing(configs: Sequence[str]) -> list[str]:
    for text in configs:
        if not parse_config(text).quantizes:
            raise UsageError(f"--config '{text}': quantises nothing, and this suite is about quantising")
    return list(configs)


def launches_ahead(plans: Sequence[Plan], journal: Journal) -> list[Launch]:
    """What the parts that are still to be measured compile, each once."""
    todo = [
        part
        for plan in plans
        for part in plan.parts
        if part.launches and not journal.get(**part.key(plan.suite))
    ]
    return list(dict.fromkeys(launch for part in todo for launch in part.launches))


def measure_part(
    plan: Plan, part: Part, meter: Meter, advance: Advance, journal: Journal = NO_JOURNAL
) -> list[Run]:
    """A part's entries of "runs": the journal's, or measured and written down.

    What failed by itself is a result, and is kept: it is not installed, or does not fit. A part whose
    baseline failed, or that left the device in a fault, is measured again.
    """
    key = part.key(plan.suite)
    runs: list[Run] | None = journal.get(**key)
    if runs is None:
        runs = part.run(meter, advance)
        if "error" not in runs[0] and meter.works():
            journal.put(runs, **key)
    return runs


def package_fingerprint() -> str:
    """What tells the code of dma_hf from a changed one, also between commits: for the key of a journal."""
    folder = Path(dma_hf.__file__).parent
    return text_fingerprint("".join(path.read_text("utf-8") for path in sorted(folder.rglob("*.py"))))


def show_runs(suite: str, runs: Sequence[Run]) -> None:
    """Prints the suite's tables, one for each shape."""
    for shape, group in groupby(runs, key=lambda run: run["shape"]):
        of_shape = list(group)
        show(_title(shape), kernel_table(of_shape, FIELDS[suite]))
        if suite == "tune":
            print(f"{verdict(of_shape)}\n")


def _title(shape: dict[str, Any]) -> str:
    if "mask" in shape:
        sizes = {name: value for name, value in shape.items() if name not in ("mask", "mask_tokens")}
        tokens = "" if shape["mask_tokens"] is None else f" of {shape['mask_tokens']:,}"
        return f"{shape['mask']}{tokens}: {Shape(**sizes)}"
    if "operands" in shape:
        sizes = {name: value for name, value in shape.items() if name != "operands"}
        return f"operands {shape['operands']}: {Shape(**sizes)}"
    return str(Shape(**shape) if "heads" in shape else KeyShape(**shape))
