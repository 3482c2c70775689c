"""The kernel benchmark's pictures: throughput against sequence length, one picture per head dimension."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .kernel_benchmark import Run
from .pictures import picture_bytes
from .results import write_file

Point = tuple[int, float]
"""A length in tokens and its TFLOP/s."""


def throughput_series(runs: Sequence[Run]) -> dict[int, dict[str, list[Point]]]:
    """For each head dimension, each provider's causal attention by length.

    Where several shapes have the same length, the first one counts: that of the series over lengths.
    """
    points: dict[int, dict[str, dict[int, float]]] = {}
    for run in runs:
        shape = run["shape"]
        if run["op"] == "attention" and run["tflops"] is not None and shape["causal"]:
            provider = points.setdefault(shape["head_dim"], {}).setdefault(run["provider"], {})
            provider.setdefault(shape["length"], run["tflops"])
    return {
        head_dim: {name: sorted(series.items()) for name, series in providers.items()}
        for head_dim, providers in points.items()
    }


def draw_throughput(runs: Sequence[Run], title: str, folder: Path) -> list[Path]:
    """Writes ``kernels_head_dim_D.svg`` into ``folder`` for each head dimension D; returns the paths.

    Raises:
        EvalError: if a file cannot be written.
    """
    paths = []
    for head_dim, providers in throughput_series(runs).items():
        figure = Figure(figsize=(7.5, 4.2))
        axes = figure.add_subplot()
        for index, (name, series) in enumerate(providers.items()):
            x, y = zip(*series, strict=True)
            # DMA stands out from what it is compared with
            style = "o-" if name.startswith("DMA") else "s--"
            axes.plot(x, y, style, label=name, markersize=4, color=f"C{index}")
        lengths = sorted({length for series in providers.values() for length, _ in series})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.set(xlabel="sequence length (tokens)", ylabel="TFLOP/s")
        axes.set_title(f"{title}\ncausal, head dimension {head_dim}, quantisation included", fontsize=10)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
        path = folder / f"kernels_head_dim_{head_dim}.svg"
        write_file(path, picture_bytes(figure, bbox_inches="tight"))
        paths.append(path)
    return paths
