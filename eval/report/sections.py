"""The body of the report: for each kind of results its tables and pictures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..tables import (
    CALIBRATION_COLUMNS,
    LAYER_COLUMNS,
    MODEL_COLUMNS,
    MODEL_SPEED_COLUMNS,
    PERPLEXITY_COLUMNS,
    TASK_COLUMNS,
    budget_rows,
    calibration_rows,
    layer_rows,
    model_rows,
    model_speed_rows,
    perplexity_rows,
    recall_columns,
    recall_rows,
    speed_columns,
    speed_rows,
    task_rows,
)
from . import plots
from .numbers import small, tokens
from .results import Results, ResultsFile
from .settings import settings_of
from .verdict import Verdict, right_or_wrong

NUMBER = re.compile(r"[-+−–±\d](?!.*[A-Za-z]{2})|$")
"""A cell that holds a number, perhaps with a unit, or nothing; one with words is text."""
WORST_HEADS = 5
"""Named for each setting in the table of layers."""


@dataclass(frozen=True)
class Table:
    """A table: its first column names, the others measure."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def is_text(self, column: int) -> bool:
        """Whether a column holds words: they stand on the left, numbers on the right."""
        return column == 0 or not all(NUMBER.match(row[column]) for row in self.rows)


@dataclass(frozen=True)
class Picture:
    """A picture of the HTML page. ``caption`` says what to see in it, also to who cannot see it."""

    caption: str
    svg: str


@dataclass
class Section:
    """One section of the report."""

    identifier: str
    title: str
    text: str
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def sections(results: Results, verdicts: Sequence[Verdict]) -> list[Section]:
    """The sections for which there are results, in the report's order."""
    settings = [setting.name for setting in settings_of(results)]
    body = [*_pareto(verdicts, settings)]
    for file in results.files:
        section = BUILDERS[file.kind](file, settings)
        if len(results.of(file.kind)) > 1:
            section.title = f"{section.title}: {file.name}"
        body.append(section)
    return body


def _identifier(file: ResultsFile) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in file.name.removesuffix(".json"))


def _one_line(columns: Sequence[str]) -> list[str]:
    return [column.replace("\n", " ") for column in columns]  # a terminal's narrow columns have two lines


def _pareto(verdicts: Sequence[Verdict], settings: Sequence[str]) -> Iterator[Section]:
    """Quality against speed at the length that the most settings share, and of those the longest."""
    quantised = [v for v in verdicts if "kl" in v.findings and not v.setting.is_control]
    shared = Counter((speed.what, speed.length) for verdict in quantised for speed in verdict.speeds)
    if not shared:
        return
    what, length = max(shared, key=lambda key: (shared[key], key[0] == "prefill", key[1]))
    points = {
        verdict.setting.name: (speed.ratio, verdict.findings["kl"].value)
        for verdict in quantised
        for speed in verdict.speeds
        if (speed.what, speed.length) == (what, length)
    }
    where = f"{what} at {tokens(length)}"
    picture = plots.pareto_plot(points, settings, f"speed of {where}, × SDPA", "pareto")
    caption = f"KL from SDPA against speed of {where}. Dotted: the limits of KL. Dashed: SDPA's speed."
    text = "Better is to the right and below."
    if unmatched := [v.setting.name for v in quantised if v.setting.name not in points]:
        text = f"{text} Not timed at this length: {', '.join(unmatched)}."
    yield Section("pareto", "Quality against speed", text, pictures=[Picture(caption, picture)])


def _perplexity(file: ResultsFile, settings: Sequence[str]) -> Section:
    content, identifier = file.content, _identifier(file)
    recall, bootstrap = content["recall"], content["bootstrap"]
    confidence = f"{100 * bootstrap['confidence']:.0f} %"
    section = Section(
        identifier,
        "Perplexity and divergence",
        f"{content['model']}, windows of {tokens(content['context'])} tokens that advance by"
        f" {tokens(content['stride'])}. ± is half the {confidence} interval of the change (bootstrap over"
        f" blocks of {bootstrap['block']} tokens). KL is that of the next-token distributions, mean over"
        f" tokens, in nats. Recall is the perplexity of {recall['samples']} passages of {recall['passage']}"
        f" tokens when they come again, {recall['distance']:,} tokens later.",
    )
    changes = []
    for corpus in content["corpora"]:
        runs = [run for run in file.runs if run["data"] == corpus["name"]]
        caption = f"{corpus['name']}, {corpus['tokens']:,} tokens"
        section.tables.append(Table(caption, _one_line(PERPLEXITY_COLUMNS), perplexity_rows(runs)))
        several = f"\n{corpus['name']}" if len(content["corpora"]) > 1 else ""
        changes += [
            (f"{run['name']}{several}", run["delta_percent"], run["delta_percent_interval"])
            for run in runs
            if run["config"] is not None
        ]
    if changes:
        picture = plots.interval_plot(
            changes, settings, "change of perplexity against SDPA (%)", f"{identifier}-change"
        )
        section.pictures.append(
            Picture(f"Change of perplexity with its {confidence} interval; zero is SDPA.", picture)
        )
        series = {
            run["name"]: [(part["last"], part["kl"]) for part in run["by_position"]]
            for run in file.runs
            if run["config"] is not None and run["data"] == content["corpora"][0]["name"]
        }
        ylabel = "KL from SDPA (nats)"
        picture = plots.line_panels(
            [(ylabel, series)],
            settings,
            "position in the context (tokens)",
            f"{identifier}-position",
            lengths=True,
        )
        caption = f"KL from SDPA by position in the context, {content['corpora'][0]['name']}."
        section.pictures.append(
            Picture(f"{caption} A line that rises is an error that grows with distance.", picture)
        )
    return section


