"""What a reader must know before relying on the numbers, found in the results themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..loading import BUILTIN_MODEL
from .numbers import commit, percent, small, tokens
from .results import KINDS, Results, ResultsFile
from .settings import baseline_of
from .verdict import FINDS_ABOVE, MEASURES, RECALLS_BELOW, Verdict, right_or_wrong

FEW_TOKENS = 100_000
"""Scored in a text: below, perplexity's interval is wide and rare words are not seen."""
FEW_SAMPLES = 20
"""Per distance, of recall: below, one passkey is more than five points."""
SHARED = {
    "hardware": "hardware",
    "commit": "commits of dma_hf",
    "dtype": "dtypes",
    "torch": "versions of PyTorch",
    "triton": "versions of Triton",
    "transformers": "versions of Transformers",
}
"""Fields of the environment that should not differ within one report."""
CONTROL_KL = 1e-4
"""Nats: a control, with nothing quantised, that is further from SDPA questions the comparison itself."""
FEW_REPEATS = 3


def caveats(results: Results, verdicts: Sequence[Verdict]) -> list[str]:
    """Every caveat, the gravest first: what is missing, what does not fit together, what is weak."""
    return [
        *_coverage(results),
        *_controls(verdicts),
        *_origins(results),
        *_hardware_formats(results, verdicts),
        *_models(results),
        *_quality(results),
        *_speed(results),
        *_failures(results),
    ]


def _coverage(results: Results) -> Iterator[str]:
    for name, reason in results.unreadable.items():
        yield f"{name} is left out: it {reason}."
    for file in results.of("kernels"):
        if "shapes_left" in file.content:
            yield f"{file.name} is unfinished: {file.content['shapes_left']} shapes are missing."
    if results.missing:
        commands = "; ".join(f"{KINDS[kind]} (dma-eval {kind})" for kind in results.missing)
        yield f"Not measured: {commands}."
    if results.unknown:
        yield f"Ignored, as no command of dma-eval writes it: {', '.join(results.unknown)}."


def _controls(verdicts: Sequence[Verdict]) -> Iterator[str]:
    for verdict in verdicts:
        finding = verdict.findings.get("kl")
        if verdict.setting.is_control and finding is not None and finding.value > CONTROL_KL:
            yield (
                f"With nothing quantised ({verdict.setting.name}) the model is {small(finding.value)} nats"
                " from SDPA: differences of that size say nothing about quantisation."
            )


def _origins(results: Results) -> Iterator[str]:
    for name, words in SHARED.items():
        values: dict[str, list[str]] = {}
        for file in results.files:
            if file.kind != "models":  # what is supported does not depend on hardware
                values.setdefault(str(file.environment[name]), []).append(file.name)
        if len(values) > 1:
            parts = (
                f"{commit(value) if name == 'commit' else value} ({', '.join(files)})"
                for value, files in values.items()
            )
            yield f"Different {words}: {'; '.join(parts)}."
    dirty = [file.name for file in results.files if file.environment["dirty"]]
    if dirty:
        yield f"Measured with uncommitted changes to dma_hf, so no commit reproduces it: {', '.join(dirty)}."
    nowhere = [file.name for file in results.files if file.environment["commit"] is None]
    if nowhere:
        yield f"Measured with an installed package, whose commit is not known: {', '.join(nowhere)}."


def _hardware_formats(results: Results, verdicts: Sequence[Verdict]) -> Iterator[str]:
    names = [verdict.setting.name for verdict in verdicts if verdict.setting.depends_on_hardware]
    if names and len({file.environment["hardware"] for file in results.files if file.kind != "models"}) > 1:
        yield (
            f"The hardware decides what {', '.join(names)} means, and the results are of different hardware:"
            " quality and speed may be those of different formats (on a CPU the choice is Hopper's)."
        )


def _models(results: Results) -> Iterator[str]:
    models: dict[str, list[str]] = {}
    for file in results.files:
        if "model" in file.content:
            models.setdefault(str(file.content["model"]), []).append(file.name)
    if len(models) > 1:
        parts = (f"{model} ({', '.join(files)})" for model, files in models.items())
        yield f"Different models: {'; '.join(parts)}. Quality is that of one, speed that of another."
    if BUILTIN_MODEL in models:
        yield (
            "The built-in model is small (6.6 M parameters) and made to recall: it shows what a setting"
            " does to attention, and is no substitute for measuring your own model (--model)."
        )


def _quality(results: Results) -> Iterator[str]:
    for file in results.of("perplexity"):
        few = [text for text in file.content["corpora"] if text["tokens"] < FEW_TOKENS]
        for text in few:
            yield f"{file.name}: only {text['tokens']:,} tokens of {text['name']} were scored (--max-tokens)."
        baselines = [run for run in file.runs if run["config"] is None]
        if baselines and min(run["recall_perplexity"] for run in baselines) >= RECALLS_BELOW:
            yield (
                f"{file.name}: with SDPA the model does not copy a passage it has read (perplexity"
                f" {min(run['recall_perplexity'] for run in baselines):.2f}), so this recall cannot show"
                " what DMA would lose."
            )
    for file in results.of("recall"):
        yield from _recall(file)
    for file in results.of("tasks"):
        yield from _tasks(file)


