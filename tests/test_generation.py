"""`generate` on dma with low = high = "none": the same tokens as on SDPA, however they are chosen or cached.

Prompts are longer than the 16 queries up to which a step on a cache is SDPA's, so that the prompt goes
through dma.
"""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from tiny_decoders import Build, gemma2, gemma3, gpt_oss, llama, mistral
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
    cache_utils,
)

import dma_hf.plugin
from dma_hf import DMAConfig, configure

EXACT = DMAConfig(low="none", high="none")
NEW = 8
"""Tokens generated."""
LENGTH = 40
"""Tokens of a prompt."""

DECODERS: tuple[Build, ...] = (llama, mistral, gemma3, gemma2, gpt_oss)
each_decoder = pytest.mark.parametrize("build", DECODERS)

PADDED = torch.ones(2, LENGTH, dtype=torch.long)
PADDED[0, :13] = 0
each_padding = pytest.mark.parametrize("mask", [torch.ones_like(PADDED), PADDED], ids=["full", "left-padded"])


def as_dma(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights, built on dma: T5 of Transformers 5.17 cannot be switched, its parts stay on SDPA."""
    config = copy.deepcopy(model.config)
    twin = type(model)._from_config(config, attn_implementation="dma").eval()
    twin.load_state_dict(model.state_dict())
    return configure(twin, EXACT)


def generated(model: PreTrainedModel, ids: Tensor, **options: object) -> list[list[int]]:
    torch.manual_seed(0)  # of the sampling
    return model.generate(ids, max_new_tokens=NEW, **options).tolist()


@pytest.fixture
def dma_calls(monkeypatch) -> list[int]:
    """The number of queries of each call that dma computes."""
    queries: list[int] = []
    attend = dma_hf.plugin.attend

    def recorded(query, *args, **kwargs):
        queries.append(query.shape[2])
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(dma_hf.plugin, "attend", recorded)
    return queries


# --- decoders: ways to choose tokens, and caches -----------------------------------------------------------

STRATEGIES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 40},
    "beam search": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "no cache": {"do_sample": False, "use_cache": False},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 18},
    "dynamic cache": {"do_sample": False, "cache_implementation": "dynamic"},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


@each_padding
@pytest.mark.parametrize("strategy", STRATEGIES)
@each_decoder
def test_the_same_tokens(tiny_model, tokens, build, strategy, mask, dma_calls):
    options = STRATEGIES[strategy]
    rows = slice(0, 1) if "prompt_lookup_num_tokens" in options else slice(None)  # one row at a time only
    model = build(tiny_model)
    ids = tokens(2, LENGTH).masked_fill(mask == 0, 0)[rows]
    expected = generated(model, ids, attention_mask=mask[rows], **options)
    assert not dma_calls
    assert generated(as_dma(model), ids, attention_mask=mask[rows], **options) == expected
    assert max(dma_calls) > 16


@pytest.mark.parametrize("build", [llama, mistral, gemma3])
def test_assisted_decoding(tiny_model, tokens, build, dma_calls):
    """A smaller assistant proposes, the model checks a few tokens at a time against its cache."""
    model = build(tiny_model)
    torch.manual_seed(1)
    assistant = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
            bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    ids = tokens(1, LENGTH)
    mask = torch.ones_like(ids)
    expected = generated(model, ids, attention_mask=mask, do_sample=False)
    actual = generated(
        as_dma(model), ids, attention_mask=mask, do_sample=False, assistant_model=as_dma(assistant)
    )
    assert actual == expected
    assert LENGTH in dma_calls


QUANTISED_CACHES = {"fp8": None, "quanto": "optimum", "hqq": "hqq"}
"""Transformers' backends of the quantised cache, and the packages that they need."""


@each_padding
@pytest.mark.parametrize("backend", QUANTISED_CACHES)
def test_a_quantised_cache(tiny_model, tokens, backend, mask, dma_calls):
    """The prompt's own attention is exact either way; decode steps read what the cache returns."""
    package = QUANTISED_CACHES[backend]
    if package is None and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this Transformers has no FP8 cache")
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package}")
    model = llama(tiny_model)
    ids = tokens(2, LENGTH).masked_fill(mask == 0, 0)
    options = {"cache_implementation": "quantized", "cache_config": {"backend": backend}}
    expected = generated(model, ids, attention_mask=mask, do_sample=False, **options)
    assert generated(as_dma(model), ids, attention_mask=mask, do_sample=False, **options) == expected
    assert set(dma_calls) == {LENGTH}