def _recall(file: ResultsFile, settings: Sequence[str]) -> Section:
    content, identifier = file.content, _identifier(file)
    section = Section(
        identifier,
        "Recall by distance",
        f"{content['model']}: five-digit numbers repeated exactly (passkeys), and perplexity of the second"
        f" copy of a passage of {content['passage']} tokens, by distance in tokens; {content['samples']}"
        " samples each. Far from the diagonal DMA is least precise: this is the test that matters.",
        [
            Table(
                "Passkeys found, and perplexity of the second copy",
                recall_columns(file.runs),
                recall_rows(file.runs),
            )
        ],
    )
    copies: dict[str, list[tuple[float, float]]] = {}
    keys: dict[str, list[tuple[float, float]]] = {}
    for run in file.runs:
        copies[run["name"]] = [(int(d), value) for d, value in run["second_copy_perplexity"].items()]
        keys[run["name"]] = [(int(d), 100 * value) for d, value in run["passkey_accuracy"].items()]
    panels = [("perplexity of the second copy", copies), ("passkeys found (%)", keys)]
    picture = plots.line_panels(panels, settings, "distance (tokens)", f"{identifier}-distance")
    section.pictures.append(
        Picture("Perplexity of the second copy, and passkeys found, by distance.", picture)
    )
    return section


def _tasks(file: ResultsFile, settings: Sequence[str]) -> Section:
    content, identifier = file.content, _identifier(file)
    limit = "all samples" if content["limit"] is None else f"at most {content['limit']:,} samples"
    section = Section(
        identifier,
        "Tasks",
        f"{content['model']} on lm-eval {content['lm_eval']}, {limit} of each task, requests of at most"
        f" {tokens(content['context'])} tokens. Every setting answers the same requests, so the change is"
        " tested sample by sample: p is two-sided and not corrected for the number of tasks; lost and"
        " gained count the answers that changed between right and wrong.",
        [Table("Every task and metric", TASK_COLUMNS, task_rows(file.runs))],
    )
    changes = [
        (f"{run['name']}\n{result['task']}", 100 * result["delta"], [100 * end for end in interval])
        for run, result in right_or_wrong(file)
        if (interval := result["delta_interval"]) is not None
    ]
    if changes:
        picture = plots.interval_plot(
            changes, settings, "change of accuracy against SDPA (points)", f"{identifier}-change"
        )
        section.pictures.append(
            Picture("Change of accuracy by setting and task, with 95 % intervals.", picture)
        )
    return section


def _calibrate(file: ResultsFile, settings: Sequence[str]) -> Section:
    content = file.content
    budget, held_out, costs = content["budget"], content["held_out"], content["costs"]
    unit = "nats of KL a token" if budget["measure"] == "kl" else "% of perplexity"
    rates = "measured" if costs["measured"] else "stated, not measured"
    return Section(
        _identifier(file),
        "Calibration",
        f"The fastest setting of every layer within {budget['limit']:g} {unit}, chosen on"
        f" {content['windows']} windows of {tokens(content['context'])} tokens of {content['data']}. On"
        f" held-out text: KL {small(held_out['kl'])}, perplexity {held_out['perplexity_change']:+.3f} %."
        f" Predicted speed of attention at {tokens(content['prompt_length'])}:"
        f" {content['speed_against_sdpa']:.2f} × SDPA (times of tiles: {costs['source']}, {rates}); a"
        " prediction is no measurement, and the verdict does not use it.",
        [
            Table("The setting of each layer", CALIBRATION_COLUMNS, calibration_rows(content)),
            Table(
                "Budgets, and the speed that they allow by prediction",
                ["KL budget (estimated)", "× SDPA", "× unquantised"],
                budget_rows(content),
            ),
        ],
    )


def _layers(file: ResultsFile, settings: Sequence[str]) -> Section:
    content, identifier = file.content, _identifier(file)
    section = Section(
        identifier,
        "Error by layer and head",
        f"{content['model']} on {content['data']}, {content['windows']} windows of"
        f" {tokens(content['context'])} tokens: the attention output of every head against exact attention,"
        " on the activations of the undisturbed model.",
        [
            Table(
                f"The mean, and the {WORST_HEADS} worst heads of each setting",
                _one_line(LAYER_COLUMNS),
                layer_rows(content, WORST_HEADS),
            )
        ],
    )
    if any(run["config"] is not None for run in file.runs):
        section.pictures.append(
            Picture(
                "Relative error by layer and head, and the share of attention in tiles of high precision.",
                plots.layer_heatmaps(file, f"{identifier}-map"),
            )
        )
    return section


