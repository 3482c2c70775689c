"""Tiny models: what a config shrinks to, which weights and inputs it gets, and what cannot be built."""

from __future__ import annotations

import pytest
import torch
from dma_hf_eval import tiny_models
from dma_hf_eval.tiny_configs import (
    HEAD_DIM,
    HEADS,
    VOCABULARY,
    WIDTH,
    WINDOW,
    add_fields,
    likely_value,
    tiny_config,
)
from dma_hf_eval.tiny_inputs import BATCH, LENGTH, wanted_sizes, with_size
from dma_hf_eval.tiny_models import (
    CannotBuildError,
    build,
    model_classes,
    model_types,
    tensors,
    tiny_model,
)
from transformers import (
    BertConfig,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    Qwen2VLTextConfig,
    WhisperConfig,
)
from transformers.modeling_outputs import BaseModelOutput


def test_a_decoder_shrinks_to_two_small_layers() -> None:
    tiny = tiny_config(LlamaConfig())
    assert (tiny.num_hidden_layers, tiny.hidden_size, tiny.intermediate_size) == (2, WIDTH, WIDTH)
    assert (tiny.num_attention_heads, tiny.head_dim, tiny.vocab_size) == (4, HEAD_DIM, VOCABULARY)


def test_one_layer_of_every_kind_is_kept() -> None:
    assert Gemma3TextConfig().layer_types[:6] == [*["sliding_attention"] * 5, "full_attention"]
    tiny = tiny_config(Gemma3TextConfig())
    assert tiny.layer_types == ["sliding_attention", "full_attention"]
    assert tiny.num_hidden_layers == 2
    assert tiny.sliding_window == WINDOW < LENGTH


def test_layers_that_share_keys_keep_layers_to_share_with() -> None:
    tiny = tiny_config(Gemma3nTextConfig())
    assert tiny.layer_types == ["sliding_attention", "full_attention"] * 2
    assert tiny.num_kv_shared_layers == 2


def test_grouped_heads_and_experts_stay_what_they_are() -> None:
    tiny = tiny_config(MixtralConfig())
    assert tiny.num_attention_heads == 2 * tiny.num_key_value_heads
    assert (tiny.num_local_experts, tiny.num_experts_per_tok) == (4, 2)


def test_a_special_token_is_the_same_in_every_part_of_a_config() -> None:
    config = LlavaConfig(image_token_index=32_000)
    config.text_config.pad_token_id = 32_000
    tiny = tiny_config(config)
    assert tiny.image_token_index == tiny.text_config.pad_token_id
    assert 96 <= tiny.image_token_index < VOCABULARY == tiny.text_config.vocab_size


def test_rotary_sections_add_up_to_half_a_head() -> None:
    assert sum(tiny_config(Qwen2VLTextConfig()).rope_parameters["mrope_section"]) == HEAD_DIM // 2


def test_a_relaxed_group_stays_as_it_is() -> None:
    tiny = tiny_config(WhisperConfig(), relaxed=["widths"])
    assert tiny.d_model == WhisperConfig().d_model
    assert tiny.encoder_layers == 2


def test_the_head_that_tells_most_comes_first() -> None:
    assert model_classes(LlamaConfig)[0].__name__ == "LlamaForCausalLM"
    assert model_classes(BertConfig)[0].__name__ == "BertForMaskedLM"
    assert {"llama", "t5", "vit", "whisper"} < set(model_types())


def test_a_tiny_model_is_the_same_in_every_build() -> None:
    tiny = tiny_model("llama")
    assert tiny.inputs["input_ids"].shape == (BATCH, LENGTH)
    sdpa, eager = tiny.build("sdpa"), tiny.build("eager")
    assert (sdpa.config._attn_implementation, eager.config._attn_implementation) == ("sdpa", "eager")
    for left, right in zip(sdpa.parameters(), eager.parameters(), strict=True):
        assert torch.equal(left, right)
    with torch.no_grad():
        torch.testing.assert_close(sdpa(**tiny.inputs).logits, eager(**tiny.inputs).logits)


