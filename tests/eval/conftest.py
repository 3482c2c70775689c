"""A language model small enough for tests: random weights, one token per byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TINY_CONTEXT = 1024


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and its tokenizer, as ``save_pretrained`` writes them."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=TINY_CONTEXT,
        # Large enough that attention, and what DMA does to it, shows in the logits.
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(tiny_folder: Path) -> PreTrainedModel:
    """The tiny model with SDPA, fresh for every test."""
    return AutoModelForCausalLM.from_pretrained(
        tiny_folder, attn_implementation="sdpa", dtype=torch.float32
    ).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    """A random text of 700 tokens."""
    return torch.randint(0, 256, (700,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def text_path(tmp_path: Path) -> Path:
    """A text file of 3,000 characters (bytes, and so tokens)."""
    path = tmp_path / "text.txt"
    path.write_text(("The quick brown fox jumps over the lazy dog. " * 70)[:3000], encoding="utf-8")
    return path
