"""The verdict on a setting: is it safe, by stated limits, and what does it buy.

Every measure of quality puts a setting in one of three classes, by the limits in ``MEASURES``; the worst
measure decides. Long-range recall is where low precision does its damage, and perplexity on running text
hides it: without both there is no verdict better than "not shown". The limits are this project's
judgement:

* KL of 1e-3 nats: by Pinsker's inequality no event of the next token's distribution changes its
  probability by more than 2.2 points, in the mean over tokens; at 1e-2 by 7.1 points.
* Perplexity and recall: the upper end of the interval counts, where there is one, so that few samples
  do not pass for a good result.
* Passkeys and tasks: nothing is lost that chance does not explain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from .numbers import ratio, small, tokens
from .results import Results, ResultsFile
from .settings import Setting, baseline_of, run_of, settings_of

RECALLS_BELOW = 2.0
"""Perplexity of the second copy with SDPA: a model above it does not copy, and cannot lose the ability."""
FINDS_ABOVE = 0.5
"""Accuracy of passkeys with SDPA: likewise."""
SIGNIFICANT = 0.05
"""The p-value below which a change of a task counts."""


class Level(IntEnum):
    """How safe: the greater, the worse. UNKNOWN is a verdict only, not a measure's."""

    SAFE = 0
    CARE = 1
    UNSAFE = 2
    UNKNOWN = 3

    @property
    def words(self) -> str:
        """As the report writes it."""
        return ("safe", "with care", "not safe", "not shown")[self]


@dataclass(frozen=True)
class Measure:
    """One measure of quality, in which less is better.

    Attributes:
        title: what is measured.
        safe, care: the most that is "safe", and "with care"; above it is "not safe".
        unit: behind the number.
    """

    title: str
    safe: float
    care: float
    unit: str = ""

    def level(self, value: float) -> Level:
        """The class of a value."""
        if value <= self.safe:
            return Level.SAFE
        return Level.CARE if value <= self.care else Level.UNSAFE


MEASURES = {
    "kl": Measure("KL from SDPA, mean over tokens (nats)", 1e-3, 1e-2),
    "perplexity": Measure("rise of perplexity, upper end of its interval (%)", 0.5, 2.0, " %"),
    "recall": Measure("rise of the second copy's perplexity, at the worst distance (%)", 1.0, 5.0, " %"),
    "passkeys": Measure("passkeys lost, mean over distances (points)", 0.5, 5.0, " points"),
    "tasks": Measure("accuracy lost in a task, where that is significant (points)", 0.0, 1.0, " points"),
}
NEEDED = ("kl", "recall")
"""Without these a setting is not shown to be safe."""


@dataclass(frozen=True)
class Finding:
    """What one measure says of a setting: the value that counts, and where it is from."""

    measure: str
    value: float
    where: str

    @property
    def level(self) -> Level:
        """Its class."""
        return MEASURES[self.measure].level(self.value)

    @property
    def words(self) -> str:
        """The value as the report writes it."""
        if self.measure == "kl":
            return f"KL {small(self.value)}"
        names = {
            "perplexity": "perplexity",
            "recall": "recall perplexity",
            "passkeys": "passkeys",
            "tasks": "accuracy",
        }
        sign = "−" if self.measure in ("passkeys", "tasks") else "+"
        value = max(0.0, self.value)
        return f"{names[self.measure]} {sign}{value:.2g}{MEASURES[self.measure].unit}"


@dataclass(frozen=True)
class Speed:
    """What a setting buys on a GPU: SDPA's time over its own."""

    ratio: float
    length: int
    what: str
    """"prefill" of a whole model, or "attention alone"."""
    where: str

    @property
    def words(self) -> str:
        """As the headline writes it: 1.3× prefill at 32k."""
        return f"{ratio(self.ratio)} {self.what} at {tokens(self.length)}"


