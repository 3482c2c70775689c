"""Tasks of lm-eval, DMA against SDPA: bundled tasks, task files, mistakes, interruptions, two processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dma_hf_eval import recall, tasks
from dma_hf_eval.cli import main
from dma_hf_eval.errors import EvalError, UsageError
from dma_hf_eval.journal import Journal
from dma_hf_eval.loading import BUILTIN_FOLDER, load_model
from dma_hf_eval.runs import parse_runs
from dma_hf_eval.task_files import FOLDER, documents
from dma_hf_eval.task_model import TaskModel
from dma_hf_eval.tasks import TaskResult, TaskSet, compare_tasks, load_tasks, summarize
from lm_eval.tasks import TaskManager
from schema_check import validate
from transformers import AutoTokenizer

from dma_hf import DMAConfig

Capture = pytest.CaptureFixture[str]
BUILTIN = {"tokenizer": str(BUILTIN_FOLDER)}

CHOICE_TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [red, green, blue]
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATION_TASK = """\
task: sayings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: saying
generation_kwargs: {{until: ["."], max_gen_toks: 3}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a token that ends texts, which lm-eval needs."""
    copied = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("tasks") / "tiny"))
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(copied)
    return copied


@pytest.fixture
def task_files(tmp_path: Path) -> list[str]:
    """A task of choices and one of generation, on local data."""
    data = tmp_path / "data.json"
    rows = [
        {"question": f"What colour has number {i}?", "answer": i % 3, "saying": "None."} for i in range(10)
    ]
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    paths = []
    for name, text in (("colours", CHOICE_TASK), ("sayings", GENERATION_TASK)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text.format(data=data), encoding="utf-8")
        paths.append(str(path))
    return paths


def task_model(folder: Path) -> TaskModel:
    language_model = load_model(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    return TaskModel(language_model, batch_size=1)


def answers(
    folder: Path, names: list[str], *configs: str, **options: Any
) -> tuple[list[TaskResult], TaskSet]:
    loaded = load_tasks(names, tokenizer=str(folder), **options)
    return compare_tasks(task_model(folder), loaded, parse_runs(configs)), loaded


# The documents of the bundled tasks.


def test_a_passkey_prompt_has_its_length_and_depth() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_FOLDER)
    split = documents.passkey(length=500, depths=[0.25, 0.75], samples=3, **BUILTIN)["test"]
    assert split["depth"][:] == [0.25] * 3 + [0.75] * 3
    for document in split:
        context, answer = document["context"], document["answer"]
        length = len(tokenizer(f"{context} {answer}").input_ids)
        assert 500 - 2 * documents.SLACK <= length <= 500
        assert context.count(answer) == 1
        before = len(tokenizer(context[: context.index(answer)]).input_ids)
        assert before / length == pytest.approx(document["depth"], abs=0.06)
    assert (
        split.to_list()
        == documents.passkey(length=500, depths=[0.25, 0.75], samples=3, **BUILTIN)["test"].to_list()
    )


def test_a_key_has_one_value_among_many() -> None:
    for document in documents.key_value(pairs=20, samples=5, **BUILTIN)["test"]:
        stated = document["context"].split("The secret number of ")[1:]
        assert len(stated) == 20
        name = document["context"].rsplit("secret number of ", 1)[1].split("?")[0]
        assert f"The secret number of {name} is {document['answer']}." in document["context"]


def test_a_copy_goes_on_as_the_text_did() -> None:
    for document in documents.copy(length=600, words=8, samples=5, **BUILTIN)["test"]:
        text, _, _ = document["context"].rpartition("\n\n")
        lead = document["context"][-documents.LEAD :]
        assert f"{lead} {document['answer']}" in document["context"]
        assert len(document["answer"].split()) == 8
        assert len(text) > 600


def test_the_last_word_has_stood_there_before() -> None:
    split = documents.cloze(length=1000, gap=150, samples=10, **BUILTIN)["test"]
    assert len(split) == 10
    for document in split:
        before = document["context"].rsplit(None, 1)[1]
        assert f"{before} {document['answer']}" in " ".join(document["context"].split())
        assert document["answer"] not in document["context"][-150:]


def test_the_wording_is_that_of_the_training() -> None:
    assert (documents.NEEDLE, documents.QUESTION) == (recall.NEEDLE, recall.QUESTION)


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves no room for text"):
        documents.passkey(length=40, depths=[0.5], samples=1, **BUILTIN)
    with pytest.raises(ValueError, match="need a tokenizer"):
        documents.key_value(pairs=2, samples=1)


# Comparison.


def test_an_exact_config_answers_as_sdpa_does(folder: Path) -> None:
    results, loaded = answers(folder, ["dma_passkey_1k"], "low=none,high=none", "low=mxfp4", limit=3)
    sdpa, exact, mxfp4 = summarize(results, loaded)
    assert [row["metric"] for row in sdpa["results"]] == ["acc", "bits_per_byte"]
    accuracy, surprise = exact["results"]
    assert (accuracy["value"], accuracy["test"], accuracy["p_value"]) == (0.0, "McNemar", 1.0)
    assert accuracy["flipped"] == {"lost": [], "gained": []}
    assert surprise["delta"] == pytest.approx(0, abs=1e-5)
    assert (surprise["test"], surprise["flipped"]) == ("paired bootstrap", None)
    assert abs(mxfp4["results"][1]["delta"]) > 1e-3
    assert results[0].truncated == 0
    assert all(row["delta"] is None and row["p_value"] is None for row in sdpa["results"])


def test_any_task_file_works(folder: Path, task_files: list[str]) -> None:
    results, loaded = answers(folder, task_files, "low=mxfp4", num_fewshot=2)
    described = loaded.describe()
    assert {name: task["samples"] for name, task in described.items()} == {"colours": 10, "sayings": 10}
    assert described["colours"]["num_fewshot"] == 2
    sdpa, _ = summarize(results, loaded)
    assert [(row["task"], row["metric"]) for row in sdpa["results"]] == [
        ("colours", "acc"),
        ("colours", "acc_norm"),
        ("sayings", "exact_match"),
    ]
    # lm-eval's score is the mean of the samples that the tests are made on
    for row in sdpa["results"]:
        samples = results[0].samples[row["task"]][row["metric"]]
        assert row["value"] == pytest.approx(sum(samples) / 10)


def test_flipped_samples_are_numbered() -> None:
    loaded = load_tasks(["dma_cloze"], tokenizer=str(BUILTIN_FOLDER), limit=4)
    sdpa, dma = parse_runs(["paper"])
    right = {"dma_cloze": {"acc": [1.0, 1.0, 0.0, 0.0]}}
    other = {"dma_cloze": {"acc": [1.0, 0.0, 1.0, 0.0]}}
    ids = {"dma_cloze": [3, 5, 8, 9]}
    results = [
        TaskResult(run, scores={"dma_cloze": {"acc": 0.5}}, samples=samples, ids=ids)
        for run, samples in ((sdpa, right), (dma, other))
    ]
    (row,) = summarize(results, loaded)[1]["results"]
    assert row["flipped"] == {"lost": [5], "gained": [8]}
    assert (row["delta"], row["p_value"]) == (0.0, 1.0)


def test_requests_that_do_not_fit_are_counted(folder: Path) -> None:
    (result,), _ = answers(folder, ["dma_key_value_64"], limit=2)
    assert result.truncated == 2


def test_a_tokenizer_that_lm_eval_cannot_use_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(UsageError, match="neither a token that begins texts nor one that ends them"):
        task_model(tiny_folder)


def test_finished_runs_are_not_repeated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_tasks(["dma_passkey_1k"], tokenizer=str(folder), limit=2)
    lm, runs = task_model(folder), parse_runs(["low=mxfp4"])
    answer = tasks._answer

    def interrupted(lm: TaskModel, loaded: TaskSet, run: Any) -> dict[str, Any]:
        if run.config is not None:
            raise KeyboardInterrupt
        return answer(lm, loaded, run)

    monkeypatch.setattr(tasks, "_answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare_tasks(lm, loaded, runs, journal=Journal(tmp_path, "tasks"))
    repeated = []
    monkeypatch.setattr(tasks, "_answer", lambda *args: repeated.append(args[2]) or answer(*args))
    results = compare_tasks(lm, loaded, runs, journal=Journal(tmp_path, "tasks"))
    assert repeated == [runs[1]]
    monkeypatch.setattr(tasks, "_answer", answer)
    uninterrupted = compare_tasks(lm, loaded, runs)
    assert [result.samples for result in results] == [result.samples for result in uninterrupted]


# The command.


def test_the_command_prints_a_table_and_writes_json(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["tasks", "--model", str(folder), "--tasks", "dma_passkey_1k,dma_key_value_64"]
    assert main([*arguments, "--limit", "2", "--config", "low=mxfp4", "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))
    validate(content, "tasks")
    assert [run["name"] for run in content["runs"]] == ["SDPA", "low=mxfp4"]
    assert list(content["tasks"]) == ["dma_passkey_1k", "dma_key_value_64"]
    assert (content["limit"], content["processes"]) == (2, 1)
    captured = capsys.readouterr()
    assert all(
        word in captured.out for word in ("dma_passkey_1k", "bits_per_byte", "low=mxfp4", "tasks.json")
    )
    assert "2 requests are longer than the model's context of 1,024 tokens" in captured.err
    assert not list(tmp_path.glob(".*"))


MISTAKES = [
    ("--tasks dma_passkey_3k", "there is no task 'dma_passkey_3k'; close to it: dma_passkey_"),
    ("--tasks dma_cloze,,", "must be names with commas between them"),
    ("--batch-size auto --device cpu", "--batch-size auto needs a GPU"),
    ("--batch-size 0", "must be 'auto' or at least 1, got '0'"),
    ("--num-fewshot -1", "must be a whole number of at least 1, got '-1'"),
    ("--limit 0", "must be a whole number of at least 1, got '0'"),
]


@pytest.mark.parametrize(("options", "complaint"), MISTAKES)
def test_mistakes_are_one_line(
    options: str, complaint: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dma_hf_eval.loading.load_model", None)  # a mistake is found before
    # lm-eval's own thousands of task files take seconds to read
    known = TaskManager(include_path=str(FOLDER), include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", lambda **kwargs: known)
    assert main(["tasks", *options.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert complaint in captured.err


def test_data_that_is_missing_is_one_line(task_files: list[str], tmp_path: Path) -> None:
    (tmp_path / "data.json").unlink()
    with pytest.raises(UsageError, match=r"cannot load --tasks .*colours.yaml: .*data.json"):
        load_tasks(task_files[:1], tokenizer=str(BUILTIN_FOLDER))


def test_two_processes_give_the_result_of_one(folder: Path, tmp_path: Path) -> None:
    """What ``accelerate launch`` starts on two GPUs, on the CPU: three samples, so the shares differ."""
    arguments = ["tasks", "--model", str(folder), "--tasks", "dma_passkey_1k,dma_key_value_64"]
    arguments += ["--limit", "3", "--device", "cpu", "--config", "low=mxfp4", "--output"]
    # with --cpu, accelerate starts a single process, whatever --num_processes says
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launch, "-m", "dma_hf_eval", *arguments, str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written:") == done.stdout.count("samples of 2 tasks") == 1
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["tasks.json"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    two, one = (json.loads((tmp_path / name / "tasks.json").read_text()) for name in ("two", "one"))
    assert (two["processes"], one["processes"]) == (2, 1)
    for mine, theirs in zip(two["runs"], one["runs"], strict=True):
        # the process of one sample repeats a request, to keep step with the other: it counts once
        assert mine["truncated_requests"] == theirs["truncated_requests"] == 3
        for row, expected in zip(mine["results"], theirs["results"], strict=True):
            assert row.keys() == expected.keys()
            for name in ("task", "metric", "test", "flipped"):
                assert row[name] == expected[name]
            for name in ("value", "stderr", "delta", "p_value"):
                assert row[name] == (expected[name] and pytest.approx(expected[name], rel=1e-4))


def test_samples_that_lm_eval_loses_are_missed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = tasks.lm_eval.evaluate

    def forgetful(*arguments: Any, **options: Any) -> Any:
        output = evaluate(*arguments, **options)
        output["samples"]["dma_passkey_1k"].pop()
        return output

    monkeypatch.setattr(tasks.lm_eval, "evaluate", forgetful)
    with pytest.raises(EvalError, match="lm-eval lost or repeated samples of 'dma_passkey_1k'"):
        answers(folder, ["dma_passkey_1k"], limit=2)


def test_the_plain_command_line_of_lm_eval_knows_dma_and_the_bundled_tasks(
    folder: Path, tmp_path: Path
) -> None:
    # the setting travels in the model's config; without one, so short a prompt would stay on SDPA
    model_folder = tmp_path / "model"
    shutil.copytree(folder, model_folder)
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    config["dma_config"] = DMAConfig.preset("paper").to_dict()
    (model_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = f"pretrained={model_folder},attn_implementation=dma,dtype=float32"
    arguments = ["--model", "hf", "--model_args", model, "--tasks", "dma_passkey_1k", "--limit", "1"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "dma_hf_eval.lm_eval",
            *arguments,
            "--device",
            "cpu",
            "--output_path",
            tmp_path / "results",
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").rglob("results*.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    results, _ = answers(folder, ["dma_passkey_1k"], "paper", limit=1)
    expected = results[1].scores["dma_passkey_1k"]["bits_per_byte"]
    assert found["results"]["dma_passkey_1k"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)


def test_every_bundled_task_is_in_the_help(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["tasks", "--help"])
    text = capsys.readouterr().out
    named = {path.stem for path in FOLDER.glob("*.yaml")} - {"_common", "dma"}
    for family in {name.rsplit("_", 1)[0] for name in named}:
        assert f"dma_{family}" in text
