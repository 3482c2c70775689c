"""The attention a loaded model runs with, switched in place: the baseline, or DMA in one of its settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

import dma_hf
from dma_hf import DMAConfig
from dma_hf.plugin import CONFIG_KEY, IMPLEMENTATION


def baseline(model: PreTrainedModel) -> str:
    """What DMA is measured against: "sdpa", or "eager" for a model that SDPA does not serve (GPT-OSS)."""
    return "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"


@contextmanager
def attention(model: PreTrainedModel, config: DMAConfig | None) -> Iterator[PreTrainedModel]:
    """Runs ``model`` with DMA as ``config`` says, or with its baseline (None), and then as it was before.

    Raises:
        ValueError: if the model cannot run with that attention.
        NotImplementedError: if DMA does not support the model.
    """
    implementation = model.config._attn_implementation
    # configure() writes into every sub-config, so that is where the old setting must return to.
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(c, getattr(c, CONFIG_KEY, None)) for c in configs]
    try:
        model.set_attn_implementation(baseline(model) if config is None else IMPLEMENTATION)
        if config is not None:
            dma_hf.configure(model, config)
        yield model
    finally:
        model.set_attn_implementation(implementation)
        for model_config, setting in before:
            if setting is not None:
                setattr(model_config, CONFIG_KEY, setting)
            elif hasattr(model_config, CONFIG_KEY):
                delattr(model_config, CONFIG_KEY)
