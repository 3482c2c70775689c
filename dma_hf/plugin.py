"""The Transformers plugin: `attn_implementation="dma"`, and `configure` to choose its setting."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

from .attention import attend
from .config import DMAConfig
from .formats import NONE
from .mask_functions import Pattern, read_mask_function
from .masks import has_holes, padding_ranges, query_ranges
from .memo import memoized
from .modifiers import Modifiers
from .policy import is_decode_step, warn_fallback, why_sdpa
from .ranges_mask import RangesMask, dense_mask

IMPLEMENTATION = "dma"
CONFIG_KEY = "dma_config"
"""Where a model's config keeps its setting: `model.config.dma_config`, a plain dict."""

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


def model_setting(model_config: PretrainedConfig | None) -> DMAConfig:
    """The `DMAConfig` a model's config holds; the preset "auto" where it holds none."""
    fields = getattr(model_config, CONFIG_KEY, None)
    return DMAConfig.preset("auto") if fields is None else _parsed(_hashable(fields))


def _hashable(fields: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (name, _hashable(value) if isinstance(value, dict) else value)
        for name, value in sorted(fields.items())
    )


@memoized
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

    Decode steps go to SDPA (see `policy.is_decode_step`), and so do calls that dma does not serve, with
    one `DMAFallbackWarning` for each reason (see `policy.why_sdpa`). Everything else runs as DMA.
    Cross-attention has no diagonal; all its tiles are in the high format.

    Args:
        module: the attention layer.
        query: [B, H, M, D]; key: [B, Hkv, N, D]; value: [B, Hkv, N, Dv].
        attention_mask: what `dma_mask` made, or a mask of the model's own as SDPA takes it, bool or
            additive.
        kwargs: `softcap`, `s_aux` (attention sinks, [H]) and `position_bias` ([B or 1, H, M, N]) change
            the result; what else models pass does not.

    Returns:
        ([B, M, H, Dv], None): there are no attention weights to return.
    """
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if isinstance(attention_mask, RangesMask) and attention_mask.ranges is None:
        attention_mask = attention_mask.dense()  # the model wrote into it
    query_length, key_length = query.shape[2], key.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    # as in SDPA: a mask says all, and one query sees every key
    causal = bool(causal) and attention_mask is None and query_length > 1

    reason = why_sdpa(
        query.shape[-1], value.shape[-1], query.device, dropout, kwargs.get("cache") is not None
    )
    decode = is_decode_step(query_length, key_length)
    plain = softcap is None and sinks is None  # SDPA has neither
    if plain and (decode or reason is not None):
        if reason is not None and not decode:
            warn_fallback(f"{_name(module)} runs on SDPA: {reason}")
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            _without_ranges(attention_mask, key_length),
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    if dropout:
        raise NotImplementedError(
            f"{_name(module)} uses attention dropout (dropout={dropout}) with softcap or sinks, which neither"
            " dma nor SDPA serves; model.eval() turns dropout off"
        )

    position_bias = kwargs.get("position_bias")
    if causal and query_length < key_length:
        # as in SDPA: the prefill of a static cache, whose last keys are not written yet
        key, value = key[:, :, :query_length], value[:, :, :query_length]
        position_bias = None if position_bias is None else position_bias[..., :query_length]
    config = _setting(module, causal, query_length, key_length, decode)
    out = attend(
        *_same_batch(query, key, value),
        causal=causal,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        config=config,
        modifiers=Modifiers(
            *_masks(attention_mask, position_bias, query, key),
            softcap=softcap,
            sinks=None if sinks is None else sinks.flatten(),
        ),
    )
    return out.transpose(1, 2).contiguous(), None


def _name(module: nn.Module) -> str:
    return f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"


def _setting(module: nn.Module, causal: bool, query_length: int, key_length: int, decode: bool) -> DMAConfig:
    config = model_setting(getattr(module, "config", None)).for_layer(getattr(module, "layer_idx", None))
    if decode:
        # reads the unquantised cache once, as SDPA would
        return replace(config, low=NONE, high=NONE)
    if _is_cross_attention(module, causal, query_length, key_length):
        return replace(config, low=config.high)
    return config


def _is_cross_attention(module: nn.Module, causal: bool, query_length: int, key_length: int) -> bool:
    """Whether keys are of another sequence than queries, so that positions tell nothing."""
    if causal or getattr(module, "is_causal", True):
        return False
    known = getattr(module, "is_cross_attention", None)
    if isinstance(known, bool):
        return known
    return query_length != key_length or bool(getattr(module, "is_decoder", False))


def _same_batch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """SDPA broadcasts the batch (learned queries); the kernels want it whole, and dense last dimensions."""
    batch = max(tensor.shape[0] for tensor in tensors)
    expanded = (tensor.expand(batch, -1, -1, -1) for tensor in tensors)
    return tuple(tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in expanded)


def _masks(
    attention_mask: Tensor | None, position_bias: Tensor | None, query: Tensor, key: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """`Modifiers.query_ranges` and `Modifiers.mask`."""
    ranges = _ranges_of(attention_mask)
    mask = None if ranges is not None else attention_mask
    if mask is not None:
        while mask.ndim < 4:
            mask = mask.unsqueeze(0)
        if mask.dtype != torch.bool and not mask.is_floating_point():
            mask = mask.to(query.dtype)
        if mask.shape[1] == 1 and mask.stride(1):
            mask = mask[:, :1]
        mask = mask.expand(-1, -1, query.shape[2], key.shape[2])
    if position_bias is not None:
        if mask is None:
            mask = position_bias
        elif mask.dtype == torch.bool:
            mask = torch.where(mask, position_bias, torch.finfo(position_bias.dtype).min)
        else:
            mask = mask + position_bias
    if ranges is not None and ranges.shape[0] != query.shape[0]:
        ranges = ranges.expand(max(query.shape[0], key.shape[0]), -1, -1)
    return ranges, mask


def _ranges_of(mask: Tensor | None) -> Tensor | None:
    """Query ranges [B, M, 4], if that is what a mask is."""
    if isinstance(mask, RangesMask):
        return mask.ranges
    # traced graphs hold no tensor subclasses: there the ranges travel as int32 [B, 1, M, 4]
    return mask[:, 0] if mask is not None and mask.dtype == torch.int32 and mask.ndim == 4 else None


def _without_ranges(mask: Tensor | None, key_length: int) -> Tensor | None:
    ranges = _ranges_of(mask)
    return mask if ranges is None else dense_mask(ranges, key_length)


def dma_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one forward pass, in the form that Transformers' AttentionMaskInterface calls.

    Args:
        attention_mask: the user's 2-D padding mask [B, N], True for real tokens.

    Returns:
        None where attention is plain causal or plain bidirectional; query ranges (`RangesMask`; int32
        [B, 1, M, 4] in a traced graph) for padding, packed sequences, sliding windows, chunks and static
        caches; SDPA's own bool mask [B, 1, M, N] (or eager's, for a model without SDPA) for all others
        and for decode steps.
    """
    tracing = is_tracing(attention_mask)
    pattern = None if is_decode_step(q_length, kv_length) else _readable(mask_function, tracing)
    padding = None
    if pattern is not None and attention_mask is not None:
        # as in SDPA: of a mask with more rows than the batch (Musicgen: one a codebook), the first count
        padding = _padding(attention_mask[:batch_size], kv_offset + kv_length)
        # a graph cannot look at values: traced, every mask becomes ranges, and holes in it go unnoticed
        if not tracing and bool(padding.all()):
            padding = None
        elif not tracing and has_holes(padding):
            pattern = None
    for_eager = type(kwargs.get("config")) in _written_for_eager
    if pattern is None:
        make_mask = eager_mask if for_eager else sdpa_mask
        mask: Tensor | None = make_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            device=device,
            **kwargs,
        )
        return mask

    pattern = pattern.limits(kv_length, kv_offset)
    if for_eager:
        allow_is_causal_skip = allow_is_bidirectional_skip = False
    looks_like = kwargs.get("dtype", torch.float32) if for_eager else torch.bool
    if padding is None and pattern == Pattern(causal=True) and allow_is_causal_skip:
        aligned = isinstance(q_offset, int) and q_offset == kv_offset == 0 and q_length == kv_length
        if aligned:
            return None
    if padding is None and pattern == Pattern() and allow_is_bidirectional_skip:
        return None
    ranges = query_ranges(
        q_length,
        kv_length,
        causal=pattern.causal,
        query_offset=q_offset,
        key_offset=kv_offset,
        left=pattern.left,
        right=pattern.right,
        chunk=pattern.chunk,
        key_ranges=None if padding is None else padding_ranges(padding),
        sequence_ids=pattern.sequence_ids,
        batch=batch_size,
        device=device,
    )
    return ranges[:, None] if tracing else RangesMask(ranges, kv_length, looks_like)


