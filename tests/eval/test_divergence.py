"""Loss, KL divergence and top-1 agreement of two logits, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from dma_hf_eval import divergence
from dma_hf_eval.divergence import compare_logits


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(37, 50, generator=generator) * 3
    compared = reference + torch.randn(37, 50, generator=generator)
    return reference, compared, torch.randint(0, 50, (37,), generator=generator)


def test_values_follow_the_definitions(logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    reference, compared, targets = logits
    p, q = reference.double().softmax(-1), compared.double().softmax(-1)
    result = compare_logits(reference, compared, targets)
    torch.testing.assert_close(result.kl.double(), (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-6)
    expected_loss = -q[torch.arange(37), targets].log()
    torch.testing.assert_close(result.loss.double(), expected_loss, rtol=1e-5, atol=1e-6)
    assert result.agree.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    assert 0 < result.agree.sum() < 37


def test_chunks_change_nothing(
    logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare_logits(*logits)
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", 5 * 50)  # five tokens at a time
    chunked = compare_logits(*logits)
    torch.testing.assert_close(chunked.kl, whole.kl)
    torch.testing.assert_close(chunked.loss, whole.loss)
    assert chunked.agree.equal(whole.agree)


def test_equal_logits_have_no_divergence(logits: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    reference, _, targets = logits
    result = compare_logits(reference, reference.clone(), targets)
    assert result.kl.abs().max() == 0
    assert bool(result.agree.all())


def test_impossible_tokens_count_as_zero_not_nan() -> None:
    # A model may mask tokens with -inf: 0 * log(0 / 0) is 0 in a divergence.
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    result = compare_logits(logits, logits, torch.tensor([1]))
    assert result.kl.tolist() == [0.0]


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\[3, 5\] and \[3, 4\]"):
        compare_logits(torch.zeros(3, 5), torch.zeros(3, 4), torch.zeros(3, dtype=torch.long))
