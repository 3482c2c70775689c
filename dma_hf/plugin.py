"""The Transformers plugin: `attn_implementation="dma"`, and `configure` to choose its setting."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from .attention import attend
from .config import DMAConfig
from .masks import padding_ranges
from .policy import is_decode_step

IMPLEMENTATION = "dma"
CONFIG_KEY = "dma_config"
"""Where a model's config keeps its setting: `model.config.dma_config`, a plain dict."""

# keyword arguments by which a model asks for another attention than causal softmax(QK^T)V
_UNSUPPORTED = {
    "softcap": "logit soft-capping",
    "s_aux": "attention sinks",
    "position_bias": "position bias",
    "cache": "the paged cache of continuous batching",
    "cu_seq_lens_q": "packed sequences",
}

Model = TypeVar("Model", bound=nn.Module)


def configure(model: Model, config: DMAConfig) -> Model:
    """Set how `model` computes attention under `attn_implementation="dma"`.

    The setting is kept in `model.config.dma_config` (and in every sub-config a layer reads), so
    `save_pretrained` and `from_pretrained` keep it.

    Args:
        model: a Transformers model.
        config: the setting.

    Returns:
        `model`, to allow chaining.

    Raises:
        TypeError: `config` is no DMAConfig, or `model` has no Transformers config.
    """
    if not isinstance(config, DMAConfig):
        raise TypeError(f"config={config!r} must be a DMAConfig")
    configs = list(_model_configs(model))
    if not configs:
        raise TypeError(f"model is a {type(model).__name__}; accepted is a Transformers model")
    for model_config in configs:
        setattr(model_config, CONFIG_KEY, config.to_dict())
    return model


def _model_configs(model: nn.Module) -> Iterator[PretrainedConfig]:
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig) and id(config) not in seen:
            seen.add(id(config))
            yield config


def model_setting(model_config: PretrainedConfig) -> DMAConfig:
    """The `DMAConfig` a model's config holds; the default where it holds none."""
    fields = getattr(model_config, CONFIG_KEY, None)
    return DMAConfig() if fields is None else _parsed(tuple(sorted(fields.items())))


@lru_cache(maxsize=64)
def _parsed(fields: tuple[tuple[str, Any], ...]) -> DMAConfig:
    # validated once, not once a layer and step
    return DMAConfig.from_dict(dict(fields))


def dma_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, in the form that Transformers' AttentionInterface calls.

    Decode steps go to SDPA (see `policy.is_decode_step`); everything else runs as DMA.

    Args:
        module: the attention layer.
        query: [B, H, M, D]; key: [B, Hkv, N, D]; value: [B, Hkv, N, Dv].
        attention_mask: what `dma_mask` made: None, int32 [B, 2] key ranges, or, for a decode step,
            SDPA's 4-D mask.

    Returns:
        ([B, M, H, Dv], None): there are no attention weights to return.

    Raises:
        NotImplementedError: the layer asks for a feature that dma does not serve; the message names it.
    """
    layer = f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"
    query_length, key_length = query.shape[2], key.shape[2]
    for name, feature in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise _unsupported(f"{layer} uses {feature} ({name})")

    if is_decode_step(query_length, key_length) and not _is_key_ranges(attention_mask):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )

    sliding_window = kwargs.get("sliding_window")
    if sliding_window is not None and key_length > sliding_window:
        raise _unsupported(f"{layer} uses a sliding window (sliding_window={sliding_window})")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if not causal:
        raise _unsupported(f"{layer} is not causal (is_causal=False)")
    if dropout:
        raise _unsupported(f"{layer} uses attention dropout (dropout={dropout}; model.eval() turns it off)")
    if attention_mask is not None and not _is_key_ranges(attention_mask):
        raise _unsupported(
            f"{layer} got a custom attention mask of shape {list(attention_mask.shape)} (attention_mask)"
        )
    out = attend(
        query,
        key,
        value,
        causal=True,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        config=model_setting(module.config),
        key_ranges=attention_mask,
    )
    return out.transpose(1, 2).contiguous(), None


def dma_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one forward pass, in the form that Transformers' AttentionMaskInterface calls.

    Args:
        attention_mask: the user's 2-D padding mask [B, N], True for real tokens.

    Returns:
        None where the mask is plain causal, int32 [B, 2] key ranges where there is padding, and
        SDPA's own mask for a decode step.

    Raises:
        NotImplementedError: any other mask; the message names it.
    """
    if is_decode_step(q_length, kv_length):
        mask: Tensor | None = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
        return mask
    if mask_function is not causal_mask_function:
        raise _unsupported(f"the model asks for {_name_of_mask(mask_function, kwargs)}")
    if q_offset + q_length != kv_offset + kv_length:
        raise _unsupported(
            f"the cache holds {kv_length} slots for {q_offset + q_length} tokens (a static cache)"
        )
    if kv_offset:
        raise _unsupported(f"the cache dropped its first {kv_offset} tokens (a sliding cache)")
    if attention_mask is None:
        return None
    # a graph cannot look at values: traced, every mask becomes ranges, and holes in it go unnoticed
    look = not is_tracing(attention_mask)
    if look and bool(attention_mask.all()):
        return None
    return padding_ranges(attention_mask[:, -kv_length:], check=look)


def _name_of_mask(mask_function: Any, arguments: dict[str, Any]) -> str:
    if mask_function is bidirectional_mask_function:
        return "a bidirectional mask"
    if arguments.get("local_size") is not None:
        return f"a sliding-window or chunked mask (of {arguments['local_size']} tokens)"
    if arguments.get("use_vmap"):
        return "a causal mask with an overlay (or_mask_function or and_mask_function)"
    return (
        "a mask for packed sequences (position_ids that restart; without a cache, torch.compile and CUDA"
        " graphs have to assume them: pass attention_mask or use_cache=True)"
    )


def _is_key_ranges(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype == torch.int32 and mask.ndim == 2


def _unsupported(what: str) -> NotImplementedError:
    return NotImplementedError(
        f'{what}, which attn_implementation="dma" does not support yet; load this model with "sdpa"'
    )


def register() -> None:
    """Make "dma" known to Transformers. Called by `import dma_hf`."""
    AttentionInterface.register(IMPLEMENTATION, dma_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, dma_mask)
