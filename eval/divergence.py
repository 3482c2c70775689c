"""How far one model output is from another, token by token: loss, KL divergence, top-1 agreement.

Logits come in whatever dtype the model uses and are compared in float32, a chunk of tokens at a
time, so that a vocabulary of 100,000s adds little memory to the logits themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 25  # logits of one float32 chunk: 128 MiB


@dataclass(frozen=True)
class Comparison:
    """Per scored token, on the CPU in float32 (``agree``: bool), each of shape ``[tokens]``."""

    loss: Tensor
    """Negative log likelihood of the target under the compared logits, in nats."""
    kl: Tensor
    """KL(reference || compared) of the next-token distributions, in nats."""
    agree: Tensor
    """Whether both give the same token the highest probability."""


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return (slice(start, start + size) for start in range(0, tokens, size))


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood in nats of ``targets`` [tokens] under ``logits`` [tokens, vocabulary]."""
    losses = [
        torch.nn.functional.cross_entropy(logits[part].float(), targets[part], reduction="none")
        for part in _chunks(*logits.shape)
    ]
    return torch.cat(losses).cpu()


def compare_logits(reference: Tensor, compared: Tensor, targets: Tensor) -> Comparison:
    """Compares two logits [tokens, vocabulary] of the same tokens, whose true values are ``targets``.

    Raises:
        ValueError: if the shapes differ.
    """
    if reference.shape != compared.shape:
        raise ValueError(
            f"both logits must have one shape, got {list(reference.shape)} and {list(compared.shape)}"
        )
    loss, kl, agree = [], [], []
    for part in _chunks(*reference.shape):
        log_p = reference[part].float().log_softmax(-1)
        log_q = compared[part].float().log_softmax(-1)
        loss.append(-log_q.gather(-1, targets[part, None]).squeeze(-1))
        agree.append(log_p.argmax(-1) == log_q.argmax(-1))
        terms = log_p.exp() * (log_p - log_q)
        # 0 log 0 is 0: a model may rule tokens out with logits of -inf.
        kl.append(torch.where(log_p == -torch.inf, 0.0, terms).sum(-1))
    return Comparison(torch.cat(loss).cpu(), torch.cat(kl).cpu(), torch.cat(agree).cpu())