def test_an_image_model_gets_images_and_an_audio_model_sounds() -> None:
    assert tiny_model("vit").inputs["pixel_values"].shape == (BATCH, 3, 96, 96)
    assert set(tiny_model("whisper").inputs) == {"input_features", "decoder_input_ids"}


def test_an_image_stands_beside_its_text() -> None:
    tiny = tiny_model("gemma3")
    images = tiny.inputs["input_ids"] == tiny.config.image_token_index
    assert torch.equal(images.long(), tiny.inputs["token_type_ids"])
    assert images.sum(1).tolist() == [tiny.config.mm_tokens_per_image] * BATCH
    assert tiny.inputs["pixel_values"].shape == (BATCH, 3, 96, 96)


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("mat1 and mat2 shapes cannot be multiplied (160x64 and 320x128)", [(320, 64)]),
        ("size of tensor a (32) must match the size of tensor b (16)", [(16, 32), (32, 16)]),
        ("expected input[2, 32, 9] to have 80 channels, but got 32 channels", [(80, 32)]),
        ("Given normalized_shape=[64], expected [*, 64], but got input of size[2, 80, 512]", [(64, 512)]),
        ("length 8000 is not a multiple of 1920", [(9600, 8000)]),
        ("expects a length that is a multiple of `2 * window` (100), but got 64", [(100, 64)]),
        ("index out of range", []),
    ],
)
def test_an_error_says_which_size_is_wanted(message: str, wanted: list[tuple[int, int]]) -> None:
    assert wanted_sizes(message) == wanted


def test_an_input_gets_the_size_that_is_wanted() -> None:
    value = torch.randn(2, 64, 80)
    wider = with_size(value, 80, 128)
    assert wider is not None
    assert wider.shape == (2, 64, 128)
    assert torch.equal(wider[..., :80], value)
    half = with_size(value, 640, 320)  # eight numbers of a convolution for each
    assert half is not None
    assert half.shape == (2, 64, 40)
    assert with_size(value, 7, 5) is None
    assert with_size("no tensor", 80, 128) is None


def test_fields_that_a_config_class_lacks_get_likely_values() -> None:
    assert (likely_value("num_key_value_heads"), likely_value("dropout_rate")) == (HEADS, 0.0)
    assert likely_value("anything_else") is None
    config = LlavaConfig()
    add_fields(config, {("LlamaConfig", "expert_size"): 7})
    assert config.text_config.expert_size == 7
    assert not hasattr(config, "expert_size")


def test_a_field_that_only_checkpoints_have_is_found() -> None:
    assert tiny_model("moonshine_streaming").config.num_key_value_heads == HEADS


def test_gates_that_start_closed_are_opened() -> None:
    module = torch.nn.Module()
    module.gate = torch.nn.Parameter(torch.zeros(1))
    module.layer_scale = torch.nn.Parameter(torch.full((4,), 1e-5))
    module.bias = torch.nn.Parameter(torch.zeros(4))
    tiny_models.randomise(module)
    assert module.gate.item() == 0.5
    assert torch.equal(module.layer_scale, torch.ones(4))
    assert not module.bias.any()


def test_what_stays_large_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_models, "MAX_PARAMETERS", 1000)
    with pytest.raises(CannotBuildError, match="its smallest config has 0 M parameters"):
        build(model_classes(LlamaConfig)[0], tiny_config(LlamaConfig()), "sdpa")


def test_the_reason_names_what_is_missing() -> None:
    with pytest.raises(CannotBuildError, match="no class of Transformers takes this config alone"):
        tiny_model("blip_text_model")


def test_tensors_of_an_output_have_names() -> None:
    output = BaseModelOutput(
        last_hidden_state=torch.ones(1, 2), hidden_states=(torch.ones(3), torch.ones(2, dtype=torch.int64))
    )
    assert [name for name, _ in tensors(output)] == ["last_hidden_state", "hidden_states[0]"]
