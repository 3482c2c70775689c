"""Shared fixtures: deterministic property tests, tiny random models, and the `gpu` marker."""

from __future__ import annotations

import os

# no test may look for anything on a hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # before anything imports Triton: the kernel tests run its kernels on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import dma_hf  # noqa: F401  (registers "dma")

# the tensors are tiny: threads would only wait for one another, for minutes on a busy machine
torch.set_num_threads(1)

hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("deterministic")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # logits far from uniform, so that greedy choices are never near a tie
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
"""Sizes of a decoder with grouped-query attention, small enough to build in milliseconds."""


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A random two-layer Llama with grouped-query attention, in float32 and eval mode, on SDPA."""
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(LlamaConfig(**TINY), attn_implementation="sdpa").eval()


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Makes any tiny decoder: `tiny_model(MistralConfig, MistralForCausalLM, "dma", sliding_window=8)`."""

    def make(config_class: type, model_class: type, attention: str, **options: object) -> PreTrainedModel:
        torch.manual_seed(0)
        config = config_class(**{**TINY, **options})
        return model_class._from_config(config, attn_implementation=attention).eval()

    return make


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """Random token ids: `tokens(batch, length)`, none of them the padding token 0."""

    def make(batch: int, length: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(2, TINY["vocab_size"], (batch, length), generator=generator)

    return make


@pytest.fixture
def uninitialized_memory_is_nan() -> Iterator[None]:
    """Memory that nothing was written to holds NaN (integers: their largest value)."""
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory is on
    yield
    torch.use_deterministic_algorithms(False)
