"""Tables of results in Markdown pages, written from the results' JSON files.

A page marks where a table belongs, and everything between the two marks is replaced:

    <!-- results: eval/results/builtin_cpu/perplexity.json -->
    <!-- end of results -->

and where it wants quality against speed, of two files, as a picture and a table (``pareto``):

    <!-- pareto: eval/results/presets_cpu/perplexity.json eval/results/h200/kernels.json -->
    <!-- end of results -->

``python -m eval.readme_tables README.md eval/builtin_model/README.md`` rewrites the tables of these pages
and draws their pictures, so no number in them is typed by hand. Paths in marks start at the current folder.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .pareto import PICTURE, draw_pareto, missing_presets, pareto_points
from .tables import (
    MODEL_SPEED_COLUMNS,
    PERPLEXITY_COLUMNS,
    Run,
    model_speed_rows,
    perplexity_rows,
    recall_columns,
    recall_rows,
    speed_columns,
    speed_rows,
)

MARKED = re.compile(
    r"(?P<start><!-- results: (?P<path>\S+) -->\n).*?(?P<end><!-- end of results -->)", re.DOTALL
)

PARETO = re.compile(
    r"(?P<start><!-- pareto: (?P<quality>\S+) (?P<speed>\S+) -->\n).*?(?P<end><!-- end of results -->)",
    re.DOTALL,
)


def fill(page: str, folder: Path, page_folder: Path | None = None) -> str:
    """``page`` with everything marked rendered anew from the JSON files it names, below ``folder``.

    Args:
        page_folder: where the page is, for its links to pictures; None for ``folder``.
    """

    def table(match: re.Match[str]) -> str:
        return f"{match['start']}{render(_read(folder / match['path']))}{match['end']}"

    def pareto(match: re.Match[str]) -> str:
        picture = os.path.relpath(_picture(folder, match), page_folder or folder)
        quality, speed = (_read(folder / match[name]) for name in ("quality", "speed"))
        return f"{match['start']}{_pareto(quality, speed, Path(picture).as_posix())}{match['end']}"

    return PARETO.sub(pareto, MARKED.sub(table, page))


def draw(page: str, folder: Path) -> None:
    """Draws the pictures that ``page`` asks for, where all that they should show is measured."""
    for match in PARETO.finditer(page):
        quality, speed = (_read(folder / match[name]) for name in ("quality", "speed"))
        if not missing_presets(quality, speed):
            title = f"causal, 1 × 16,384 tokens, head dimension 128, {speed['environment']['hardware']}"
            draw_pareto(pareto_points(quality, speed), title, _picture(folder, match))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _picture(folder: Path, match: re.Match[str]) -> Path:
    return (folder / match["speed"]).with_name(PICTURE)


def _pareto(quality: dict[str, Any], speed: dict[str, Any], picture: str) -> str:
    """The picture and its numbers as Markdown; what is missing, where the presets are not all timed."""
    commands = [content["environment"]["command"] for content in (quality, speed)]
    if missing := missing_presets(quality, speed):
        return f"Not measured yet: the speed of {', '.join(missing)} in the results of `{commands[1]}`.\n"
    rows = [
        [point.name, f"{point.kl:.5f}", f"{point.recall_change + 0.0:+.2f} %", f"{point.speed:.2f}"]
        for point in pareto_points(quality, speed)
    ]
    table = _markdown(["setting", "KL from SDPA, nats", "recall perplexity", "× SDPA"], rows)
    return (
        f"![KL from SDPA against speed, one point for each setting]({picture})\n\n{table}\n\n"
        f"Better is to the right and below; SDPA is at 1, without divergence. Quality: `{commands[0]}`, on"
        f" {quality['environment']['hardware']}. Speed: `{commands[1]}`, causal attention over 1 × 16,384"
        f" tokens at head dimension 128, quantisation included. {_origin(speed)}\n"
    )


def render(content: dict[str, Any]) -> str:
    """The content of a results file as Markdown: its table and its origin.

    Knows ``perplexity.json``, ``recall.json``, ``speed.json``, ``models.json``, the attention suite's
    ``kernels.json`` and ``kernels_masks.json``.
    """
    runs = content["runs"]
    if "mask_bytes" in runs[0]:
        columns, rows, what = _masks(runs)
    elif "outcome" in runs[0]:
        columns, rows, what = _models(content)
    elif "op" in runs[0]:
        columns, rows, what = _kernels(content)
    elif "prefill_seconds" in runs[0]:
        columns, rows, what = _speed(content)
    elif "perplexity" in runs[0]:
        columns, rows, what = _perplexity(content)
    else:
        columns, rows = recall_columns(runs), recall_rows(runs)
        what = f"{content['samples']} samples per distance, passages of {content['passage']} tokens"
        what = f"{what}; {content['data']}"
    table, command = _markdown(columns, rows), content["environment"]["command"]
    return f"{table}\n\n`{command}`: {what}. {_origin(content)}\n"


Table = tuple[Sequence[str], list[list[str]], str]
"""Columns, rows, and what was measured."""


def _kernels(content: dict[str, Any]) -> Table:
    runs = content["runs"]
    shape = runs[0]["shape"]
    what = (
        f"time of SDPA's default over the provider's, quantisation included; batch × length, causal where"
        f" nothing else is said, {shape['heads']} / {shape['kv_heads']} heads"
    )
    if "shapes_left" in content:
        what += f"; **unfinished**, {content['shapes_left']} shapes are missing"
    return speed_columns(runs), speed_rows(runs), what


def _masks(runs: Sequence[Run]) -> Table:
    timed = [run for run in runs if run["ms"] is not None]
    rows = [
        [
            _batch(run["shape"]),
            run["provider"],
            f"{run['ms']:.3g}",
            f"{run['ratio_to_sdpa_default']:.2f}",
            f"{run['mask_bytes'] / 2**20:,.1f}",
            f"{run['extra_bytes'] / 2**20:,.0f}",
        ]
        for run in timed
    ]
    what = "32 / 8 heads, head dimension 128, causal; × is SDPA's time with its mask over the attention's"
    return ["batch", "attention", "ms", "× SDPA", "mask MiB", "extra MiB"], rows, what


def _batch(shape: dict[str, Any]) -> str:
    mask = shape["mask"] if shape["mask_tokens"] is None else f"{shape['mask']} of {shape['mask_tokens']:,}"
    return f"{mask}: {shape['batch']} × {shape['length']:,}"


def _models(content: dict[str, Any]) -> Table:
    meaning = {
        "kernel": "main attention runs as dma, outputs equal SDPA's",
        "sdpa": "handed to SDPA (or eager, where Transformers has no SDPA), with a warning",
        "no attention": "no softmax attention to replace",
        "refused": "an error names what is missing",
        "wrong": "outputs differ from SDPA's",
        "not built": "no tiny model could be made here (a package is missing, or generation failed)",
    }
    rows = [[name, meaning[name], str(count)] for name, count in content["counts"].items()]
    what = f"{len(content['runs'])} model types, tiny random models"
    if in_lockstep := sum(run["lockstep_error"] is not None for run in content["runs"]):
        what += f"; {in_lockstep} judged by their attention calls, in lockstep with SDPA"
    return ["outcome", "meaning", "model types"], rows, what


def _speed(content: dict[str, Any]) -> Table:
    columns = [column.replace("\n", " ") for column in MODEL_SPEED_COLUMNS]
    cut = "" if content["layers"] == content["full_layers"] else f" cut to {content['layers']} layers"
    what = (
        f"{content['model']}{cut}, {content['weights']} weights; × is against SDPA; medians of"
        f" {content['repeats']} passes, {content['new_tokens']} decoded tokens"
    )
    return columns, model_speed_rows(content["runs"]), what


def _perplexity(content: dict[str, Any]) -> Table:
    columns, rows = list(PERPLEXITY_COLUMNS), perplexity_rows(content["runs"])
    corpora = content["corpora"]
    if len(corpora) > 1:
        columns.insert(1, "text")
        for row, run in zip(rows, content["runs"], strict=True):
            row.insert(1, run["data"])
    task = content["recall"]
    texts = "; ".join(f"{corpus['name']}, {corpus['tokens']:,} tokens" for corpus in corpora)
    what = (
        f"{texts}; context {content['context']:,}, stride {content['stride']:,}; ± of the"
        f" {100 * content['bootstrap']['confidence']:.0f} % interval; recall: {task['samples']} passages of"
        f" {task['passage']} tokens, repeated {task['distance']:,} tokens later"
    )
    return columns, rows, what


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([_line(columns), _line(["---", *["---:"] * (len(columns) - 1)]), *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _origin(content: dict[str, Any]) -> str:
    where = content["environment"]
    return (
        f"{where['hardware']}, {where['dtype']}, PyTorch {where['torch']},"
        f" Triton {where['triton']}, Transformers {where['transformers']}, {where['date'][:10]}."
    )


def main(paths: Sequence[str]) -> None:
    """Rewrites the marked tables of the pages at ``paths``, and draws their pictures."""
    for path in map(Path, paths):
        page = path.read_text(encoding="utf-8")
        draw(page, Path.cwd())
        path.write_text(fill(page, Path.cwd(), path.parent.resolve()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
