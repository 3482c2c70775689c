"""`attn_implementation="dma"` inside Transformers, on tiny random models."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

import dma_hf.plugin
from dma_hf import DMAConfig, configure
from dma_hf.policy import MAX_DECODE_QUERIES

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


def test_a_model_that_was_never_configured_runs_the_default(tiny_llama, tokens):
    ids = tokens(1, 200)
    model = copy.deepcopy(tiny_llama)
    model.set_attn_implementation("dma")
    assert torch.equal(logits(model, ids), logits(as_dma(tiny_llama, DMAConfig()), ids))


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


# --- what is refused ---------------------------------------------------------------------------------------


def refused(model, match: str, ids: Tensor, **inputs: object) -> None:
    with pytest.raises(NotImplementedError, match=match) as caught:
        logits(model, ids, **inputs)
    assert "sdpa" in str(caught.value)  # what to do instead
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("window", [30, 64])
def test_a_sliding_window_is_refused(tiny_model, tokens, window):
    """Longer than the prompt too: the mask function does not say that it would be plain causal."""
    model = tiny_model(MistralConfig, MistralForCausalLM, "dma", sliding_window=window)
    refused(model, r"sliding-window or chunked mask \(of \d+ tokens\)", tokens(1, 40))


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


def test_a_prompt_into_a_static_cache_is_refused(tiny_llama, tokens):
    model = as_dma(tiny_llama)
    cache = StaticCache(config=model.config, max_cache_len=64)
    refused(model, "static cache", tokens(1, 40), past_key_values=cache)


def refused_on_a_cache(model, match: str, ids: Tensor) -> None:
    """One query on a cache that SDPA or eager attention filled."""
    filler = copy.deepcopy(model)
    filler.set_attn_implementation("eager")
    cache = DynamicCache(config=model.config)
    logits(filler, ids[:, :-1], past_key_values=cache)
    refused(model, match, ids[:, -1:], past_key_values=cache)


def test_logit_softcapping_is_refused(tiny_model, tokens):
    model = tiny_model(Gemma2Config, Gemma2ForCausalLM, "dma")
    refused(model, r"soft-capping|sliding-window", tokens(1, 40))  # Gemma 2 has both
    refused_on_a_cache(model, r"logit soft-capping \(softcap\)", tokens(1, 41))


def test_learned_attention_sinks_are_refused(tiny_model, tokens):
    model = tiny_model(
        GptOssConfig, GptOssForCausalLM, "dma", num_local_experts=2, num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    refused(model, r"attention sinks|sliding-window", tokens(1, 40))  # GPT-OSS has both
    refused_on_a_cache(model, r"attention sinks \(s_aux\)", tokens(1, 41))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"softcap": 50.0}, r"logit soft-capping \(softcap\)"),
        ({"s_aux": torch.zeros(4)}, r"attention sinks \(s_aux\)"),
        ({"position_bias": torch.zeros(1, 4, 40, 40)}, r"position bias \(position_bias\)"),
        ({"cache": object()}, r"continuous batching \(cache\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 20, 40])}, r"packed sequences \(cu_seq_lens_q\)"),
        ({"sliding_window": 39}, r"sliding_window=39"),
        ({"is_causal": False}, r"is_causal=False"),
        ({"dropout": 0.1}, r"dropout=0.1"),
        ({"attention_mask": torch.zeros(1, 1, 40, 40)}, r"custom attention mask of shape \[1, 1, 40, 40\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_layer_asks_for_and_is_refused_is_named_with_the_layer(tiny_llama, arguments, match):
    layer = tiny_llama.model.layers[1].self_attn
    q, kv = torch.ones(1, 4, 40, 16), torch.ones(1, 2, 40, 16)
    with pytest.raises(NotImplementedError, match=rf"layer 1 \(LlamaAttention\).*{match}"):
        dma_hf.plugin.dma_attention_forward(layer, q, kv, kv, **{"attention_mask": None, **arguments})


def test_a_layer_whose_window_holds_the_whole_prompt_is_served(tiny_llama):
    layer = tiny_llama.model.layers[0].self_attn
    q, kv = torch.ones(1, 4, 40, 16), torch.ones(1, 2, 40, 16)
    out, weights = dma_hf.plugin.dma_attention_forward(layer, q, kv, kv, None, sliding_window=40)
    assert weights is None
    assert torch.equal(out, torch.ones(1, 40, 4, 16))


@pytest.mark.parametrize("mask", [None, padding_mask((0, 30, 10))], ids=["full", "padded"])
def test_an_encoder_is_refused(tokens, mask):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = BertModel._from_config(config, attn_implementation="dma").eval()
    with pytest.raises(NotImplementedError, match=r"bidirectional|not causal"), torch.inference_mode():
        model(tokens(1, 40), attention_mask=mask)


def test_a_custom_mask_is_refused(tiny_llama, tokens):
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril(-3)
    refused(
        as_dma(tiny_llama),
        r"custom attention mask of shape \[1, 1, 40, 40\]",
        tokens(1, 40),
        attention_mask=mask,
    )


def test_packed_sequences_are_refused(tiny_llama, tokens):
    positions = torch.cat((torch.arange(25), torch.arange(15)))[None]
    refused(as_dma(tiny_llama), "packed", tokens(1, 40), position_ids=positions, use_cache=False)


def test_padding_between_real_tokens_is_refused(tiny_llama, tokens):
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 20] = 0
    refused(as_dma(tiny_llama), "padding between real tokens", tokens(2, 40), attention_mask=mask)


def test_attention_dropout_is_refused_in_training_only(tiny_model, tokens):
    model = tiny_model(Qwen2Config, Qwen2ForCausalLM, "dma", attention_dropout=0.25)
    assert logits(model, tokens(1, 40)).isfinite().all()
    model.train()
    refused(model, r"dropout=0.25", tokens(1, 40))


def test_training_is_refused_at_backward_and_forward_with_gradients_enabled_works(tiny_llama, tokens):
    model, ids = as_dma(tiny_llama), tokens(1, 40)
    loss = model(ids, labels=ids).loss
    assert loss.item() == pytest.approx(tiny_llama(ids, labels=ids).loss.item(), abs=1e-4)
    with pytest.raises(RuntimeError, match=r"dma attention is for inference and has no gradient"):
        loss.backward()
