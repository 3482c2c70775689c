"""Tasks of lm-eval with DMA against SDPA: one model, the same requests, paired tests on the samples.

lm-eval makes the requests and scores the answers. What is added here is the comparison: the tasks are loaded
once, every run answers the same requests in the same order, and the differences are tested sample by sample.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import functools
import io
import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval
import lm_eval.api.task
import numpy as np
import torch
from lm_eval.api.metrics import mean
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from .attention import attention
from .errors import EvalError, UsageError, first_line
from .failures import Failures
from .hub import hub_access
from .journal import NO_JOURNAL, Journal
from .runs import SDPA, Run
from .significance import flips, is_right_or_wrong, mcnemar, paired_bootstrap
from .task_files import FOLDER, GROUP
from .task_model import TaskModel

DEFAULT_TASKS = (GROUP,)
SEED = 1234
"""Of the few-shot examples and of sampling: set before every run, so that all get the same requests."""
SLOW_AGGREGATIONS = ("bleu", "chrf", "ter")
FEW_RESAMPLES = 100
"""Of a corpus metric that takes long: what lm-eval takes for its standard errors."""

# lm-eval joins a metric and the filter its answers went through; "none" is the filter that does nothing.
_NO_FILTER = "none"


@dataclass(frozen=True)
class TaskSet:
    """Loaded tasks: ``content`` is what ``TaskManager.load`` gives."""

    content: dict[str, Any]
    limit: int | None

    def describe(self) -> dict[str, Any]:
        """The tasks as results files hold them, by name."""
        return {
            name: {
                "version": str(task.VERSION),
                "num_fewshot": int(task.get_config("num_fewshot") or 0),
                "samples": min(len(task.eval_docs), self.limit or len(task.eval_docs)),
                "higher_is_better": {metric: bool(up) for metric, up in task.higher_is_better().items()},
            }
            for name, task in self.content["tasks"].items()
        }


def load_tasks(
    names: Sequence[str],
    *,
    tokenizer: str,
    limit: int | None = None,
    num_fewshot: int | None = None,
    trust_remote_code: bool = False,
) -> TaskSet:
    """Loads tasks and their data, from the hub where they are no bundled ones.

    Args:
        names: of tasks, groups or tags, patterns such as "mmlu_*", or paths of task files.
        tokenizer: the model's, a hub id or a folder: some tasks count their lengths in its tokens.
        limit: samples of each task, from its start; None takes all.
        num_fewshot: examples in the prompt, for tasks that do not insist on none; None: as the tasks say.
        trust_remote_code: whether code in the tokenizer's repository may be executed.

    Raises:
        UsageError: if there is no such task, with what is close to it, or its data cannot be loaded.
    """
    manager = _manager_of(names, {"tokenizer": tokenizer, "trust_remote_code": trust_remote_code})
    specs = [spec for name in names for spec in (manager.match_tasks([name]) or [name])]
    try:
        with hub_access():
            content = manager.load(list(dict.fromkeys(specs)))
    except Exception as error:  # a task, its code and its data can be wrong in any way there is
        raise UsageError(f"cannot load --tasks {','.join(names)}: {first_line(error)}") from error
    for name, task in content["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UsageError(f"--tasks: '{name}' executes code that the model writes; use lm_eval for it")
        preset = task.get_config("num_fewshot")
        if preset is None or (num_fewshot is not None and preset != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    return TaskSet(dict(content), limit)


@dataclass
class TaskResult:
    """What one run answered, in plain values: the journal keeps it.

    scores: by task and by metric ("acc", or "exact_match,strict-match" where answers were filtered), the
    aggregate that lm-eval gives. samples: the same per sample. ids: which samples, by task. prompts: a
    hash of each sample's request, by task. truncated: requests that were cut to the model's context.
    """

    run: Run
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    ids: dict[str, list[int]] = field(default_factory=dict)
    prompts: dict[str, list[str]] = field(default_factory=dict)
    truncated: int = 0
    seconds: float = 0.0


def compare_tasks(
    lm: TaskModel,
    tasks: TaskSet,
    runs: Sequence[Run],
    *,
    journal: Journal = NO_JOURNAL,
    failures: Failures | None = None,
) -> list[TaskResult]:
    """Has every run answer the tasks.

    Every process of ``accelerate launch`` calls it; the results are complete in the main process alone.

    Args:
        lm: the model.
        tasks: the tasks.
        runs: the attentions; the first is SDPA.
        journal: of finished runs, in the main process.
        failures: takes note of runs that fail, and the others go on. With several processes the first failure
            is raised: the others wait for the one that failed.

    Returns:
        The results of the runs that did not fail, in their order.

    Raises:
        EvalError: if two runs did not get the same requests.
    """
    if not runs or runs[0] != SDPA:
        raise ValueError("the first of runs must be SDPA: the others are measured against it")
    catches = failures is not None and lm.world_size == 1
    results: list[TaskResult] = []
    for number, run in enumerate(runs, start=1):
        key = {"config": run.describe()["config"]}
        found = journal.get(**key) if lm.is_main else None
        if not lm.agree(found is not None):
            lm.label = f"{run.name} ({number} of {len(runs)})"
            with failures.catch(run) if catches and failures is not None else contextlib.nullcontext():
                found = _answer(lm, tasks, run)
            if found is not None and lm.is_main:
                journal.put(found, **key)
        if found is not None:
            result = TaskResult(run, **found)
            if lm.is_main and results and result.prompts != results[0].prompts:
                raise EvalError(f"run '{run.name}' did not get the same requests as SDPA: nothing to compare")
            results.append(result)
    return results


def _answer(lm: TaskModel, tasks: TaskSet, run: Run) -> dict[str, Any]:
    """The fields of ``TaskResult``: all of the values in the main process, none in the others."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  # the generator that lm-eval and its tasks draw from
    torch.manual_seed(SEED)
    for task in tasks.content["tasks"].values():
        task.set_fewshot_seed(seed=SEED)
    lm.truncated = set()
    start = time.perf_counter()
    try:
        with attention(lm.model, run.config), _quiet():
            output = lm_eval.evaluate(lm, tasks.content, limit=tasks.limit, bootstrap_iters=0)
    except (NotImplementedError, ValueError) as error:
        raise UsageError(f"tasks with '{run.name}': {first_line(error)}") from error
    seconds = time.perf_counter() - start
    truncated = len(set().union(*(lm.gather_object(lm.truncated) or [])))
    if output is None:  # not the main process
        return {"truncated": truncated, "seconds": seconds}
    fields: dict[str, Any] = {"scores": {}, "samples": {}, "ids": {}, "prompts": {}}
    described = tasks.describe()
    for name, logged in output["samples"].items():
        logged = sorted(logged, key=lambda sample: (sample["filter"], sample["doc_id"]))
        first = [sample for sample in logged if sample["filter"] == logged[0]["filter"]]
        fields["ids"][name] = [int(sample["doc_id"]) for sample in first]
        if fields["ids"][name] != list(range(described[name]["samples"])):
            raise EvalError(f"lm-eval lost or repeated samples of '{name}': there is nothing to compare")
        fields["prompts"][name] = [sample["doc_hash"] + sample["prompt_hash"] for sample in first]
        values: dict[str, list[Any]] = {}
        for sample in logged:
            for metric in sample["metrics"]:
                values.setdefault(_metric(metric, sample["filter"]), []).append(_plain(sample[metric]))
        fields["samples"][name] = values
    for name, scores in output["results"].items():
        fields["scores"][name] = {
            _metric(*key.rsplit(",", 1)): float(value)
            for key, value in scores.items()
            if "," in key and "_stderr" not in key and isinstance(value, (int, float))
        }
    return {**fields, "truncated": truncated, "seconds": seconds}


