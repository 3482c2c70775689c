"""`attn_implementation="dma"` inside Transformers, on tiny random models."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from tiny_decoders import gemma2, gpt_oss
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)
from transformers.masking_utils import sdpa_mask

import dma_hf.plugin
from dma_hf import DMAConfig, DMAFallbackWarning, configure, diagonal_tiled_attention
from dma_hf.policy import MAX_DECODE_QUERIES, forget_warnings

EXACT = DMAConfig(low="none", high="none")
SMALL_TILES = DMAConfig(low="mxfp4", tile=16, diagonal=16, sink=16)


def as_dma(model, config: DMAConfig = EXACT):
    """A copy of `model` on dma."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("dma")
    return configure(model, config)


@torch.inference_mode()
def logits(model, input_ids: Tensor, **inputs: object) -> Tensor:
    return model(input_ids, **inputs).logits


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def padding_mask(*rows: tuple[int, int, int]) -> Tensor:
    """Rows of (left padding, real tokens, right padding)."""
    return torch.tensor([[0] * left + [1] * real + [0] * right for left, real, right in rows])


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """Counts what the plugin calls: DMA or SDPA, once a layer and forward pass."""
    counts = {"dma": 0, "sdpa": 0}

    def counted(name: str, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    plugin = dma_hf.plugin
    monkeypatch.setattr(plugin, "attend", counted("dma", plugin.attend))
    monkeypatch.setattr(plugin, "sdpa_attention_forward", counted("sdpa", plugin.sdpa_attention_forward))
    return counts


# --- logits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 16, 17, 127, 128, 129, 200])
def test_unquantised_logits_equal_sdpa(tiny_llama, tokens, length, calls):
    ids = tokens(2, length)
    expected = logits(tiny_llama, ids)
    assert_close(logits(as_dma(tiny_llama), ids), expected)
    assert calls == {"dma": 2, "sdpa": 0}


@pytest.mark.parametrize(
    "mask",
    [
        padding_mask((13, 27, 0), (0, 40, 0), (39, 1, 0)),
        padding_mask((0, 27, 13), (0, 40, 0), (0, 1, 39)),
        padding_mask((5, 20, 15), (0, 40, 0), (20, 20, 0)),
        padding_mask((0, 40, 0), (0, 40, 0), (0, 40, 0)),
    ],
    ids=["left", "right", "both", "none"],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_unquantised_logits_of_a_padded_batch_equal_sdpa_on_real_tokens(tiny_llama, tokens, mask, dtype):
    ids = tokens(3, 40).masked_fill(mask == 0, 0)
    expected = logits(tiny_llama, ids, attention_mask=mask.to(dtype))
    actual = logits(as_dma(tiny_llama), ids, attention_mask=mask.to(dtype))
    assert actual.isfinite().all()
    assert_close(actual[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize(
    ("config_class", "model_class", "options"),
    [
        (Qwen2Config, Qwen2ForCausalLM, {}),
        (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
        (MistralConfig, MistralForCausalLM, {"sliding_window": None, "num_key_value_heads": 1}),
    ],
    ids=["Qwen2", "Mistral", "Mistral MQA"],
)
def test_other_decoders(tiny_model, tokens, config_class, model_class, options):
    model = tiny_model(config_class, model_class, "sdpa", **options)
    ids, mask = tokens(2, 50), padding_mask((9, 41, 0), (0, 50, 0))
    assert_close(logits(as_dma(model), ids), logits(model, ids))
    actual, expected = (logits(m, ids, attention_mask=mask)[mask.bool()] for m in (as_dma(model), model))
    assert_close(actual, expected)


def test_a_padded_prompt_has_the_logits_of_the_prompt_alone(tiny_llama, tokens):
    """With quantisation too: padding enters neither the key mean nor the tiles."""
    model = as_dma(tiny_llama, SMALL_TILES)
    ids = tokens(1, 50)
    alone = logits(model, ids)
    padded = torch.cat((torch.zeros(1, 14, dtype=torch.long), ids), 1)
    mask = padding_mask((14, 50, 0))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    actual = logits(model, padded, attention_mask=mask, position_ids=positions)
    assert_close(actual[:, 14:], alone)


def test_quantisation_changes_logits_and_finer_formats_change_them_less(tiny_llama, tokens):
    ids = tokens(2, 200)
    exact = logits(tiny_llama, ids)

    def error(**options: object) -> float:
        return (logits(as_dma(tiny_llama, DMAConfig(**options)), ids) - exact).norm().item()

    assert error(low="mxfp4", high="mxfp4") > error(low="mxfp8") > error(low="int8", high="int8") > 1e-4


def test_bfloat16(tiny_llama, tokens):
    model = as_dma(tiny_llama.bfloat16(), DMAConfig())
    out = logits(model, tokens(2, 60))
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


# --- generate --------------------------------------------------------------------------------------------


def generate(model, ids: Tensor, **options: object) -> list[list[int]]:
    return model.generate(ids, do_sample=False, max_new_tokens=12, **options).tolist()


@pytest.mark.parametrize("length", [5, 40, 140])
def test_greedy_generation_equals_sdpa(tiny_llama, tokens, length, calls):
    ids = tokens(2, length)
    expected = generate(tiny_llama, ids, attention_mask=torch.ones_like(ids))
    actual = generate(as_dma(tiny_llama), ids, attention_mask=torch.ones_like(ids))
    assert actual == expected
    # two layers: the prompt by DMA, the eleven steps after it by SDPA
    assert calls == {"dma": 2, "sdpa": 22}


def test_greedy_generation_of_a_left_padded_batch_equals_sdpa(tiny_llama, tokens, calls):
    mask = padding_mask((23, 17, 0), (0, 40, 0), (39, 1, 0))
    ids = tokens(3, 40).masked_fill(mask == 0, 0)
    expected = generate(tiny_llama, ids, attention_mask=mask)
    actual = generate(as_dma(tiny_llama), ids, attention_mask=mask)
    assert actual == expected
    assert calls == {"dma": 2, "sdpa": 22}


def test_a_second_prompt_on_the_cache_equals_sdpa(tiny_llama, tokens, calls):
    ids = tokens(2, 100)
    mask = padding_mask((7, 93, 0), (0, 100, 0))
    results = []
    for model in (tiny_llama, as_dma(tiny_llama)):
        cache = DynamicCache(config=model.config)
        logits(model, ids[:, :50], attention_mask=mask[:, :50], past_key_values=cache)
        results.append(logits(model, ids[:, 50:], attention_mask=mask, past_key_values=cache))
    assert_close(results[1], results[0])
    assert calls == {"dma": 4, "sdpa": 0}


@pytest.mark.parametrize("queries", [1, 2, MAX_DECODE_QUERIES, MAX_DECODE_QUERIES + 1])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_a_few_queries_on_the_cache_go_to_sdpa_and_equal_it(tiny_llama, tokens, queries, padded, calls):
    """Exactly, whatever the setting: the cache is not quantised. Speculative decoding does this."""
    ids = tokens(2, 40 + queries)
    mask = padding_mask((7 * padded, 40 + queries - 7 * padded, 0), (0, 40 + queries, 0))
    model = as_dma(tiny_llama)
    results = []
    for step in (tiny_llama, model):
        cache = DynamicCache(config=model.config)
        logits(tiny_llama, ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache)
        results.append(logits(step, ids[:, 40:], attention_mask=mask, past_key_values=cache))
    assert_close(results[1], results[0])
    served_by_sdpa = queries <= MAX_DECODE_QUERIES
    assert calls == {"dma": 0 if served_by_sdpa else 2, "sdpa": 2 if served_by_sdpa else 0}


# --- choosing the implementation and the setting -----------------------------------------------------------


def test_switching_a_loaded_model(tiny_llama, tokens, calls):
    ids = tokens(1, 60)
    expected = logits(tiny_llama, ids)
    configure(tiny_llama, SMALL_TILES)
    assert torch.equal(logits(tiny_llama, ids), expected)  # configuring alone changes nothing
    tiny_llama.set_attn_implementation("dma")
    assert not torch.allclose(logits(tiny_llama, ids), expected, atol=1e-3)
    assert calls["dma"] == 2
    tiny_llama.set_attn_implementation("sdpa")
    assert torch.equal(logits(tiny_llama, ids), expected)
    assert calls["dma"] == 2


def test_configure_again_takes_effect(tiny_llama, tokens):
    ids = tokens(1, 60)
    model = as_dma(tiny_llama, SMALL_TILES)
    coarse = logits(model, ids)
    assert configure(model, EXACT) is model
    assert_close(logits(model, ids), logits(tiny_llama, ids))
    configure(model, SMALL_TILES)
    assert torch.equal(logits(model, ids), coarse)


def test_a_model_that_was_never_configured_runs_the_preset_auto(tiny_llama, tokens):
    # padded: calls without a mask that are as short as this one stay on SDPA
    ids, mask = tokens(2, 200), padding_mask((9, 191, 0), (0, 200, 0))
    model = copy.deepcopy(tiny_llama)
    model.set_attn_implementation("dma")
    actual = logits(model, ids, attention_mask=mask)
    assert torch.equal(actual, logits(as_dma(tiny_llama, DMAConfig.preset("auto")), ids, attention_mask=mask))
    exact = logits(tiny_llama, ids, attention_mask=mask)
    assert 1e-4 < (actual - exact)[mask.bool()].abs().max() < 10.0


def test_save_and_load_keep_the_setting(tiny_llama, tokens, tmp_path):
    ids = tokens(1, 60)
    config = DMAConfig(low="mxfp4", tile=16, diagonal=32, sink=0, rotate=True, scale_rule="ceil")
    model = as_dma(tiny_llama, config)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dma_config"] == config.to_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="dma").eval()
    assert DMAConfig.from_dict(loaded.config.dma_config) == config
    assert torch.equal(logits(loaded, ids), expected)
    # and a model loaded without dma is not disturbed
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    assert torch.equal(logits(plain, ids), logits(tiny_llama, ids))


@pytest.mark.parametrize("config", ["paper", {"low": "fp8"}, None])
def test_configure_refuses_what_is_no_config(tiny_llama, config):
    with pytest.raises(TypeError, match=r"config=.* must be a DMAConfig"):
        configure(tiny_llama, config)


def test_configure_refuses_what_is_no_transformers_model():
    with pytest.raises(TypeError, match=r"model is a Linear"):
        configure(torch.nn.Linear(2, 2), EXACT)


def test_a_broken_setting_in_config_json_is_named(tiny_llama, tokens):
    model = as_dma(tiny_llama)
    model.config.dma_config = {"low": "fp6"}
    with pytest.raises(ValueError, match=r"low='fp6' is not a format"):
        logits(model, tokens(1, 20))


# --- every mask and feature that SDPA serves ---------------------------------------------------------------


def assert_equals_sdpa(model, ids: Tensor, real: Tensor | None = None, **inputs: object) -> None:
    """The logits of `model` and of its copy on dma, at `real` tokens where given."""
    expected, actual = logits(model, ids, **inputs), logits(as_dma(model), ids, **inputs)
    assert actual.isfinite().all()
    if real is not None:
        expected, actual = expected[real.bool()], actual[real.bool()]
    torch.testing.assert_close(actual, expected, atol=1e-5 * max(1.0, expected.abs().max().item()), rtol=0)


PADDED = {
    "full": None,
    "left": padding_mask((13, 27, 0), (0, 40, 0)),
    "right": padding_mask((0, 27, 13), (0, 40, 0)),
}
each_padding = pytest.mark.parametrize("mask", PADDED.values(), ids=PADDED)


@each_padding
@pytest.mark.parametrize("window", [1, 8, 30, 64])
def test_a_sliding_window(tiny_model, tokens, window, mask, calls):
    model = tiny_model(MistralConfig, MistralForCausalLM, "sdpa", sliding_window=window)
    assert_equals_sdpa(model, tokens(2, 40), mask, attention_mask=mask)
    assert calls == {"dma": 2, "sdpa": 0}


@each_padding
def test_layers_that_alternate_windows_and_full_attention(tiny_model, tokens, mask, calls):
    model = tiny_model(
        Qwen3Config, Qwen3ForCausalLM, "sdpa", use_sliding_window=True, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    assert_equals_sdpa(model, tokens(2, 40), mask, attention_mask=mask)
    assert calls == {"dma": 2, "sdpa": 0}


def test_a_decode_step_with_a_sliding_window_is_sdpas(tiny_model, tokens, calls):
    model = tiny_model(MistralConfig, MistralForCausalLM, "sdpa", sliding_window=24)
    ids = tokens(1, 41)
    results = []
    for step in (model, as_dma(model)):
        cache = DynamicCache(config=model.config)
        logits(model, ids[:, :40], past_key_values=cache)
        results.append(logits(step, ids[:, 40:], past_key_values=cache))
    assert_close(results[1], results[0])
    assert calls == {"dma": 0, "sdpa": 2}


@each_padding
def test_a_prompt_into_a_static_cache_and_a_second_one(tiny_llama, tokens, mask, calls):
    ids = tokens(2, 70)
    second = None if mask is None else torch.cat((mask, torch.ones(2, 30, dtype=torch.long)), 1)
    results = []
    for model in (tiny_llama, as_dma(tiny_llama)):
        cache = StaticCache(config=model.config, max_cache_len=96)
        first = logits(model, ids[:, :40], attention_mask=mask, past_key_values=cache)
        if mask is not None:
            first = first[mask.bool()]
        results.append((first, logits(model, ids[:, 40:], attention_mask=second, past_key_values=cache)))
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_close(actual, expected)
    assert calls == {"dma": 4, "sdpa": 0}


@pytest.mark.parametrize("mask", [None, padding_mask((0, 30, 10))], ids=["full", "padded"])
def test_an_encoder(tokens, mask, calls):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = BertModel._from_config(config, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        expected, actual = (
            m(tokens(1, 40), attention_mask=mask).last_hidden_state for m in (model, as_dma(model))
        )
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert calls == {"dma": 2, "sdpa": 0}


CUSTOM = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
CUSTOM[0, :, :, 5:9] = True  # an image that all tokens see
CUSTOM[1, :, 20:, 12] = False


@pytest.mark.parametrize(
    "mask",
    [
        CUSTOM,
        CUSTOM[:1],
        torch.where(CUSTOM, 0.0, torch.finfo(torch.float32).min),
        torch.where(CUSTOM, 0.0, -torch.inf),
        torch.where(CUSTOM, torch.linspace(-2, 2, 40), -torch.inf),
    ],
    ids=["bool", "one for the batch", "smallest float", "-inf", "bias"],
)
def test_a_mask_of_the_users_own(tiny_llama, tokens, mask, calls):
    assert_equals_sdpa(tiny_llama, tokens(2, 40), attention_mask=mask)
    assert calls == {"dma": 2, "sdpa": 0}


@pytest.mark.parametrize("window", [None, 8])
def test_packed_sequences_equal_sdpa_and_the_sequences_alone(tiny_model, tokens, window, calls):
    model = tiny_model(MistralConfig, MistralForCausalLM, "sdpa", sliding_window=window)
    ids = tokens(1, 40)
    positions = torch.cat((torch.arange(25), torch.arange(15)))[None]
    assert_equals_sdpa(model, ids, position_ids=positions, use_cache=False)
    assert calls == {"dma": 2, "sdpa": 0}
    packed = logits(as_dma(model), ids, position_ids=positions, use_cache=False)
    for part in (slice(0, 25), slice(25, 40)):
        assert_close(packed[:, part], logits(model, ids[:, part]))


def test_padding_between_real_tokens(tiny_llama, tokens, calls):
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 20] = 0
    assert_equals_sdpa(tiny_llama, tokens(2, 40), mask, attention_mask=mask)
    assert calls == {"dma": 2, "sdpa": 0}


@each_padding
def test_a_decoder_made_an_encoder(tiny_llama, tokens, mask, calls):
    """`is_causal=False`, as embedding models are built."""
    ids = tokens(2, 40)
    causal = logits(tiny_llama, ids, attention_mask=mask)
    tiny_llama.config.is_causal = False
    for layer in tiny_llama.model.layers:
        layer.self_attn.is_causal = False
    assert not torch.allclose(logits(tiny_llama, ids, attention_mask=mask, use_cache=False), causal, atol=0.1)
    assert_equals_sdpa(tiny_llama, ids, mask, attention_mask=mask, use_cache=False)
    assert calls == {"dma": 2, "sdpa": 0}


# --- what SDPA does not have: soft-capping and sinks --------------------------------------------------------


each_model_without_sdpa = pytest.mark.parametrize("build", [gemma2, gpt_oss])


@each_padding
@each_model_without_sdpa
def test_softcap_and_sinks_equal_eager(tiny_model, tokens, build, mask, calls):
    assert_equals_sdpa(build(tiny_model), tokens(2, 40), mask, attention_mask=mask)
    assert calls == {"dma": 2, "sdpa": 0}


@each_padding
@each_model_without_sdpa
def test_decode_steps_have_softcap_and_sinks_too(tiny_model, tokens, build, mask, calls):
    """The cache is read unquantised, as SDPA would read it."""
    model = build(tiny_model)
    ids = tokens(2, 41)
    mask = None if mask is None else torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
    results = []
    for step in (model, as_dma(model, SMALL_TILES)):
        cache = DynamicCache(config=model.config)
        logits(
            model, ids[:, :40], attention_mask=None if mask is None else mask[:, :40], past_key_values=cache
        )
        results.append(logits(step, ids[:, 40:], attention_mask=mask, past_key_values=cache))
    assert_close(results[1], results[0])
    assert calls == {"dma": 2, "sdpa": 0}


# --- one layer ---------------------------------------------------------------------------------------------

G = torch.Generator().manual_seed(0)
QUERY = torch.randn(2, 4, 40, 16, generator=G)
KEY, VALUE = (torch.randn(2, 2, 40, 16, generator=G) for _ in range(2))
BIAS = torch.randn(1, 4, 40, 40, generator=G)
BEHIND = torch.ones(40, 40, dtype=torch.bool).triu(1)
LOWEST = torch.finfo(torch.float32).min


def layer_on_dma(model, query=QUERY, key=KEY, value=VALUE, **arguments: object) -> Tensor:
    layer = as_dma(model).model.layers[1].self_attn
    out, weights = dma_hf.plugin.dma_attention_forward(
        layer, query, key, value, **{"attention_mask": None, **arguments}
    )
    assert weights is None
    return out.transpose(1, 2)


def sdpa(query=QUERY, key=KEY, value=VALUE, **arguments: object) -> Tensor:
    return scaled_dot_product_attention(query, key, value, enable_gqa=True, **arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"is_causal": True}),
        ({"scaling": 0.5}, {"is_causal": True, "scale": 0.5}),
        ({"is_causal": False}, {}),
        ({"attention_mask": CUSTOM}, {"attn_mask": CUSTOM}),
        ({"attention_mask": CUSTOM.expand(2, 4, -1, -1)}, {"attn_mask": CUSTOM}),
        ({"attention_mask": CUSTOM[0, 0]}, {"attn_mask": CUSTOM[0, 0]}),
        ({"attention_mask": CUSTOM[0]}, {"attn_mask": CUSTOM[0]}),
        ({"attention_mask": BIAS}, {"attn_mask": BIAS}),
        ({"attention_mask": CUSTOM[:, :, :1]}, {"attn_mask": CUSTOM[:, :, :1]}),
        ({"position_bias": BIAS, "is_causal": False}, {"attn_mask": BIAS}),
        ({"position_bias": BIAS}, {"attn_mask": BIAS.masked_fill(BEHIND, -torch.inf)}),
        (
            {"position_bias": BIAS, "attention_mask": CUSTOM},
            {"attn_mask": torch.where(CUSTOM, BIAS, LOWEST)},
        ),
        ({"position_bias": BIAS, "attention_mask": BIAS}, {"attn_mask": 2 * BIAS}),
        # for other implementations: the mask says it, or positions do
        ({"sliding_window": 7}, {"is_causal": True}),
        ({"cu_seq_lens_q": torch.tensor([0, 20, 40])}, {"is_causal": True}),
    ],
    ids=[
        "causal", "scaling", "is_causal", "bool", "bool of each head", "2-D", "3-D", "additive", "one row",
        "position bias", "causal position bias", "position bias and bool", "position bias and additive",
        "sliding_window", "cu_seq_lens_q",
    ],
)  # fmt: skip
def test_what_a_layer_asks_for(tiny_llama, arguments, expected, calls):
    out = layer_on_dma(tiny_llama, **arguments)
    torch.testing.assert_close(out, sdpa(**expected), atol=1e-5, rtol=0)
    assert calls == {"dma": 1, "sdpa": 0}


def test_a_causal_prompt_shorter_than_its_static_cache_with_a_position_bias(tiny_llama):
    """As in SDPA: the keys behind the prompt are not written yet."""
    query, bias = QUERY[:, :, :30], BIAS[:, :, :30]
    out = layer_on_dma(tiny_llama, query, position_bias=bias)
    seen = torch.ones(30, 40, dtype=torch.bool).tril()
    torch.testing.assert_close(
        out, sdpa(query, attn_mask=torch.where(seen, bias, -torch.inf)), atol=1e-5, rtol=0
    )


def test_a_padding_mask_with_more_rows_than_the_batch():
    """Musicgen's mask has a row for each codebook of each sequence; SDPA's mask takes the first rows."""
    padding = padding_mask((13, 27, 0), (0, 40, 0), (0, 20, 20), (5, 35, 0)).bool()
    settings = {"batch_size": 2, "q_length": 40, "kv_length": 40, "attention_mask": padding}
    assert torch.equal(dma_hf.plugin.dma_mask(**settings).dense(), sdpa_mask(**settings))


def test_a_model_that_writes_into_its_mask(tiny_llama):
    """Before the layers get it: an image's tokens see each other. Slices of it are what they would be."""
    mask = dma_hf.plugin.dma_mask(2, 40, 40, attention_mask=padding_mask((13, 27, 0), (0, 40, 0)).bool())
    expected = mask.dense()
    sliced = mask[:, :, :, :39]
    torch.testing.assert_close(
        layer_on_dma(tiny_llama, QUERY, KEY[:, :, :39], VALUE[:, :, :39], attention_mask=sliced),
        sdpa(QUERY, KEY[:, :, :39], VALUE[:, :, :39], attn_mask=expected[..., :39]),
        atol=1e-5,
        rtol=0,
    )
    for written in (mask, expected):
        written[:, :, 20:30, 20:30] = True
    out = layer_on_dma(tiny_llama, attention_mask=mask)
    torch.testing.assert_close(out, sdpa(attn_mask=expected), atol=1e-5, rtol=0)


def test_learned_queries_that_are_the_same_for_the_batch(tiny_llama):
    """SDPA broadcasts them."""
    out = layer_on_dma(tiny_llama, QUERY[:1], is_causal=False)
    torch.testing.assert_close(out, sdpa(QUERY[:1].expand(2, -1, -1, -1)), atol=1e-5, rtol=0)


def test_cross_attention_is_all_high_precision(tiny_llama):
    """Keys of another sequence have no diagonal."""
    config = DMAConfig(low="mxfp4", high="int8", tile=16, diagonal=16, sink=16)
    layer = configure(tiny_llama, config).model.layers[0].self_attn
    layer.is_causal = False
    out, _ = dma_hf.plugin.dma_attention_forward(layer, QUERY[:, :, :30], KEY, VALUE, None)
    high = DMAConfig(low="int8", high="int8", tile=16, diagonal=16, sink=16)
    expected = diagonal_tiled_attention(QUERY[:, :, :30], KEY, VALUE, causal=False, config=high)
    assert torch.equal(out.transpose(1, 2), expected)


@pytest.fixture
def warn_again() -> None:
    """Each reason warns once a process: forget what was warned of."""
    forget_warnings()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dropout": 0.1}, r"attention dropout \(dropout=0.1\).*model.eval\(\) turns it off"),
        ({"cache": object()}, r"the paged cache of continuous batching"),
    ],
    ids=["dropout", "paged cache"],
)
def test_what_goes_to_sdpa_says_which_layer_and_why_once(tiny_llama, arguments, reason, calls, warn_again):
    message = rf"layer 1 \(LlamaAttention\) runs on SDPA: {reason}"
    with pytest.warns(DMAFallbackWarning, match=message) as caught:
        layer_on_dma(tiny_llama, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DMAFallbackWarning)
        layer_on_dma(tiny_llama, **arguments)
    assert len(caught) == 1
    assert calls == {"dma": 0, "sdpa": 2}


@pytest.mark.parametrize("arguments", [{"softcap": 2.0}, {"s_aux": torch.zeros(4)}], ids=["softcap", "sinks"])
def test_dropout_with_what_sdpa_does_not_have_is_refused(tiny_llama, arguments):
    with pytest.raises(
        NotImplementedError, match=r"layer 1 \(LlamaAttention\) uses attention dropout"
    ) as caught:
        layer_on_dma(tiny_llama, dropout=0.1, **arguments)
    assert "\n" not in str(caught.value)


# --- training ----------------------------------------------------------------------------------------------


def test_attention_dropout_trains_on_sdpa_with_a_warning(tiny_model, tokens, calls, warn_again):
    model = as_dma(tiny_model(Qwen2Config, Qwen2ForCausalLM, "sdpa", attention_dropout=0.25))
    assert logits(model, tokens(1, 40)).isfinite().all()
    assert calls == {"dma": 2, "sdpa": 0}
    model.train()
    with pytest.warns(DMAFallbackWarning, match=r"dropout=0.25") as caught:
        model(tokens(1, 40), labels=tokens(1, 40)).loss.backward()
    assert len(caught) == 2  # one for each layer
    assert calls == {"dma": 2, "sdpa": 2}
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_training_is_refused_at_backward_and_forward_with_gradients_enabled_works(tiny_llama, tokens):
    model, ids = as_dma(tiny_llama), tokens(1, 40)
    loss = model(ids, labels=ids).loss
    assert loss.item() == pytest.approx(tiny_llama(ids, labels=ids).loss.item(), abs=1e-4)
    with pytest.raises(RuntimeError, match=r"dma attention is for inference and has no gradient"):
        loss.backward()