def _speed(file: ResultsFile, settings: Sequence[str]) -> Section:
    content, identifier = file.content, _identifier(file)
    cut = "" if content["layers"] == content["full_layers"] else f" cut to {content['layers']} layers"
    section = Section(
        identifier,
        "Speed and memory of the whole model",
        f"{content['model']}{cut}, {content['weights']} weights, {content['parameters'] / 1e9:.2f} G"
        f" parameters, on {file.environment['hardware']}. × is SDPA's time over the other's: above 1 is"
        f" faster. Medians of {content['repeats']} passes that take turns; {content['new_tokens']} decoded"
        " tokens. DMA is for prefill: decode steps go to SDPA.",
        [
            Table(
                "First token, decode, memory, and attention's share of the prefill",
                _one_line(MODEL_SPEED_COLUMNS),
                model_speed_rows(file.runs),
            )
        ],
    )
    for batch in dict.fromkeys(run["batch"] for run in file.runs):
        runs = [run for run in file.runs if run["batch"] == batch]
        panels: list[tuple[str, plots.Series]] = []
        for ylabel, values in (
            ("prefill, × SDPA", _by_context(runs, "prefill_speedup", 1, baseline=False)),
            ("peak memory (GiB)", _by_context(runs, "peak_bytes", 2**-30)),
            ("attention's share\nof the prefill (%)", _by_context(runs, "attention_share", 100)),
        ):
            if values:
                panels.append((ylabel, values))
        if panels:
            picture = plots.line_panels(
                panels, settings, "prompt (tokens)", f"{identifier}-{batch}", lengths=True, reference=1.0
            )
            caption = f"By length of the prompt, batch {batch}. The dashed line is SDPA."
            section.pictures.append(Picture(caption, picture))
    return section


def _by_context(
    runs: Sequence[dict[str, Any]], measure: str, factor: float, *, baseline: bool = True
) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        if run[measure] is not None and (baseline or run["config"] is not None):
            series.setdefault(run["name"], []).append((run["context"], factor * run[measure]))
    return series


def _kernels(file: ResultsFile, settings: Sequence[str]) -> Section:
    content, identifier = file.content, _identifier(file)
    suite = content["suite"]
    section = Section(
        identifier,
        "Speed of attention alone" if suite == "attention" else f"Attention alone: {suite}",
        f"On {file.environment['hardware']}, random inputs, quantisation included. × is the time of SDPA's"
        " default over the other's: above 1 is faster.",
    )
    if suite != "attention":
        section.text = (
            f"Suite '{suite}' of dma-eval kernels, on {file.environment['hardware']}: see {file.name}."
        )
        return section
    section.tables.append(
        Table(
            "× SDPA; batch × length, causal where nothing else is said",
            speed_columns(file.runs),
            speed_rows(file.runs),
        )
    )
    by_head_dim: dict[int, dict[str, dict[int, float]]] = {}
    for run in file.runs:
        shape, ratio = run["shape"], run["ratio_to_sdpa_default"]
        if run["op"] == "attention" and shape["causal"] and ratio is not None and run["config"] is not None:
            name = run["provider"].removeprefix("DMA ")
            # of several shapes of one length the first counts: that of the series over lengths
            by_head_dim.setdefault(shape["head_dim"], {}).setdefault(name, {}).setdefault(
                shape["length"], ratio
            )
    panels = [
        (
            f"× SDPA, head dimension {head_dim}",
            {name: list(points.items()) for name, points in series.items()},
        )
        for head_dim, series in by_head_dim.items()
    ]
    if panels:
        picture = plots.line_panels(
            panels, settings, "length (tokens)", f"{identifier}-ratio", lengths=True, reference=1.0
        )
        section.pictures.append(
            Picture("Speed of causal attention against SDPA's default, by length.", picture)
        )
    return section


def _models(file: ResultsFile, settings: Sequence[str]) -> Section:
    content = file.content
    section = Section(
        _identifier(file),
        "Supported model types",
        f"Every model type of Transformers {file.environment['transformers']}, in the smallest random"
        " weights that run, with nothing quantised, against SDPA.",
        [
            Table(
                "Model types",
                ["attention", "types"],
                [[name, str(n)] for name, n in content["counts"].items()],
            )
        ],
    )
    faulty = [run for run in file.runs if run["outcome"] in ("refused", "wrong")]
    if faulty:
        section.tables.append(Table("Refused or wrong", MODEL_COLUMNS, model_rows(faulty)))
    return section


Builder = Callable[[ResultsFile, Sequence[str]], Section]
BUILDERS: dict[str, Builder] = {
    "perplexity": _perplexity,
    "recall": _recall,
    "tasks": _tasks,
    "calibrate": _calibrate,
    "layers": _layers,
    "speed": _speed,
    "kernels": _kernels,
    "models": _models,
}
"""Builds the section of a file; takes the file and the names of all settings."""