def summarize(results: Sequence[TaskResult], tasks: TaskSet) -> list[dict[str, Any]]:
    """The runs as results files hold them: every metric with its test against the first run, SDPA."""
    return [
        {
            **result.run.describe(),
            "seconds": result.seconds,
            "truncated_requests": result.truncated,
            "results": [
                _compare(results[0], result, tasks, task, metric)
                for task, scores in result.scores.items()
                for metric in scores
            ],
        }
        for result in results
    ]


def _compare(
    baseline: TaskResult, result: TaskResult, tasks: TaskSet, task: str, metric: str
) -> dict[str, Any]:
    """One metric of one task. A group has a value and a difference, and no samples of its own."""
    value, before = result.scores[task][metric], baseline.scores[task].get(metric, math.nan)
    is_baseline = result is baseline
    row: dict[str, Any] = {
        "task": task,
        "metric": metric,
        "value": _finite(value),
        "stderr": None,
        "delta": None if is_baseline else _finite(value - before),
        "delta_interval": None,
        "test": None,
        "p_value": None,
        "flipped": None,
    }
    mine, theirs = (run.samples.get(task, {}).get(metric) for run in (result, baseline))
    if not mine or not theirs or len(mine) != len(theirs):
        return row
    aggregation = tasks.content["tasks"][task].aggregation().get(metric.split(",")[0], mean)
    is_mean = aggregation is mean and all(isinstance(value, (bool, int, float)) for value in (*mine, *theirs))
    slow = getattr(aggregation, "__name__", "") in SLOW_AGGREGATIONS
    resamples = {"resamples": FEW_RESAMPLES} if slow else {}
    drawn = paired_bootstrap(theirs, mine, None if is_mean else aggregation, **resamples)
    row["stderr"] = _finite(drawn.other_error)
    if is_baseline:
        return row
    row["delta_interval"] = None if drawn.interval is None else list(drawn.interval)
    ids = result.ids[task]
    if is_mean and is_right_or_wrong([*mine, *theirs]) and len(ids) == len(mine):
        lost, gained = flips(theirs, mine)
        row["flipped"] = {"lost": [ids[i] for i in lost], "gained": [ids[i] for i in gained]}
        row["test"], row["p_value"] = "McNemar", mcnemar(theirs, mine)
    elif drawn.p_value is not None:
        row["test"], row["p_value"] = "paired bootstrap", drawn.p_value
    return row


