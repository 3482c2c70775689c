"""The report's judgement: which files it reads, its verdict, and what it warns of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import report_cases
from dma_hf_eval.errors import UsageError
from dma_hf_eval.report.caveats import caveats
from dma_hf_eval.report.numbers import small, tokens
from dma_hf_eval.report.results import KINDS, Results, read_results
from dma_hf_eval.report.verdict import MEASURES, Finding, Level, Verdict, headline, judge
from schema_check import validate

from dma_hf import DMAConfig


@pytest.mark.parametrize("name", report_cases.CASES)
def test_the_cases_are_what_the_commands_write(name: str) -> None:
    validate(report_cases.CASES[name](), name)


def read(folder: Path, *names: str, **changed: report_cases.Content) -> Results:
    """The results of some of the cases, ``changed`` ones instead of theirs."""
    contents = {name: report_cases.CASES[name]() for name in names}
    return read_results(report_cases.write(folder, {**contents, **changed}))


def verdict_on(name: str, results: Results) -> Verdict:
    return next(verdict for verdict in judge(results) if verdict.setting.name == name)


# Which files are read


def test_what_is_missing_unreadable_or_unknown_is_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "speed.json").write_text("{broken", encoding="utf-8")
    (tmp_path / "tasks.json").write_text('{"schema": 99}', encoding="utf-8")
    (tmp_path / "notes.json").write_text("{}", encoding="utf-8")
    (tmp_path / "calibrated.json").write_text("{}", encoding="utf-8")  # a setting, not a result
    incomplete = report_cases.recall()
    del incomplete["samples"], incomplete["runs"][1]["passkey_accuracy"]
    results = read(tmp_path, "perplexity", recall=incomplete, kernels_tiles=report_cases.kernels())
    assert [file.name for file in results.files] == ["perplexity.json", "kernels_tiles.json"]
    assert results.unreadable["speed.json"].startswith("is no JSON")
    assert "has schema 99" in results.unreadable["tasks.json"]
    assert results.unreadable["recall.json"] == "lacks samples, runs[].passkey_accuracy"
    assert results.unknown == ["notes.json"]
    assert set(results.missing) == set(KINDS) - {"perplexity", "kernels"}


def test_a_folder_without_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"holds no results of dma-eval$"):
        read_results(tmp_path)
    (tmp_path / "recall.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UsageError, match=r"that can be read: recall\.json: holds no JSON object"):
        read_results(tmp_path)


# The verdict


def test_the_verdict_is_the_fastest_safe_setting(tmp_path: Path) -> None:
    results = read(tmp_path, *report_cases.CASES)
    assert headline(judge(results)) == "low=int8,high=none: safe at KL 2e-4; 1.3× prefill at 32k."
    paper = verdict_on("paper", results)
    assert paper.level == Level.UNSAFE
    assert paper.words.startswith("not safe at KL 3e-2 (recall perplexity +9 %")
    assert paper.findings["tasks"].value == pytest.approx(20)
    assert verdict_on("low=none,high=none", results).setting.is_control


def test_nothing_safe_names_the_closest(tmp_path: Path) -> None:
    content = report_cases.perplexity()
    content["runs"] = [run for run in content["runs"] if run["name"] in ("SDPA", "paper")]
    results = read(tmp_path, perplexity=content)
    assert headline(judge(results)).startswith(
        "No setting measured here is safe. The closest: paper: not safe at KL"
    )
    content["runs"][1].update(kl_mean=0.005, delta_percent_interval=[0, 1], recall_perplexity=1.11)
    results = read(tmp_path, perplexity=content)
    assert headline(judge(results)) == (
        "No setting measured here is safe without care. The best: paper: with care at KL 5e-3"
        " (perplexity +1 %); speed not measured on a GPU."
    )


def test_without_recall_nothing_is_shown_to_be_safe(tmp_path: Path) -> None:
    content = report_cases.perplexity()
    for run in content["runs"]:
        run["recall_perplexity"] *= 100  # the model does not copy, with SDPA either
    verdict = verdict_on("low=int8,high=none", read(tmp_path, perplexity=content))
    assert verdict.level == Level.UNKNOWN
    assert verdict.reasons == [f"{MEASURES['recall'].title}: not measured"]


def test_speed_alone_is_no_verdict(tmp_path: Path) -> None:
    assert headline(judge(read(tmp_path, "kernels"))) == (
        "Quality is not shown, so there is no verdict on safety."
        " low=int8,high=none: 1.3× attention alone at 64k."
    )


def test_speed_on_a_cpu_does_not_count(tmp_path: Path) -> None:
    content = report_cases.speed()
    content["environment"]["device"] = "cpu"
    results = read(tmp_path, "perplexity", "recall", speed=content)
    assert verdict_on("low=int8,high=none", results).speed is None
    assert any(text.startswith("Timed on a CPU") for text in caveats(results, judge(results)))


def test_distances_at_which_the_model_finds_nothing_do_not_count(tmp_path: Path) -> None:
    content = report_cases.recall()
    for run in content["runs"]:
        run["passkey_accuracy"]["3000"] = 0.4 if run["config"] is None else 0.0
    verdict = verdict_on("low=int8,high=none", read(tmp_path, recall=content))
    assert verdict.findings["passkeys"].value == 0


def test_a_loss_that_chance_explains_is_none(tmp_path: Path) -> None:
    content = report_cases.tasks()
    content["runs"][2]["results"][0].update(delta=-0.1, p_value=0.06)
    assert verdict_on("low=int8,high=none", read(tmp_path, tasks=content)).findings["tasks"].value == 0


@pytest.mark.parametrize(
    ("measure", "value", "level"),
    [
        ("kl", 1e-3, Level.SAFE),
        ("kl", 1.1e-3, Level.CARE),
        ("kl", 0.02, Level.UNSAFE),
        ("perplexity", -3.0, Level.SAFE),
        ("tasks", 0.5, Level.CARE),
    ],
)
def test_a_value_at_the_limit_is_within_it(measure: str, value: float, level: Level) -> None:
    assert Finding(measure, value, "here").level == level


def test_a_calibrated_setting_is_judged_by_held_out_text(tmp_path: Path) -> None:
    setting = DMAConfig(low="mxfp4", layers={0: {"low": "none"}}).to_dict()
    exact = DMAConfig(low="none", high="none").to_dict()
    quality = {"kl": 5e-4, "perplexity_change": 0.1, "top1_agreement": 0.99}
    content: dict[str, Any] = {
        "schema": 1,
        "environment": report_cases.environment("calibrate"),
        "model": "my-model",
        "data": "a text",
        "context": 2048,
        "windows": 2,
        "held_out_windows": 2,
        "budget": {"measure": "kl", "limit": 1e-3},
        "prompt_length": 32_768,
        "costs": {"source": "a data sheet", "measured": False, "formats": {"mxfp4": 0.6}, "sdpa": 0.9},
        "candidates": [{"config": setting, "time": 0.7}, {"config": exact, "time": 1.0}],
        "kl_unquantised": 0.0,
        "layers": [{"candidate": 0, "kl_alone": [4e-4, 0.0]}],
        "config": setting,
        "estimated_kl": 4e-4,
        "quality": quality,
        "held_out": quality,
        "recall_perplexity": {"sdpa": 1.1, "dma": 1.105},
        "speed_against_sdpa": 1.2,
        "speed_against_unquantised": 1.4,
        "ladder": [{"choice": [0], "estimated_kl": 4e-4, "speed_against_sdpa": 1.2, "quality": quality}],
    }
    validate(content, "calibrate")
    assert headline(judge(read(tmp_path, calibrate=content))) == (
        "calibrated: safe at KL 5e-4; speed not measured on a GPU."  # what is predicted is not measured
    )


# The caveats


def said(folder: Path, *names: str, **changed: report_cases.Content) -> str:
    results = read(folder, *names, **changed)
    return "\n".join(caveats(results, judge(results)))


def test_good_results_have_few_caveats(tmp_path: Path) -> None:
    text = said(tmp_path, *report_cases.CASES)
    assert text.splitlines() == [
        "Not measured: calibration to a quality budget (dma-eval calibrate);"
        " supported model types (dma-eval models)."
    ]


def test_results_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    content = report_cases.recall()
    content["environment"].update(commit="f" * 40, dirty=True, hardware="a CPU")
    content["model"] = "built-in"
    text = said(tmp_path, "perplexity", recall=content)
    assert "Different commits of dma_hf: 0123456789ab (perplexity.json); ffffffffffff (recall.json)." in text
    assert "Different hardware: NVIDIA H200 (perplexity.json); a CPU (recall.json)." in text
    assert "uncommitted changes to dma_hf, so no commit reproduces it: recall.json." in text
    assert "Different models: my-model (perplexity.json); built-in (recall.json)." in text
    assert "The built-in model is small" in text


def test_a_setting_that_the_hardware_decides_is_named(tmp_path: Path) -> None:
    perplexity, kernels = report_cases.perplexity(), report_cases.kernels()
    perplexity["environment"]["hardware"] = "a CPU"
    for run in (perplexity["runs"][2], kernels["runs"][2]):
        run["config"] = DMAConfig.preset("auto").to_dict()
    text = said(tmp_path, perplexity=perplexity, kernels=kernels)
    assert "The hardware decides what low=int8,high=none means" in text


def test_an_interrupted_benchmark_is_named(tmp_path: Path) -> None:
    kernels = {**report_cases.kernels(), "shapes_left": 3}
    text = said(tmp_path, "perplexity", kernels=kernels)
    assert "kernels.json is unfinished: 3 shapes are missing." in text


def test_an_older_file_without_a_new_field_has_the_same_setting(tmp_path: Path) -> None:
    kernels = report_cases.kernels()
    for run in kernels["runs"]:
        if run["config"] is not None:
            del run["config"]["min_length"]
    results = read(tmp_path, "perplexity", kernels=kernels)
    assert len(judge(results)) == 3
    assert verdict_on("paper", results).speed is not None


def test_few_samples_are_named(tmp_path: Path) -> None:
    perplexity, recall, tasks = report_cases.perplexity(), report_cases.recall(), report_cases.tasks()
    perplexity["corpora"][0]["tokens"] = 5000
    recall["samples"] = 6
    tasks["runs"][2]["results"][0]["delta_interval"] = [-0.04, 0.04]
    text = said(tmp_path, perplexity=perplexity, recall=recall, tasks=tasks)
    assert "only 5,000 tokens of a text were scored" in text
    assert "few samples per distance, 6; one passkey is 16.7 % there" in text
    assert "low=int8,high=none 4.0 points" in text


def test_weak_timings_are_named(tmp_path: Path) -> None:
    content = report_cases.speed()
    content.update(weights="random", layers=4, repeats=2)
    content["runs"][1]["prefill_seconds_all"] = [0.1, 9.0]
    content["runs"][2].update(error="out of memory", prefill_speedup=None, prefill_seconds_all=[])
    content["runs"][3]["notes"] = ["dma runs on the PyTorch reference"]
    text = said(tmp_path, speed=content)
    assert "my-model in random weights" in text
    assert "4 of 32 layers ran" in text
    assert "2 timed passes are few" in text
    assert "within the spread: paper at 1 × 8k." in text
    assert "speed.json: low=int8,high=none at 1 × 8k: out of memory." in text
    assert "low=none,high=none at 8k: dma runs on the PyTorch reference." in text


def test_a_control_that_differs_questions_the_comparison(tmp_path: Path) -> None:
    content = report_cases.perplexity()
    content["runs"][3]["kl_mean"] = 4e-4
    assert "With nothing quantised (low=none,high=none) the model is 4e-4 nats from SDPA" in said(
        tmp_path, perplexity=content
    )


def test_failed_runs_are_named(tmp_path: Path) -> None:
    content = report_cases.perplexity()
    content["failed"] = [
        {"name": "paper,tile=64", "config": DMAConfig(tile=64).to_dict(), "error": "too big"}
    ]
    assert "perplexity.json: 'paper,tile=64' failed and is missing: too big." in said(
        tmp_path, perplexity=content
    )


def test_numbers() -> None:
    assert [small(value) for value in (0, 3.1e-4, 0.0289, 1.0)] == ["0", "3e-4", "3e-2", "1e0"]
    assert [tokens(count) for count in (512, 1900, 1024, 131_072)] == ["512", "1,900", "1k", "128k"]
