"""Tiny random decoders, one for each kind of attention. They take the fixture `tiny_model`, which builds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

Maker = Callable[..., PreTrainedModel]
Build = Callable[[Maker], PreTrainedModel]

WINDOW = 12
"""Tokens of a sliding window: fewer than a prompt has."""


def llama(tiny_model: Maker) -> PreTrainedModel:
    """Every layer sees all."""
    return tiny_model(LlamaConfig, LlamaForCausalLM, "sdpa")


def mistral(tiny_model: Maker) -> PreTrainedModel:
    """Every layer has a window."""
    return tiny_model(MistralConfig, MistralForCausalLM, "sdpa", sliding_window=WINDOW)


def gemma3(tiny_model: Maker) -> PreTrainedModel:
    """One layer with a window, one without."""
    return tiny_model(
        Gemma3TextConfig, Gemma3ForCausalLM, "sdpa", sliding_window=WINDOW, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip


def gemma2(tiny_model: Maker) -> PreTrainedModel:
    """Soft-capped scores, which SDPA does not have, and every other layer with a window: on eager."""
    return tiny_model(
        Gemma2Config, Gemma2ForCausalLM, "eager", attn_logit_softcapping=2.0, sliding_window=WINDOW,
        query_pre_attn_scalar=16,
    )  # fmt: skip


def gpt_oss(tiny_model: Maker) -> PreTrainedModel:
    """A sink for each head, which SDPA does not have, and every other layer with a window: on eager."""
    model = tiny_model(
        GptOssConfig, GptOssForCausalLM, "eager", num_local_experts=2, num_experts_per_tok=1,
        sliding_window=WINDOW, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    return model