def _metric(name: str, answer_filter: str) -> str:
    return name if answer_filter == _NO_FILTER else f"{name},{answer_filter}"


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return None if value is None or not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """A sample's value in types that the journal keeps."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


def _manager_of(names: Sequence[str], metadata: dict[str, Any]) -> TaskManager:
    """The task manager that knows all of ``names``: of the bundled tasks alone, where they suffice.

    To read lm-eval's thousands of task files takes more than ten seconds.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for defaults in (False, True):
        manager = TaskManager(include_path=str(FOLDER), include_defaults=defaults, metadata=metadata)
        unknown = [name for name in names if not _exists(name, manager.all_tasks)]
        if not unknown:
            return manager
    close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=4)
    hint = f"; close to it: {', '.join(close)}" if close else " ('lm_eval ls tasks' lists them)"
    raise UsageError(f"--tasks: there is no task '{unknown[0]}'{hint}")


def _exists(name: str, known: Sequence[str]) -> bool:
    if any(mark in name for mark in "*?["):
        return bool(fnmatch.filter(known, name))
    return name in known or (name.endswith(".yaml") and Path(name).expanduser().is_file())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither the bar of making requests, which takes no time, nor lines on stdout about batch sizes."""
    no_bar = functools.partial(tqdm, disable=True)
    with patch.object(lm_eval.api.task, "tqdm", no_bar), contextlib.redirect_stdout(io.StringIO()):
        yield
