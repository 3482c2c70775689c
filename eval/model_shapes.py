"""Public models by their shape alone: exact configurations, random weights, nothing downloaded.

Speed and memory depend on a model's shape and not on what it has learned, so these stand in for models
of which no weights are at hand. The values are those of each model's published ``config.json``; the
tests check them by the parameter counts that the publishers state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.llama import LlamaConfig
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig

from .errors import UsageError


@dataclass(frozen=True)
class ModelShape:
    """One public model.

    Attributes:
        source: its hub id, where the values are from.
        config: builds its configuration; takes the fields of ``values``, and overrides of them.
        values: every field that differs from the configuration class's defaults, or that counts for speed.
    """

    source: str
    config: type[PreTrainedConfig]
    values: dict[str, Any]


SHAPES: dict[str, ModelShape] = {
    "llama-3.1-8b": ModelShape(
        "meta-llama/Llama-3.1-8B",
        LlamaConfig,
        {
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "tie_word_embeddings": False,
        },
    ),
    "qwen3-8b": ModelShape(
        "Qwen/Qwen3-8B",
        Qwen3Config,
        {
            "vocab_size": 151_936,
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40_960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "tie_word_embeddings": False,
        },
    ),
    "qwen3-30b-a3b": ModelShape(
        "Qwen/Qwen3-30B-A3B",
        Qwen3MoeConfig,
        {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "max_position_embeddings": 40_960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "tie_word_embeddings": False,
        },
    ),
    # the text model; five layers of a 1,024-token window, then one of full attention
    "gemma-3-12b": ModelShape(
        "google/gemma-3-12b-pt",
        Gemma3TextConfig,
        {
            "vocab_size": 262_208,
            "hidden_size": 3840,
            "intermediate_size": 15_360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-6,
            "query_pre_attn_scalar": 256,
            "sliding_window": 1024,
            "sliding_window_pattern": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
            "tie_word_embeddings": True,
        },
    ),
    # windows of 128 tokens and full attention in turn, with sink logits
    "gpt-oss-20b": ModelShape(
        "openai/gpt-oss-20b",
        GptOssConfig,
        {
            "vocab_size": 201_088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150_000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "tie_word_embeddings": False,
        },
    ),
}


def shape_config(name: str, layers: int | None = None) -> PreTrainedConfig:
    """The configuration of a shape in ``SHAPES``, cut to its first ``layers`` layers where that is given.

    Raises:
        UsageError: if there is no such shape, or it has fewer layers.
    """
    if name not in SHAPES:
        raise UsageError(f"--shape must be one of {', '.join(SHAPES)}, got '{name}'")
    shape = SHAPES[name]
    depth = shape.values["num_hidden_layers"]
    if layers is not None and not 1 <= layers <= depth:
        raise UsageError(f"--layers must be from 1 to the {depth} of {name}, got {layers}")
    return shape.config(**{**shape.values, "num_hidden_layers": layers or depth})


def build_model(
    name: str, *, layers: int | None, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """A shape as a model in random weights, made where it will run, in evaluation mode.

    Raises:
        UsageError: as `shape_config` does.
        torch.OutOfMemoryError: if the device cannot hold it.
    """
    config = shape_config(name, layers)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()
