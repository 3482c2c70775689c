"""The comparison of DMA with SDPA on one text, on a tiny random model."""

from __future__ import annotations

import math

import pytest
import torch
from dma_hf_eval.errors import EvalError, UsageError
from dma_hf_eval.perplexity import RecallTask, RunResult, compare_perplexity, steps
from dma_hf_eval.runs import SDPA, parse_runs
from transformers import PreTrainedModel

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


def test_what_dma_refuses_is_named(tiny_model: PreTrainedModel, tokens: torch.Tensor) -> None:
    for layer in tiny_model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(UsageError, match=r"--config 'paper': .*not causal"):
        compare(tiny_model, tokens, "paper")


@pytest.mark.parametrize(
    ("context", "task"),
    [(4096, RecallTask(512, 1900, 4)), (1024, RecallTask(256, 768, 4)), (64, RecallTask(16, 48, 4))],
)
def test_the_recall_task_fits_the_context(context: int, task: RecallTask) -> None:
    assert RecallTask.fitting(context) == task
    assert task.passage <= task.distance <= context - task.passage