def _readable(mask_function: Any, tracing: bool) -> Pattern | None:
    if not tracing:
        return read_mask_function(mask_function)
    # a graph cannot look into closures; a plain causal mask is known by its name
    return Pattern(causal=True) if mask_function is causal_mask_function else None


def _padding(attention_mask: Tensor, length: int) -> Tensor:
    """The padding mask over all `length` positions: what it does not reach is not written yet."""
    missing = length - attention_mask.shape[-1]
    return torch.nn.functional.pad(attention_mask, (0, missing)) if missing else attention_mask


def register() -> None:
    """Make "dma" known to Transformers. Called by `import dma_hf`."""
    AttentionInterface.register(IMPLEMENTATION, dma_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, dma_mask)
    if not hasattr(PreTrainedModel.get_correct_attn_implementation, "__wrapped__"):
        PreTrainedModel.get_correct_attn_implementation = _hand_over_models(
            PreTrainedModel.get_correct_attn_implementation
        )


_written_for_eager: set[type] = set()
"""Configs of models that Transformers has no SDPA for: their code relies on a mask that is never None."""


def _hand_over_models(check: Any) -> Any:
    """Transformers' check of a requested implementation, extended by models that cannot have "dma".

    Models with attention code of their own never ask the AttentionInterface, and models that claim
    neither SDPA nor the interface do so with masks and arguments of their own. With the name of a
    registered implementation they fail when built, or add its mask to their scores as if it were
    numbers; so they get SDPA, or what they have instead of it.
    """

    @functools.wraps(check)
    def checked(self: Any, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if requested_attention != IMPLEMENTATION:
            return str(check(self, requested_attention, *args, **kwargs))
        serves = self._supports_sdpa or self._supports_attention_backend
        if not (serves and self._can_set_attn_implementation()):
            implementation = str(check(self, None, *args, **kwargs))
            warn_fallback(
                f"{type(self).__name__} runs on {implementation}: its attention does not go through"
                " Transformers' AttentionInterface"
            )
            return implementation
        if not self._supports_sdpa:
            _written_for_eager.add(type(self.config))
        _complete_class_tables(type(self))
        return str(check(self, requested_attention, *args, **kwargs))

    return checked


def _complete_class_tables(model_class: type) -> None:
    """Let layers that are looked up by the implementation's name be found under "dma": SDPA's."""
    for name, table in vars(sys.modules[model_class.__module__]).items():
        if name.endswith("_ATTENTION_CLASSES") and isinstance(table, dict) and "sdpa" in table:
            if IMPLEMENTATION not in table:
                warn_fallback(
                    f"{table['sdpa'].__name__} runs on SDPA: it does not go through Transformers'"
                    " AttentionInterface"
                )
            table.setdefault(IMPLEMENTATION, table["sdpa"])
