"""The smallest config of any model type: its class's defaults, every field shrunk by what its name says.

Nothing here knows a model, but for the few facts in `PATCHES` that cannot be read off a config. Layers
are cut to one of each kind; widths and heads all become the same few numbers, so that what has to be
equal stays equal; sub-configs shrink in the same way.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

WIDTH = 64
HEADS = 4
HEAD_DIM = WIDTH // HEADS
VOCABULARY = 128
FIRST_SPECIAL_TOKEN = 96
"""Ids from here on are kept for special tokens; random text has smaller ones."""
WINDOW = 8
"""Sliding windows and chunks, in tokens: well below the length of a text, so that they cut something off."""
POSITIONS = 256
PATCHES_PER_SIDE = 6
"""Of an image."""

PATCHES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},  # by default no layer of this hybrid is one of attention
    "deepseek_v2": {"num_experts_per_tok": 2},  # None by default, which its router does not take
    "diffusion_gemma_text": {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": WIDTH,
    },  # the same
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},  # the same
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}},  # a field that its class does not declare
    "emu3": {"vocabulary_map": {"<image>": 100, "<|extra_200|>": 101}},  # part of the checkpoint
    "autoformer": {"prediction_length": 8},  # None by default, and required
    "informer": {"prediction_length": 8},
    "time_series_transformer": {"prediction_length": 8},
    "xmod": {"default_language": "en_XX"},
    "chameleon": {"vocabulary_map": {"<image>": 100}},  # part of the checkpoint
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "deepseek_ocr2_text": {  # None by default
        "num_hidden_layers": 2,
        "mlp_layer_types": ["dense", "sparse"],
        "num_experts_per_tok": 2,
    },
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},  # of the tokenizer
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16},  # 8 heads
    "gemma3": {"mm_tokens_per_image": 4},  # of 36 patches
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]},  # all "mamba"
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},  # None by default
    "longcat_flash": {"head_dim": HEAD_DIM // 2},  # here the name of the rotary part of a head
    "mamba2": {"num_heads": 8},  # 8 heads of 16 are twice the width
    "sam3_lite_text_text_model": {"num_hidden_layers": 3},  # its first and last layers have no attention
    "zamba": {  # it shares a layer of attention, so that it needs two; of twice the width
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * HEAD_DIM,
    },
    "qwen4_exp_text": {  # None by default, which its sparse attention does not take
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
}
"""Fields, by model type, that generation cannot get right. Each line says why."""

_NOT_LAYERS = r"num_feat_extract_layers|.*(conv|adapter|residual|extract|window|shared)_layers|.*head_depth"

Rule = tuple[str, str, Callable[[int, "_Scope"], int]]


@dataclasses.dataclass
class _Scope:
    """What the shrinking of one config needs to know of it."""

    default: PretrainedConfig
    layers: int
    special_tokens: dict[int, int]

    def number(self, *names: str) -> int | None:
        values = (getattr(self.default, name, None) for name in names)
        return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


def _special(value: int, scope: _Scope) -> int:
    if value < FIRST_SPECIAL_TOKEN:
        return value
    known = scope.special_tokens
    return known.setdefault(value, VOCABULARY - 1 - len(known) % (VOCABULARY - FIRST_SPECIAL_TOKEN))


def _kv_heads(value: int, scope: _Scope) -> int:
    heads = scope.number("num_attention_heads", "num_heads", "n_heads", "n_head") or value
    return 1 if value == 1 else HEADS if value >= heads else HEADS // 2


def _image_size(value: int, scope: _Scope) -> int:
    patch = scope.number("patch_size") or 16
    return min(value, PATCHES_PER_SIDE * max(patch, 16) // patch * patch)


def _at_most(limit: int) -> Callable[[int, _Scope], int]:
    return lambda value, scope: min(value, limit)


# (group, what the name of the field must match as a whole, its new value), the first match counts.
# Groups are what a retry gives up one at a time.
RULES: tuple[Rule, ...] = (
    ("tokens", r".*(token|bos|eos|pad)_(id|index)|.*_token_\w*_id", _special),
    ("tokens", r"type_vocab_size", lambda value, scope: value),
    ("tokens", r"\w*vocab\w*|num_embeddings|codebook_size", _at_most(VOCABULARY)),
    ("layers", _NOT_LAYERS, lambda value, scope: value),
    (
        "layers",
        r"(\w+_)?(n_?layers?|layers|num_layers|num_hidden_layers|depth)",
        lambda value, scope: min(value, scope.layers),
    ),
    ("layers", r"first_k_dense_replace|num_dense_layers|max_window_layers", _at_most(1)),
    ("layers", r"\w*layer_offset", _at_most(1)),
    ("layers", r"num_nextn_predict_layers|num_mtp_layers", _at_most(0)),
    ("layers", r"\w*(pattern|interval|period|frequency|freq|sparse_step|every_n_layers)", _at_most(2)),
    ("experts", r"num_experts_per_tok|moe_top_?k|top_k_experts|moe_k|num_selected_experts", _at_most(2)),
    ("experts", r"topk_group", _at_most(1)),
    ("experts", r"n_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", _at_most(2)),
    ("experts", r"\w*experts", _at_most(4)),
    ("heads", r"\w*(key_value|kv)_heads|n_kv_heads?", _kv_heads),
    ("heads", r"mamba_n(um)?_heads", lambda value, scope: 8),
    ("heads", r"\w*(heads|n_head)", lambda value, scope: min(value, HEADS)),
    ("heads", r"qk_rope_head_dim|rotary_dim", _at_most(HEAD_DIM // 2)),
    ("heads", r"qk_head_dim", lambda value, scope: HEAD_DIM + HEAD_DIM // 2),
    ("heads", r"\w*(head_dim|head_size|head_width|d_kv|dim_head|d_head)", _at_most(HEAD_DIM)),
    ("positions", r"\w*(max\w*positions?|max_position_embeddings|n_positions|n_ctx)", _at_most(POSITIONS)),
    (
        "windows",
        r"sliding_window(_size)?|attention_window|attention_chunk_size|local_attention|window_len",
        _at_most(WINDOW),
    ),
    ("images", r"(\w*_)?(image|img|crop|input|pretrain_image)_size", _image_size),
    ("widths", r"\w*rank", _at_most(HEAD_DIM)),
    ("widths", r"base_channels|upsample_groups", _at_most(WIDTH)),
    (
        "widths",
        r"\w*(kernel|patch|group|window|chunk|block|batch|stride|pool|type)\w*_(size|dim)",
        lambda value, scope: value,
    ),
    (
        "widths",
        r"\w*(hidden_size|embed_dim|embedding_size|embedding_dim|intermediate_size|d_model|d_ff|n_embd|n_inner"
        r"|ffn_dim|ffn_size|hidden_dim|mlp_dim|proj_dim|projection_dim|projector_dim|width|feedforward_dim"
        r"|ffn_hidden_size|\w_dim|_size|dim|dim_feedforward)",
        _at_most(WIDTH),
    ),
)

DERIVED = {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS, "image_token_index": VOCABULARY - 20}
"""What most models derive, or find in a checkpoint, where it is None by default."""

_LIKELY_VALUES: tuple[tuple[str, Any], ...] = (
    (r"\w*(dropout|_rate)\w*", 0.0),
    (r"initializer_range", 0.02),
    (r"\w*heads", HEADS),
    (r"\w*layers", 2),
    (r"\w*(size|dim)", WIDTH),
    (r"\w*_token_id", 0),
)

GROUPS = (*dict.fromkeys(rule[0] for rule in RULES), "stages", "rope")
"""What `tiny_config` can leave out."""
_COMPILED = [(group, re.compile(pattern), new) for group, pattern, new in RULES]
_LAYER_COUNT = re.compile(r"num_hidden_layers|num_layers|n_layers?|depth|(en|de)coder_layers")
_STAGE_DEPTHS = re.compile(r"depths|layer_depths|num_block_repeats|blocks_per_stage|\w*num_blocks|layers")


def tiny_config(config: PretrainedConfig, relaxed: Sequence[str] = ()) -> PretrainedConfig:
    """A smaller config of the same class.

    Args:
        config: where to start from, usually the class's defaults.
        relaxed: groups of rules (of `GROUPS`) to leave out.
    """
    return _shrink(config, frozenset(relaxed), {})


def likely_value(name: str) -> Any:
    """What a field of this name may be, where a config class does not say; None where nobody can tell."""
    return next((value for pattern, value in _LIKELY_VALUES if re.fullmatch(pattern, name)), None)


def add_fields(config: PretrainedConfig, fields: Mapping[tuple[str, str], Any]) -> None:
    """Sets fields of a config and of those inside it.

    Args:
        fields: values by (name of the config's class, name of the field).
    """
    for (class_name, name), value in fields.items():
        if type(config).__name__ == class_name:
            setattr(config, name, value)
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig):
            add_fields(part, fields)


def _shrink(
    default: PretrainedConfig, relaxed: frozenset[str], special_tokens: dict[int, int]
) -> PretrainedConfig:
    inherited = {field.name for field in dataclasses.fields(PretrainedConfig)}
    names = [f.name for f in dataclasses.fields(default) if f.init and f.name not in inherited]
    default = copy.deepcopy(default)
    default.allow_global_per_layer_attribute_access = True  # of configs with values that differ by layer
    values = {name: getattr(default, name) for name in names if hasattr(default, name)}
    count = next((v for n, v in values.items() if _LAYER_COUNT.fullmatch(n) and isinstance(v, int)), 0)
    outputs = list(getattr(default, "out_indices", None) or [])  # of a backbone; no field, but an argument
    kept = list(range(count))
    if "layers" not in relaxed:
        kept = _layers_to_keep(values, count, max(2, len(outputs), *_pattern_lengths(values, count)))
    scope = _Scope(default, max(len(kept), 2), special_tokens)
    tiny: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PretrainedConfig):
            tiny[name] = _shrink(value, relaxed, special_tokens)
        elif name in DERIVED and value is None and "heads" not in relaxed:
            tiny[name] = DERIVED[name]
        elif isinstance(value, bool) or value is None:
            tiny[name] = value
        elif isinstance(value, int):
            tiny[name] = _number(name, value, scope, relaxed)
        elif isinstance(value, (list, tuple)):
            tiny[name] = _sequence(name, value, scope, relaxed, kept, count)
        elif isinstance(value, dict) and "rope" in name and "rope" not in relaxed:
            tiny[name] = _rope(value, sections=_has_rope_sections(type(default)))
        elif isinstance(value, float) and re.fullmatch(r"layer_?scale_init\w*|init_values", name):
            tiny[name] = 1.0  # trained models have grown it; a layer scaled by 1e-6 shows nothing
        else:
            tiny[name] = copy.deepcopy(value)
    if len(outputs) > 1:
        last = len(kept) if count > len(kept) else max(outputs)
        tiny["out_indices"] = [min(index, last - len(outputs) + 1 + i) for i, index in enumerate(outputs)]
    shared = values.get("num_kv_shared_layers")
    if shared and "layers" not in relaxed:
        tiny["num_kv_shared_layers"] = sum(layer >= count - shared for layer in kept)
    tiny |= PATCHES.get(default.model_type, {})
    overrides = default.to_dict().get("per_layer_config") or {}
    if overrides:
        tiny["per_layer_config"] = _per_layer(overrides, values, tiny, kept)
    return type(default)(**tiny)


def _per_layer(
    overrides: Mapping[Any, Mapping[str, Any]],
    values: Mapping[str, Any],
    tiny: Mapping[str, Any],
    kept: list[int],
) -> dict[int, dict[str, Any]]:
    """Fields that single layers have of their own, in the same proportion to those of the whole."""
    layers = {int(layer): fields for layer, fields in overrides.items()}
    result: dict[int, dict[str, Any]] = {}
    for new, old in enumerate(kept):
        for name, value in layers.get(old, {}).items():
            whole = values.get(name)
            if isinstance(value, int) and isinstance(whole, int) and not isinstance(value, bool) and whole:
                value = max(1, tiny[name] * value // whole)
            result.setdefault(new, {})[name] = value
    return result


def _number(name: str, value: int, scope: _Scope, relaxed: frozenset[str]) -> int:
    for group, pattern, new in _COMPILED:
        if pattern.fullmatch(name):
            return value if group in relaxed or value < 0 else new(value, scope)
    return value


def _is_layer_list(name: str, value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count > 1


def _is_layer_indices(name: str, value: Any, count: int) -> bool:
    named = re.fullmatch(r"\w*(index\w*|indices|idxs|layer_ids|_layers|layer_idx\w*)", name)
    if not named or not isinstance(value, (list, tuple)) or not value:
        return False
    numbers = all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= count for v in value)
    return numbers and len(set(value)) == len(value)


def _pattern_lengths(values: Mapping[str, Any], count: int) -> list[int]:
    """Lengths of lists of names that repeat over the layers, such as ("recurrent", "attention")."""
    lists = [v for v in values.values() if isinstance(v, (list, tuple)) and 0 < len(v) < count]
    return [len(value) for value in lists if all(isinstance(name, str) for name in value)]


def _layers_to_keep(values: Mapping[str, Any], count: int, least: int) -> list[int]:
    """The fewest layers, and no fewer than `least`, that show every kind of layer there is."""
    kinds: list[list[str]] = [[] for _ in range(count)]
    for name, value in values.items():
        if _is_layer_indices(name, value, count):
            for layer in range(count):
                kinds[layer].append(f"{name}={layer in value}")
        elif _is_layer_list(name, value, count):
            if any(isinstance(entry, float) for entry in value):
                continue  # a number that drifts from layer to layer is no kind
            for layer in range(count):
                kinds[layer].append(f"{name}={value[layer]}")
    shared = values.get("num_kv_shared_layers") or 0
    kept = []
    # layers that take over the keys of earlier ones need one of their kind among those
    for part in (range(count - shared), range(count - shared, count)):
        seen: set[str] = set()
        for layer in part:
            if not set(kinds[layer]) <= seen:
                seen |= set(kinds[layer])
                kept.append(layer)
    for layer in range(count):
        if len(kept) < least and layer not in kept:
            kept.append(layer)
    return sorted(kept)


def _sequence(
    name: str,
    value: Sequence[Any],
    scope: _Scope,
    relaxed: frozenset[str],
    kept: list[int],
    count: int,
) -> Any:
    kind: Any = type(value)
    if _is_layer_indices(name, value, count) and "layers" not in relaxed:
        return kind(new for new, old in enumerate(kept) if old in value) or kind([len(kept) - 1])
    if _is_layer_list(name, value, count) and "layers" not in relaxed:
        return kind(value[layer] for layer in kept)
    if _STAGE_DEPTHS.fullmatch(name) and "stages" not in relaxed:
        return kind(min(v, 1) if isinstance(v, int) else v for v in value)
    if all(isinstance(v, int) for v in value) and re.search("token|image_size|img_size|eos|bos", name):
        return kind(_number(name, v, scope, relaxed) for v in value)
    return copy.deepcopy(value)


def _has_rope_sections(config_class: type[PretrainedConfig]) -> bool:
    """Whether the model reads `mrope_section`, of which there may be a default outside the config."""
    path = inspect.getfile(config_class).replace("configuration_", "modeling_")
    try:
        return "mrope_section" in Path(path).read_text(encoding="utf-8")
    except OSError:
        return False


def _rope(parameters: dict[str, Any], sections: bool) -> dict[str, Any]:
    """Rotary parameters for heads of `HEAD_DIM`."""
    tiny = copy.deepcopy(parameters)
    for name, value in parameters.items():
        if isinstance(value, dict):
            tiny[name] = _rope(value, sections)
        elif name in ("long_factor", "short_factor"):
            tiny[name] = list(value)[: HEAD_DIM // 2]
        elif name == "original_max_position_embeddings":
            tiny[name] = min(value, POSITIONS // 2)
    if sections and parameters and not any(isinstance(value, dict) for value in parameters.values()):
        half = int(HEAD_DIM * (parameters.get("partial_rotary_factor") or 1.0)) // 2
        count = len(parameters.get("mrope_section", (0, 0, 0)))
        tiny["mrope_section"] = [half // count + (i < half % count) for i in range(count)]
    return tiny
