"""The comparison of DMA with SDPA on one text, on a tiny random model."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from dma_hf_eval import perplexity
from dma_hf_eval.attention import attention
from dma_hf_eval.errors import EvalError, UsageError
from dma_hf_eval.failures import Failures
from dma_hf_eval.journal import Journal
from dma_hf_eval.perplexity import RecallTask, RunResult, compare_perplexity, steps
from dma_hf_eval.runs import SDPA, Run, parse_runs
from transformers import PreTrainedModel

from dma_hf import DMAConfig

RECALL = RecallTask(passage=32, distance=100, samples=1)


def compare(
    model: PreTrainedModel, tokens: torch.Tensor, *configs: str, context: int = 512, stride: int = 256
) -> list[RunResult]:
    return compare_perplexity(
        model, tokens, parse_runs(configs), context=context, stride=stride, recall=RECALL
    )


@pytest.mark.parametrize(("context", "stride"), [(1024, 512), (512, 256), (300, 300), (64, 17)])
def test_perplexity_is_that_of_every_token_in_its_window(
    tiny_model: PreTrainedModel, tokens: torch.Tensor, context: int, stride: int
) -> None:
    tokens = tokens[:400]
    (sdpa,) = compare(tiny_model, tokens, context=context, stride=stride)

    # Literally: each token after the one window that scores it, one forward pass per token.
    losses = []
    for target in range(1, len(tokens)):
        start = 0
        while start + context < target:
            start += stride
        with torch.inference_mode():
            logits = tiny_model(tokens[None, start:target]).logits[0, -1].double()
        losses.append(-logits.log_softmax(-1)[tokens[target]].item())
    assert len(torch.cat(sdpa.loss)) == len(losses) == 399
    assert sdpa.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_unquantised_dma_is_sdpa(tiny_model: PreTrainedModel, tokens: torch.Tensor) -> None:
    sdpa, dma = compare(tiny_model, tokens, "low=none,high=none")
    summary = dma.summary(sdpa)
    assert abs(summary["kl_mean"]) < 1e-6
    assert abs(summary["delta_percent"]) < 1e-3
    assert summary["top1_agreement"] > 0.99
    assert summary["recall_perplexity"] == pytest.approx(sdpa.recall_perplexity, rel=1e-4)


def test_fewer_bits_diverge_further(tiny_model: PreTrainedModel, tokens: torch.Tensor) -> None:
    _, mxfp8, mxfp4 = compare(tiny_model, tokens, "low=mxfp8,high=mxfp8", "low=mxfp4,high=mxfp4")
    kl_mxfp8, kl_mxfp4 = torch.cat(mxfp8.kl).mean(), torch.cat(mxfp4.kl).mean()
    assert 1e-6 < kl_mxfp8 < kl_mxfp4
    assert torch.cat(mxfp4.agree).float().mean() < 1


def test_the_reference_is_sdpa_itself(tiny_model: PreTrainedModel, tokens: torch.Tensor) -> None:
    (sdpa,) = compare(tiny_model, tokens)
    summary = sdpa.summary(sdpa)
    assert (summary["name"], summary["config"]) == ("SDPA", None)
    assert (summary["delta_percent"], summary["kl_mean"], summary["top1_agreement"]) == (0, 0, 1)
    assert summary["seconds"] > 0
    with pytest.raises(ValueError, match="first of runs must be SDPA"):
        compare_perplexity(tiny_model, tokens, [], context=64, stride=64, recall=RECALL)


def test_every_step_is_reported(tiny_model: PreTrainedModel, tokens: torch.Tensor) -> None:
    done: list[int] = []
    runs = [SDPA, *parse_runs(["paper"])[1:]]
    sizes = {"context": 256, "stride": 128, "recall": RECALL}
    compare_perplexity(tiny_model, tokens, runs, advance=done.append, **sizes)
    assert sum(done) == steps(len(tokens), len(runs), **sizes) == 2 * (5 + 1)


def test_logits_that_are_not_finite_end_the_run(tiny_model: PreTrainedModel, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        tiny_model.lm_head.weight[3] = torch.nan
    with pytest.raises(EvalError, match="run 'SDPA': the model's logits are not finite"):
        compare(tiny_model, tokens)


def test_what_dma_refuses_is_named(
    tiny_model: PreTrainedModel, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: PreTrainedModel, config: DMAConfig | None) -> AbstractContextManager[PreTrainedModel]:
        if config is not None:
            raise NotImplementedError("LlamaAttention does what dma does not serve\nand more")
        return attention(model, config)

    monkeypatch.setattr(perplexity, "attention", refuse)
    with pytest.raises(UsageError, match=r"--config 'paper': .* does not serve$"):
        compare(tiny_model, tokens, "paper")


@pytest.mark.parametrize(
    ("context", "task"),
    [(4096, RecallTask(512, 1900, 4)), (1024, RecallTask(256, 768, 4)), (64, RecallTask(16, 48, 4))],
)
def test_the_recall_task_fits_the_context(context: int, task: RecallTask) -> None:
    assert RecallTask.fitting(context) == task
    assert task.passage <= task.distance <= context - task.passage


def test_the_interval_is_that_of_the_paired_losses(tiny_model: PreTrainedModel, tokens: torch.Tensor) -> None:
    sdpa, mxfp8 = compare(tiny_model, tokens, "low=mxfp8,high=mxfp8")
    summary = mxfp8.summary(sdpa)
    low, high = summary["delta_percent_interval"]
    assert low < summary["delta_percent"] < high
    # Far narrower than the noise of the losses themselves: both runs see the same tokens.
    losses = torch.cat(sdpa.loss)
    unpaired = 100 * 2 * 1.96 * losses.std().item() / len(losses) ** 0.5
    assert high - low < unpaired / 3
    assert sdpa.summary(sdpa)["delta_percent_interval"] == [0, 0]


def test_by_position_partitions_the_scored_tokens(tiny_model: PreTrainedModel, tokens: torch.Tensor) -> None:
    sdpa, mxfp4 = compare(tiny_model, tokens, "low=mxfp4,high=mxfp4", context=512, stride=256)
    bins = mxfp4.summary(sdpa)["by_position"]
    # Of 699 tokens the first window scores positions 1 to 512, the next one 257 to 443.
    assert [(part["first"], part["last"], part["tokens"]) for part in bins] == [
        (1, 128, 128),
        (129, 256, 128),
        (257, 512, 256 + 187),
    ]
    for name, total in (("kl", mxfp4.kl), ("loss", mxfp4.loss)):
        mean = sum(part[name] * part["tokens"] for part in bins) / 699
        assert mean == pytest.approx(torch.cat(total).mean().item(), rel=1e-5)
    delta = sum(part["delta_loss"] * part["tokens"] for part in bins) / 699
    assert delta == pytest.approx(math.log(mxfp4.perplexity / sdpa.perplexity), rel=1e-4)


def test_a_single_position_differs_where_dma_starts_to_quantise(
    tiny_model: PreTrainedModel, tokens: torch.Tensor
) -> None:
    sdpa, low = compare(tiny_model, tokens, "low=mxfp4,high=none,diagonal=128,sink=0")
    near, *far = low.by_position(sdpa)
    assert abs(near["kl"]) < 1e-6  # everything is on the diagonal
    assert all(part["kl"] > 1e-4 for part in far)


class Killed(BaseException):
    """What ends a process, as far as a test can tell."""


def test_a_killed_comparison_continues_and_gives_the_same_result(
    tiny_model: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path
) -> None:
    runs = parse_runs(["low=mxfp4", "paper"])
    sizes = {"context": 128, "stride": 128, "recall": RECALL}
    passes: list[int] = []
    tiny_model.register_forward_hook(lambda *_: passes.append(1))
    whole = compare_perplexity(tiny_model, tokens, runs, **sizes)
    needed = len(passes)

    def killed_after(steps: int) -> Callable[[int], None]:
        left = iter(range(steps))

        def advance(_: int) -> None:
            if next(left, None) is None:
                raise Killed

        return advance

    passes.clear()
    with pytest.raises(Killed):
        compare_perplexity(
            tiny_model, tokens, runs, journal=Journal(tmp_path, "x"), advance=killed_after(7), **sizes
        )
    continued = compare_perplexity(tiny_model, tokens, runs, journal=Journal(tmp_path, "x"), **sizes)
    assert needed <= len(passes) <= needed + 1  # at most SDPA's window anew, as the others' reference
    for before, after in zip(whole, continued, strict=True):
        assert torch.equal(torch.cat(before.loss), torch.cat(after.loss))
        assert torch.equal(torch.cat(before.kl), torch.cat(after.kl))
        assert before.recall_perplexity == after.recall_perplexity

    passes.clear()
    again = compare_perplexity(tiny_model, tokens, runs, journal=Journal(tmp_path, "x"), **sizes)
    assert passes == []
    assert [result.seconds for result in again] == [result.seconds for result in continued]


def test_a_run_without_memory_leaves_the_others_alone(
    tiny_model: PreTrainedModel, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = perplexity._logits

    def short_of_memory(model: PreTrainedModel, run: Run, *rest: Any) -> Any:
        if run.name == "paper":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return genuine(model, run, *rest)

    monkeypatch.setattr(perplexity, "_logits", short_of_memory)
    failures = Failures()
    results = compare_perplexity(
        tiny_model,
        tokens,
        parse_runs(["paper", "low=mxfp4"]),
        context=512,
        stride=512,
        recall=RECALL,
        failures=failures,
    )
    assert [result.run.name for result in results] == ["SDPA", "low=mxfp4"]
    assert [(failed["name"], failed["error"][:13]) for failed in failures.describe()] == [
        ("paper", "out of memory")
    ]