@dataclass
class Verdict:
    """What is known about one setting."""

    setting: Setting
    findings: dict[str, Finding] = field(default_factory=dict)
    """The worst of each measure."""
    speeds: list[Speed] = field(default_factory=list)
    """At every length: of whole models, or else of attention alone."""

    @property
    def speed(self) -> Speed | None:
        """The one that counts: at the longest length."""
        return max(self.speeds, key=lambda speed: speed.length, default=None)

    @property
    def level(self) -> Level:
        """The worst finding's class; UNKNOWN where the needed measures are missing and nothing is wrong."""
        worst = max((finding.level for finding in self.findings.values()), default=Level.SAFE)
        if worst < Level.UNSAFE and any(measure not in self.findings for measure in NEEDED):
            return Level.UNKNOWN
        return worst

    @property
    def reasons(self) -> list[str]:
        """What decides, in words: the findings of the worst class, and what was not measured."""
        if self.level == Level.UNKNOWN:
            return [f"{MEASURES[name].title}: not measured" for name in NEEDED if name not in self.findings]
        return [finding.words for finding in self.findings.values() if finding.level == self.level]

    @property
    def words(self) -> str:
        """One line: safe at KL 3e-4; 1.3× prefill at 32k."""
        quality = self.level.words
        if self.level in (Level.SAFE, Level.CARE) or (self.level == Level.UNSAFE and "kl" in self.findings):
            quality = f"{quality} at {self.findings['kl'].words}"
        others = [reason for reason in self.reasons if not reason.startswith("KL ")]
        if self.level in (Level.CARE, Level.UNSAFE) and others:
            quality = f"{quality} ({', '.join(others)})"
        if self.speed is None:
            return f"{quality}; speed not measured on a GPU"
        slower = ", slower than SDPA" if self.speed.ratio < 1 else ""
        return f"{quality}; {self.speed.words}{slower}"


def judge(results: Results) -> list[Verdict]:
    """A verdict on every setting in ``results``, in their order."""
    verdicts = [Verdict(setting) for setting in settings_of(results)]
    for verdict in verdicts:
        for finding in _findings(results, verdict.setting):
            known = verdict.findings.get(finding.measure)
            if known is None or finding.value > known.value:
                verdict.findings[finding.measure] = finding
        verdict.speeds = _speeds(results, verdict.setting)
    return verdicts


def headline(verdicts: Sequence[Verdict]) -> str:
    """The report's first sentence."""
    measured = [verdict for verdict in verdicts if not verdict.setting.is_control]
    if not measured:
        return "No setting of DMA was measured."
    for level, opening in (
        (Level.SAFE, ""),
        (Level.CARE, "No setting measured here is safe without care. The best: "),
        (Level.UNSAFE, "No setting measured here is safe. The closest: "),
    ):
        found = [verdict for verdict in measured if verdict.level == level]
        if found:
            # among what is safe speed decides, and among what is not, closeness
            fastest = max(
                found, key=lambda verdict: (verdict.speed.ratio if verdict.speed else 0.0, -_kl(verdict))
            )
            best = fastest if level == Level.SAFE else min(found, key=_kl)
            return f"{opening}{best.setting.name}: {best.words}."
    quick = max(measured, key=lambda verdict: verdict.speed.ratio if verdict.speed else 0.0)
    buys = f" {quick.setting.name}: {quick.speed.words}." if quick.speed else ""
    return f"Quality is not shown, so there is no verdict on safety.{buys}"


def _kl(verdict: Verdict) -> float:
    return verdict.findings["kl"].value if "kl" in verdict.findings else float("inf")


def _findings(results: Results, setting: Setting) -> list[Finding]:
    found = []
    for file in results.of("perplexity"):
        for baseline, run in _pairs(file, setting):
            where = f"{file.content['model']}, {run['data']}"
            found.append(Finding("kl", run["kl_mean"], where))
            found.append(Finding("perplexity", run["delta_percent_interval"][1], where))
            if baseline["recall_perplexity"] < RECALLS_BELOW:
                found.append(
                    Finding("recall", _rise(run["recall_perplexity"], baseline["recall_perplexity"]), where)
                )
    for file in results.of("recall"):
        baseline_run, run_ = baseline_of(file.runs), run_of(file.runs, setting)
        if baseline_run is None or run_ is None:
            continue
        found += _recall_findings(baseline_run, run_, str(file.content["model"]))
    for file in results.of("tasks"):
        found += _task_findings(file, setting)
    for file in results.of("calibrate"):
        if setting.matches(file.content["config"]):
            found += _calibration_findings(file)
    return found


def _pairs(file: ResultsFile, setting: Setting) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """SDPA's run and the setting's, text by text."""
    pairs = []
    for corpus in file.content["corpora"]:
        runs = [run for run in file.runs if run["data"] == corpus["name"]]
        baseline, run = baseline_of(runs), run_of(runs, setting)
        if baseline is not None and run is not None:
            pairs.append((baseline, run))
    return pairs