def test_a_batch_generates_what_its_rows_generate_alone(tiny_model, tokens):
    """Left padding changes nothing for a row."""
    model = as_dma(llama(tiny_model))
    ids = tokens(2, LENGTH).masked_fill(PADDED == 0, 0)
    batch = generated(model, ids, attention_mask=PADDED, do_sample=False)
    alone = ids[:1, 13:]
    assert generated(model, alone, attention_mask=torch.ones_like(alone), do_sample=False)[0] == batch[0][13:]


# --- encoders and decoders ---------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 128,
    "d_model": 32,
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": None,
}


@pytest.fixture
def t5() -> PreTrainedModel:
    """A position bias in every score."""
    torch.manual_seed(0)
    config = T5Config(**SMALL, d_kv=16, d_ff=32, num_layers=2, num_heads=2)
    return T5ForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture
def bart() -> PreTrainedModel:
    torch.manual_seed(0)
    config = BartConfig(
        **SMALL, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=80, init_std=0.3, bos_token_id=1,
        forced_eos_token_id=None, forced_bos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("beams", [1, 2])
def test_encoder_decoders(request, tokens, name, beams, dma_calls):
    model = request.getfixturevalue(name)
    # an encoder's batch is padded on the right
    mask = PADDED.flip(1)
    ids = tokens(2, LENGTH).masked_fill(mask == 0, 0)
    options = {"attention_mask": mask, "do_sample": False, "num_beams": beams}
    expected = generated(model, ids, **options)
    assert generated(as_dma(model), ids, **options) == expected
    assert dma_calls[:2] == [LENGTH, LENGTH]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_long_target_of_an_encoder_decoder(request, tokens, name, dma_calls):
    """Teacher forcing: causal self-attention and cross-attention of 30 queries, both on dma."""
    model = request.getfixturevalue(name)
    mask = PADDED.flip(1)
    inputs = {
        "input_ids": tokens(2, LENGTH).masked_fill(mask == 0, 0),
        "attention_mask": mask,
        "decoder_input_ids": tokens(2, 30, seed=1),
    }
    with torch.inference_mode():
        expected, actual = (m(**inputs).logits for m in (model, as_dma(model)))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert dma_calls == [LENGTH] * 2 + [30] * 4


def test_whisper(dma_calls):
    """Its encoder sees all of the audio; prompts of its decoder are short."""
    torch.manual_seed(0)
    config = WhisperConfig(
        **SMALL, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=40,
        max_target_positions=60, init_std=0.3, bos_token_id=1, begin_suppress_tokens=None,
    )  # fmt: skip
    model = WhisperForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    audio = torch.randn(2, 8, 80)
    target = torch.arange(2, 32).expand(2, -1)
    with torch.inference_mode():
        expected, actual = (
            m(input_features=audio, decoder_input_ids=target).logits for m in (model, as_dma(model))
        )
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert dma_calls == [40] * 2 + [30] * 4


# --- a vision-language model -------------------------------------------------------------------------------

IMAGE, BEGIN, END = 120, 121, 122
"""Token ids of an image's place in a text, and around it."""


@pytest.fixture
def vlm() -> PreTrainedModel:
    """Gemma 3: in the text, an image's tokens see each other in both directions."""
    torch.manual_seed(0)
    text = Gemma3TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=12, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"], initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=48,
        patch_size=8,
    )  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=9, image_token_index=IMAGE,
        boi_token_index=BEGIN, eoi_token_index=END, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()


@each_padding
def test_a_vision_language_model(vlm, tokens, mask, dma_calls):
    ids = tokens(2, LENGTH).clamp(max=100).masked_fill(mask == 0, 0)
    image = torch.tensor([BEGIN, *[IMAGE] * 9, END])
    ids[:, 15:26] = image
    inputs = {
        "attention_mask": mask,
        "pixel_values": torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)),
        "token_type_ids": (ids == IMAGE).long(),
    }
    expected = generated(vlm, ids, do_sample=False, **inputs)
    assert generated(as_dma(vlm), ids, do_sample=False, **inputs) == expected
    assert dma_calls == [36] * 2 + [LENGTH] * 2  # the image's patches, then the text
