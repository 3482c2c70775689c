"""dma among the features of PyTorch and Transformers: compilation, dtypes, sub-configs, saving, serving."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_decoders import llama, mistral
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    StaticCache,
)

import dma_hf.plugin
from dma_hf import DMAConfig, configure

EXACT = DMAConfig(low="none", high="none")
ON_TRITON = DMAConfig(low="none", high="none", tile=32, diagonal=32, sink=32, backend="triton")
"""The kernels are one operator to a compiler; the reference looks at values, which a graph cannot."""

LENGTH = 40
PADDED = torch.ones(2, LENGTH, dtype=torch.long)
PADDED[0, :13] = 0
PACKED = torch.cat((torch.arange(25), torch.arange(15)))[None].expand(2, -1)


def as_dma(model: PreTrainedModel, config: DMAConfig = EXACT) -> PreTrainedModel:
    model = copy.deepcopy(model)
    model.set_attn_implementation("dma")
    return configure(model, config)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


# --- torch.compile -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, mistral])
@pytest.mark.parametrize(
    "inputs", [{}, {"attention_mask": PADDED}, {"position_ids": PACKED}], ids=["plain", "padded", "packed"]
)
def test_a_forward_pass_compiles_without_graph_breaks(tiny_model, tokens, build, inputs):
    model = build(tiny_model)
    ids = tokens(2, LENGTH)
    torch.compiler.reset()
    compiled = torch.compile(as_dma(model, ON_TRITON), fullgraph=True, backend="eager")
    with torch.no_grad():
        actual = compiled(ids, use_cache=False, **inputs).logits
        expected = model(ids, use_cache=False, **inputs).logits
    real = PADDED.bool() if "attention_mask" in inputs else torch.ones_like(PADDED).bool()
    assert_close(actual[real], expected[real])


@pytest.mark.parametrize(
    "config",
    [
        ON_TRITON,
        DMAConfig(low="auto", high="auto", backend="triton"),
        replace(ON_TRITON, layers={1: {"low": "mxfp4"}}),
    ],
    ids=["formats", "auto", "by layer"],
)
def test_the_compiler_has_nothing_to_warn_of(tiny_llama, tokens, config):
    """Dynamo warns of every `lru_cache` it meets, but only once in a process."""
    torch.compiler.reset()
    torch._dynamo.utils.warn_once_cache.clear()
    compiled = torch.compile(as_dma(tiny_llama, config), fullgraph=True, backend="eager")
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled(tokens(2, LENGTH), use_cache=False)
    assert not [message for warning in caught if "Dynamo" in (message := str(warning.message))]


@pytest.mark.parametrize("build", [llama, mistral])
def test_decode_with_a_static_cache_compiles_without_graph_breaks(tiny_model, tokens, build):
    model = build(tiny_model)
    steps = []
    for m in (model, as_dma(model)):
        cache = StaticCache(config=m.config, max_cache_len=64)
        torch.compiler.reset()
        decode = torch.compile(m, fullgraph=True, backend="eager") if m is not model else m
        mask = PADDED
        with torch.no_grad():
            last = m(tokens(2, LENGTH), attention_mask=mask, past_key_values=cache).logits[:, -1]
            for _ in range(2):
                mask = torch.cat((mask, mask.new_ones(2, 1)), 1)
                token = last.argmax(-1, keepdim=True)
                last = decode(token, attention_mask=mask, past_key_values=cache).logits[:, -1]
        steps.append(last)
    assert_close(steps[1], steps[0])


# --- dtypes and contexts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_in_any_dtype_is_as_close_as_sdpa(tiny_llama, tokens, dtype):
    """Both round to `dtype` at other places: neither may be further from float32 by more than a bit."""
    with torch.inference_mode():
        exact = tiny_llama(tokens(2, LENGTH), attention_mask=PADDED).logits
        low = copy.deepcopy(tiny_llama).to(dtype)
        expected, actual = (m(tokens(2, LENGTH), attention_mask=PADDED).logits for m in (low, as_dma(low)))
    assert actual.dtype == dtype
    errors = [(out.float() - exact)[PADDED.bool()].norm() / exact.norm() for out in (actual, expected)]
    assert errors[0] <= 2 * errors[1] + 1e-6


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_contexts(tiny_llama, tokens, context):
    model = as_dma(tiny_llama)
    with context():
        for mask in (None, PADDED):
            actual = model(tokens(2, LENGTH), attention_mask=mask).logits
            expected = tiny_llama(tokens(2, LENGTH), attention_mask=mask).logits
            real = torch.ones_like(PADDED).bool() if mask is None else mask.bool()
            assert_close(actual[real], expected[real])


def test_autocast(tiny_llama, tokens):
    """Projections run in bfloat16; attention takes what they give it."""
    with torch.inference_mode():
        exact = tiny_llama(tokens(2, LENGTH)).logits
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = (m(tokens(2, LENGTH)).logits for m in (tiny_llama, as_dma(tiny_llama)))
    assert (actual.float() - exact).norm() <= 2 * (expected.float() - exact).norm()


# --- composite models --------------------------------------------------------------------------------------


@pytest.fixture
def llava() -> LlavaForConditionalGeneration:
    """A vision tower and a text model, each with a config of its own."""
    torch.manual_seed(0)
    text = {
        "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "image_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "projection_dim": 32,
    }  # fmt: skip
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=120)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize(
    ("implementation", "lengths"),
    [
        ("dma", [25 + 1, LENGTH]),
        ({"text_config": "dma", "vision_config": "sdpa"}, [LENGTH]),
        ({"text_config": "sdpa", "vision_config": "dma"}, [25 + 1]),
    ],
    ids=["all", "text", "vision"],
)
def test_an_implementation_for_each_part(llava, tokens, implementation, lengths, monkeypatch):
    ids = tokens(1, LENGTH).clamp(max=100)
    ids[:, 5:30] = 120
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 40, 40)}
    with torch.inference_mode():
        expected = llava(**inputs).logits
        llava.set_attn_implementation(implementation)
        configure(llava, EXACT)
        seen = []
        attend = dma_hf.plugin.attend
        monkeypatch.setattr(
            dma_hf.plugin,
            "attend",
            lambda q, *rest, **kw: (seen.append(q.shape[2]), attend(q, *rest, **kw))[1],
        )
        assert_close(llava(**inputs).logits, expected)
    assert sorted(set(seen)) == sorted(lengths)


# --- settings of single layers -----------------------------------------------------------------------------


def test_settings_of_single_layers_are_saved_and_loaded(tiny_llama, tokens, tmp_path):
    ids = tokens(1, 60)
    config = DMAConfig(
        low="mxfp4", tile=16, diagonal=16, sink=16, layers={1: {"low": "none", "high": "none"}}
    )
    model = as_dma(tiny_llama, config)
    with torch.inference_mode():
        expected = model(ids).logits
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="dma").eval()
        assert DMAConfig.from_dict(loaded.config.dma_config) == config
        assert torch.equal(loaded(ids).logits, expected)
        # the layers do differ
        for other in (EXACT, DMAConfig(low="mxfp4", tile=16, diagonal=16, sink=16)):
            assert not torch.allclose(as_dma(tiny_llama, other)(ids).logits, expected, atol=1e-3)


# --- serving -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="says it otherwise")
def test_continuous_batching_names_what_it_takes(tiny_llama):
    """Transformers keeps a list of its own implementations for its paged cache."""
    with pytest.raises(
        ValueError, match=r"Implementation dma is not supported for continuous batching.*'sdpa'"
    ):
        as_dma(tiny_llama).generate_batch(
            [list(range(2, 42))],
            generation_config=GenerationConfig(
                max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
        )
