"""Switching the attention of a loaded model, and back."""

from __future__ import annotations

import pytest
import torch
from dma_hf_eval.attention import attention
from transformers import PreTrainedModel

import dma_hf
from dma_hf import DMAConfig


def test_the_attention_changes_and_returns(tiny_model: PreTrainedModel, tokens: torch.Tensor) -> None:
    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return tiny_model(tokens[None]).logits

    before = logits()
    with attention(tiny_model, DMAConfig(low="mxfp4", high="mxfp4")):
        assert tiny_model.config._attn_implementation == "dma"
        changed = logits()
    assert tiny_model.config._attn_implementation == "sdpa"
    assert not hasattr(tiny_model.config, "dma_config")
    assert (changed - before).abs().max() > 1e-3
    assert logits().equal(before)


def test_a_setting_of_the_model_returns(tiny_model: PreTrainedModel) -> None:
    tiny_model.set_attn_implementation("dma")
    dma_hf.configure(tiny_model, DMAConfig(low="int8"))
    with attention(tiny_model, DMAConfig(low="mxfp4")):
        assert tiny_model.config.dma_config["low"] == "mxfp4"
    with attention(tiny_model, None):
        assert tiny_model.config._attn_implementation == "sdpa"
    assert tiny_model.config._attn_implementation == "dma"
    assert tiny_model.config.dma_config["low"] == "int8"


def test_everything_returns_after_an_error(tiny_model: PreTrainedModel) -> None:
    with pytest.raises(KeyboardInterrupt), attention(tiny_model, DMAConfig()):
        raise KeyboardInterrupt
    assert tiny_model.config._attn_implementation == "sdpa"
