"""Recall by distance, DMA against SDPA, on a tiny random model (which recalls nothing)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dma_hf_eval.corpora import Corpus, tokenize
from dma_hf_eval.errors import UsageError
from dma_hf_eval.loading import load_model
from dma_hf_eval.recall_by_distance import RecallResult, compare_recall, default_distances, passage_length
from dma_hf_eval.runs import parse_runs

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


def recall(folder: Path, *configs: str, distances: list[int], text: str = TEXT) -> list[RecallResult]:
    loaded = load_model(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    tokens = tokenize(Corpus("fox", text), loaded.tokenizer)
    return compare_recall(
        loaded.model,
        loaded.tokenizer,
        text,
        tokens,
        parse_runs(configs),
        distances=distances,
        samples=1,
    )


def test_every_run_has_both_measures_at_every_distance(tiny_folder: Path) -> None:
    sdpa, exact, mxfp4 = recall(tiny_folder, "low=none,high=none", "low=mxfp4", distances=[64, 400])
    for result in (sdpa, exact, mxfp4):
        summary = result.summary()
        assert list(summary["passkey_accuracy"]) == list(summary["second_copy_perplexity"]) == ["64", "400"]
    assert exact.second_copy_perplexity == pytest.approx(sdpa.second_copy_perplexity, rel=1e-4)
    assert mxfp4.second_copy_perplexity[400] != pytest.approx(sdpa.second_copy_perplexity[400], rel=1e-4)


def test_a_distance_that_does_not_fit_is_named(tiny_folder: Path) -> None:
    with pytest.raises(UsageError, match=r"recall with 'SDPA': .*distance 950"):
        recall(tiny_folder, distances=[60, 950])
    with pytest.raises(UsageError, match="filler has 3 tokens"):
        recall(tiny_folder, distances=[60], text="fox")


@pytest.mark.parametrize(
    ("context", "distances"),
    [
        (4096, [1000, 1500, 2000, 2500, 3000, 3500]),
        (2048, [1000, 1500]),
        (1024, [128, 256, 512]),
    ],
)
def test_default_distances_leave_room_for_a_passage(context: int, distances: list[int]) -> None:
    assert default_distances(context) == distances
    assert passage_length(distances) == min(512, distances[0])
    assert distances[-1] + passage_length(distances) <= context


def test_a_short_context_is_refused() -> None:
    with pytest.raises(UsageError, match="context of 512 tokens is too short"):
        default_distances(512)