def _tasks(file: ResultsFile) -> Iterator[str]:
    possible: dict[str, float] = {}
    for run, result in right_or_wrong(file):
        if result["delta_interval"] is not None and result["delta_interval"][1] >= 0:
            lost = -100 * result["delta_interval"][0]
            possible[run["name"]] = max(possible.get(run["name"], 0.0), lost)
    unclear = [
        f"{name} {lost:.1f} points" for name, lost in possible.items() if lost > MEASURES["tasks"].care
    ]
    if unclear:
        yield (
            f"{file.name}: so few samples cannot rule out a loss in some task (lower end of its 95 %"
            f" interval) of: {', '.join(unclear)} (--limit)."
        )
    cut = max(run["truncated_requests"] for run in file.runs)
    if cut:
        yield f"{file.name}: {cut} requests were longer than the context and lost their beginning."


def _recall(file: ResultsFile) -> Iterator[str]:
    samples = file.content["samples"]
    if samples < FEW_SAMPLES:
        yield (
            f"{file.name}: few samples per distance, {samples}; one passkey is {percent(1 / samples)} there"
            " (--samples)."
        )
    baseline = baseline_of(file.runs)
    if baseline is None:
        return
    lost = [d for d, accuracy in baseline["passkey_accuracy"].items() if accuracy < FINDS_ABOVE]
    if lost:
        yield (
            f"{file.name}: with SDPA the model finds less than half of the passkeys at a distance of"
            f" {', '.join(lost)} tokens; there DMA has nothing to lose, and nothing counts."
        )
    longest, context = max(file.content["distances"]), file.content["context"]
    if 2 * longest < context:
        yield f"{file.name}: recall was tested to {longest:,} tokens, of a context of {tokens(context)}."


def _speed(results: Results) -> Iterator[str]:
    on_cpu = [file.name for file in results.of("speed") + results.of("kernels") if file.on_cpu]
    if on_cpu:
        yield (
            f"Timed on a CPU, where DMA is a PyTorch reference: {', '.join(on_cpu)}. That says nothing about"
            " speed on a GPU, and the verdict does not use it."
        )
    for file in results.of("speed"):
        content = file.content
        if content["weights"] == "random":
            yield (
                f"{file.name}: {content['model']} in random weights. Speed and memory depend on the shape"
                " only (for a mixture of experts also on the routing, which is even here)."
            )
        if content["layers"] < content["full_layers"]:
            yield (
                f"{file.name}: {content['layers']} of {content['full_layers']} layers ran. The embedding and"
                " the output layer weigh more than in the whole model."
            )
        if content["repeats"] < FEW_REPEATS:
            yield f"{file.name}: {content['repeats']} timed passes are few to know their spread (--repeats)."
        for run in file.runs:
            for note in run["notes"]:
                yield f"{file.name}, {run['name']} at {tokens(run['context'])}: {note}."
        unclear = _within_spread(file.runs)
        if unclear:
            yield (
                f"{file.name}: the passes of SDPA and DMA overlap, so these ratios of the prefill are within"
                f" the spread: {', '.join(unclear)}."
            )


def _within_spread(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The settings and points where the slowest pass of the faster one is slower than the other's fastest."""
    found = []
    for run in runs:
        baseline = next(
            one
            for one in runs
            if one["config"] is None and (one["context"], one["batch"]) == (run["context"], run["batch"])
        )
        mine, theirs = run["prefill_seconds_all"], baseline["prefill_seconds_all"]
        if run["config"] is None or not mine or not theirs:
            continue
        if max(min(mine), min(theirs)) <= min(max(mine), max(theirs)):
            found.append(f"{run['name']} at {run['batch']} × {tokens(run['context'])}")
    return found


def _failures(results: Results) -> Iterator[str]:
    for file in results.files:
        for run in file.content.get("failed", []):
            yield f"{file.name}: '{run['name']}' failed and is missing: {run['error']}."
        for reason, names in _errors(file).items():
            yield f"{file.name}: {', '.join(names)}: {reason}."


def _errors(file: ResultsFile) -> dict[str, list[str]]:
    """The entries without measurements, by reason; each name once for all shapes of attention alone."""
    found: dict[str, list[str]] = {}
    for run in file.content.get("runs", []):
        if "error" not in run:
            continue
        name = run.get("name", run.get("provider"))
        if "context" in run:
            name = f"{name} at {run['batch']} × {tokens(run['context'])}"
        names = found.setdefault(run["error"], [])
        if name not in names:
            names.append(name)
    return found