def _recall_findings(baseline: Mapping[str, Any], run: Mapping[str, Any], where: str) -> list[Finding]:
    """Of distances at which the model recalls with SDPA: elsewhere there is nothing to lose."""
    found = []
    copies = baseline["second_copy_perplexity"]
    rises = [
        _rise(run["second_copy_perplexity"][distance], copies[distance])
        for distance in copies
        if copies[distance] < RECALLS_BELOW
    ]
    if rises:
        found.append(Finding("recall", max(rises), where))
    keys = baseline["passkey_accuracy"]
    losses = [keys[d] - run["passkey_accuracy"][d] for d in keys if keys[d] >= FINDS_ABOVE]
    if losses:
        found.append(Finding("passkeys", 100 * sum(losses) / len(losses), where))
    return found


def right_or_wrong(file: ResultsFile) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Of ``tasks.json`` the runs of DMA and their results in tasks whose answers are right or wrong."""
    return [
        (run, result)
        for run in file.runs
        if run["config"] is not None
        for result in run["results"]
        if result["flipped"] is not None and result["delta"] is not None
    ]


def _task_findings(file: ResultsFile, setting: Setting) -> list[Finding]:
    """What each task lost; nothing where chance explains it (Bonferroni over the tasks of a setting)."""
    tested = [result for run, result in right_or_wrong(file) if setting.matches(run["config"])]
    found = []
    for result in tested:
        better = file.content["tasks"].get(result["task"], {}).get("higher_is_better", {})
        sign = -1 if better.get(result["metric"].partition(",")[0], True) else 1
        significant = result["p_value"] is not None and result["p_value"] * len(tested) < SIGNIFICANT
        lost = 100 * sign * result["delta"] if significant else 0.0
        found.append(Finding("tasks", lost, f"{result['task']}, {result['metric']}"))
    return found


def _calibration_findings(file: ResultsFile) -> list[Finding]:
    """Of the text that played no part in the choice."""
    held_out, recall = file.content["held_out"], file.content["recall_perplexity"]
    where = f"{file.content['model']}, held-out text"
    found = [
        Finding("kl", held_out["kl"], where),
        Finding("perplexity", held_out["perplexity_change"], where),
    ]
    if recall["sdpa"] < RECALLS_BELOW:
        found.append(Finding("recall", _rise(recall["dma"], recall["sdpa"]), where))
    return found


def _rise(value: float, baseline: float) -> float:
    return 100 * (value / baseline - 1)


def _speeds(results: Results, setting: Setting) -> list[Speed]:
    """Of prefills of a whole model on a GPU, or else of attention alone; one for each length."""
    found: dict[int, Speed] = {}
    for file in results.of("speed"):
        for run in file.runs:
            if not file.on_cpu and setting.matches(run["config"]) and run["prefill_speedup"] is not None:
                where = f"{file.content['model']}, batch {run['batch']}, {file.environment['hardware']}"
                found.setdefault(
                    run["context"], Speed(run["prefill_speedup"], run["context"], "prefill", where)
                )
    if found:
        return list(found.values())
    for file in results.of("kernels"):
        for run in file.runs if file.content["suite"] == "attention" else ():
            shape, speedup = run["shape"], run["ratio_to_sdpa_default"]
            timed = run["op"] == "attention" and shape["causal"] and speedup is not None
            if timed and setting.matches(run["config"]):
                where = f"head dimension {shape['head_dim']}, {file.environment['hardware']}"
                speed = Speed(speedup, shape["length"], "attention alone", where)
                found.setdefault(shape["length"], speed)
    return list(found.values())


def limits_table() -> tuple[list[str], list[list[str]]]:
    """The limits as the report prints them: columns and rows."""
    rows = [
        [measure.title, f"≤ {measure.safe:g}", f"≤ {measure.care:g}", "needed" if name in NEEDED else ""]
        for name, measure in MEASURES.items()
    ]
    return ["measure", Level.SAFE.words, Level.CARE.words, ""], rows


def verdict_table(verdicts: Sequence[Verdict]) -> tuple[list[str], list[list[str]]]:
    """One row a setting: its class, what it buys, every finding."""
    measures = ["KL", "perplexity, at most", "recall", "passkeys, points", "tasks, points"]
    rows = []
    for verdict in verdicts:
        name = verdict.setting.name + (" (control)" if verdict.setting.is_control else "")
        speed = verdict.speed.words if verdict.speed else "–"
        cells = [_cell(measure, verdict.findings.get(measure)) for measure in MEASURES]
        rows.append([name, verdict.level.words, speed, *cells])
    return ["setting", "verdict", "speed", *measures], rows


def _cell(measure: str, finding: Finding | None) -> str:
    if finding is None:
        return "–"
    if measure == "kl":
        return small(finding.value)
    if measure in ("passkeys", "tasks"):
        return f"{-finding.value:+.1f}".replace("-", "−") if finding.value else "0"
    return f"{finding.value:+.2f} %".replace("-", "−")
