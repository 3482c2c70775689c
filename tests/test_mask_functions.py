"""Transformers' masks, read as ranges: the dense mask of the ranges equals `sdpa_mask`'s, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, StaticCache, masking_utils
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from dma_hf.mask_functions import Pattern, read_mask_function
from dma_hf.policy import is_decode_step
from dma_hf.ranges_mask import RangesMask

LAYER_TYPES = {
    create_causal_mask: "full_attention",
    create_sliding_window_causal_mask: "sliding_attention",
    create_chunked_causal_mask: "chunked_attention",
}
"""Functions that make a decoder's masks, and what kind of layer the mask is for."""

ENCODERS = (create_bidirectional_mask, create_bidirectional_sliding_window_mask)

each_decoder = pytest.mark.parametrize("create", LAYER_TYPES, ids=LAYER_TYPES.get)
each_encoder = pytest.mark.parametrize("create", ENCODERS, ids=["full", "sliding"])
sizes = st.integers(1, 60)
windows = st.integers(1, 70)


def model_config(create: Callable[..., Any] = create_causal_mask, window: int = 8) -> LlamaConfig:
    """A one-layer model whose window or chunk has `window` tokens."""
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=1)
    config.layer_types = [LAYER_TYPES.get(create, "full_attention")]
    config.sliding_window = config.attention_chunk_size = window
    return config


def both(create: Callable[..., Any], config: LlamaConfig, length: int, batch: int = 2, **arguments: Any):
    """The mask under "dma" and under "sdpa", for `length` queries."""
    masks = []
    for implementation in ("dma", "sdpa"):
        config._attn_implementation = implementation
        embeds = torch.zeros(batch, length, 1)
        masks.append(create(config=config, inputs_embeds=embeds, **arguments))
    return masks


def assert_same(actual: Tensor | None, expected: Tensor | None) -> None:
    assert isinstance(actual, RangesMask)
    assert actual.shape == expected.shape
    assert torch.equal(actual.dense(), expected)


def filled(cache: Cache, seen: int, batch: int = 2) -> Cache:
    """The cache after `seen` tokens."""
    if seen:
        cache.update(torch.zeros(batch, 1, seen, 1), torch.zeros(batch, 1, seen, 1), 0)
    return cache


@st.composite
def padding(draw: st.DrawFn, length: int, batch: int = 2) -> Tensor:
    """Rows with real tokens from anywhere to anywhere, also none at all."""
    mask = torch.zeros(batch, length, dtype=torch.long)
    for row in mask:
        start, stop = sorted((draw(st.integers(0, length)), draw(st.integers(0, length))))
        row[start:stop] = 1
    return mask


def packed_positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


# --- every mask that Transformers composes -----------------------------------------------------------------


@each_decoder
@settings(max_examples=40)
@given(data=st.data(), length=sizes, window=windows)
def test_padding(create, data, length, window):
    mask = data.draw(padding(length))
    mask[0, 0], mask[0, 1:] = 0, 1  # never without padding: that has no mask at all
    actual, expected = both(
        create, model_config(create, window), length, attention_mask=mask, past_key_values=None
    )
    assert_same(actual, expected)


@each_encoder
@settings(max_examples=40)
@given(data=st.data(), length=sizes, window=windows)
def test_padding_of_an_encoder(create, data, length, window):
    mask = data.draw(padding(length))
    mask[0, 0] = 0
    mask[0, 1:] = 1
    assert_same(*both(create, model_config(create, window), length, attention_mask=mask))


@settings(max_examples=40)
@given(data=st.data(), length=sizes, encoded=sizes)
def test_padding_of_what_cross_attention_sees(data, length, encoded):
    mask = data.draw(padding(encoded))
    mask[0, 0] = 0
    mask[0, 1:] = 1
    actual, expected = both(
        create_bidirectional_mask,
        model_config(),
        length,
        attention_mask=mask,
        encoder_hidden_states=torch.zeros(2, encoded, 1),
    )
    if is_decode_step(length, encoded):
        assert torch.equal(actual, expected)
    else:
        assert_same(actual, expected)


@settings(max_examples=40)
@given(length=sizes, window=windows)
def test_a_sliding_window_without_padding(length, window):
    config = model_config(create_sliding_window_causal_mask, window)
    actual, expected = both(
        create_sliding_window_causal_mask, config, length, attention_mask=None, past_key_values=None,
        allow_is_causal_skip=False,
    )  # fmt: skip
    assert_same(actual, expected)


@settings(max_examples=40)
@given(length=sizes, window=windows)
def test_a_chunk_without_padding(length, window):
    config = model_config(create_chunked_causal_mask, window)
    actual, expected = both(
        create_chunked_causal_mask, config, length, attention_mask=None, past_key_values=None
    )
    if window >= length:  # one chunk holds all
        assert actual is None
        assert expected is None or torch.equal(expected, torch.ones_like(expected).tril())
    else:
        assert_same(actual, expected)


@settings(max_examples=40)
@given(length=sizes, window=windows)
def test_an_encoders_window_without_padding(length, window):
    create = create_bidirectional_sliding_window_mask
    actual, expected = both(
        create, model_config(create, window), length, attention_mask=None, allow_is_bidirectional_skip=False
    )
    assert_same(actual, expected)


@each_decoder
@settings(max_examples=40)
@given(
    rows=st.lists(st.lists(st.integers(1, 20), min_size=2, max_size=5), min_size=1, max_size=3),
    window=windows,
)
def test_packed_sequences(create, rows, window):
    length = max(sum(row) for row in rows)
    rows = [[*row, length - sum(row)] if sum(row) < length else row for row in rows]
    positions = torch.cat([packed_positions(row) for row in rows])
    actual, expected = both(
        create, model_config(create, window), length, batch=len(rows),
        attention_mask=None, past_key_values=None, position_ids=positions,
    )  # fmt: skip
    if create is create_chunked_causal_mask:  # where the chunks of packed sequences begin is not read
        assert not isinstance(actual, RangesMask)
        assert torch.equal(actual, expected)
    else:
        assert_same(actual, expected)


@each_decoder
@settings(max_examples=40)
@given(data=st.data(), seen=st.integers(0, 60), new=st.integers(17, 60), window=windows, padded=st.booleans())
def test_a_growing_cache(create, data, seen, new, window, padded):
    """A sliding cache forgets its first tokens: its keys do not begin at position 0."""
    config = model_config(create, window)
    mask = data.draw(padding(seen + new)) if padded else None
    actual, expected = both(
        create, config, new, attention_mask=mask, past_key_values=filled(DynamicCache(config=config), seen)
    )
    assert_same_or_plain(actual, expected, new)


@each_decoder
@settings(max_examples=40)
@given(
    data=st.data(),
    seen=st.integers(0, 60),
    new=st.integers(17, 60),
    room=st.integers(0, 40),
    window=windows,
    padded=st.booleans(),
)
def test_a_static_cache(create, data, seen, new, room, window, padded):
    """Its keys reach beyond what is written."""
    config = model_config(create, window)
    mask = data.draw(padding(seen + new)) if padded else None
    actual, expected = both(
        create, config, new, attention_mask=mask,
        past_key_values=filled(StaticCache(config=config, max_cache_len=seen + new + room), seen),
    )  # fmt: skip
    assert_same_or_plain(actual, expected, new)


def assert_same_or_plain(actual: Tensor | None, expected: Tensor | None, queries: int) -> None:
    if isinstance(actual, RangesMask):
        # SDPA leaves a causal mask out where its first keys are all that is written
        wanted = torch.ones(actual.shape, dtype=torch.bool).tril() if expected is None else expected
        assert torch.equal(actual.dense(), wanted)
    else:
        assert actual is None
        plain = torch.ones(queries, queries, dtype=torch.bool).tril()
        assert expected is None or torch.equal(expected, plain.expand(expected.shape))


def test_a_static_cache_of_which_only_the_device_knows_how_full_it_is():
    """Its offset is a tensor."""
    cache = filled(StaticCache(config=model_config(), max_cache_len=100), 30)
    cache.get_query_offset = lambda layer_idx=0: torch.tensor([30])
    assert_same(*both(create_causal_mask, model_config(), 40, attention_mask=None, past_key_values=cache))


# --- where there is nothing to say -------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, torch.ones(2, 40, dtype=torch.long)], ids=["none", "all ones"])
def test_plain_attention_has_no_mask(mask):
    arguments = {"attention_mask": mask, "length": 40}
    config = model_config(create_sliding_window_causal_mask, window=40)
    for create in (create_causal_mask, create_sliding_window_causal_mask, create_chunked_causal_mask):
        assert both(create, config, past_key_values=None, **arguments)[0] is None
    for create in ENCODERS:
        assert both(create, config, **arguments)[0] is None


@each_decoder
def test_a_decode_step_has_sdpas_mask(create):
    mask = torch.ones(2, 31, dtype=torch.long)
    mask[0, :9] = 0
    config = model_config(create)
    actual, expected = both(
        create, config, 1, attention_mask=mask, past_key_values=filled(DynamicCache(config=config), 30)
    )
    assert not isinstance(actual, RangesMask)
    assert torch.equal(actual, expected)


# --- what is not read --------------------------------------------------------------------------------------


def image_tokens(batch_idx, head_idx, q_idx, kv_idx):
    """A vision model's overlay: the first ten tokens see each other."""
    return (q_idx < 10) & (kv_idx < 10)


@pytest.mark.parametrize("kind", ["or_mask_function", "and_mask_function"])
@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask])
def test_a_models_own_overlay_gives_sdpas_mask(create, kind):
    actual, expected = both(
        create, model_config(create), 40, attention_mask=None, past_key_values=None, **{kind: image_tokens}
    )
    assert not isinstance(actual, RangesMask)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask])
def test_blocks_that_see_themselves_give_sdpas_mask(create):
    blocks = torch.full((2, 40), -1)
    blocks[:, 5:20] = 0
    actual, expected = both(
        create, model_config(create), 40, attention_mask=None, past_key_values=None, block_sequence_ids=blocks
    )
    assert not isinstance(actual, RangesMask)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("create", [create_causal_mask, create_bidirectional_mask])
def test_padding_between_real_tokens_gives_sdpas_mask(create):
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 20] = 0
    arguments = {} if create is create_bidirectional_mask else {"past_key_values": None}
    actual, expected = both(create, model_config(), 40, attention_mask=mask, **arguments)
    assert not isinstance(actual, RangesMask)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "function",
    [
        image_tokens,
        lambda batch_idx, head_idx, q_idx, kv_idx: kv_idx <= q_idx,
        masking_utils.or_masks(masking_utils.causal_mask_function, image_tokens),
        masking_utils.and_masks(masking_utils.causal_mask_function, image_tokens),
        masking_utils.blockwise_overlay(torch.zeros(1, 4, dtype=torch.long)),
        masking_utils.add_offsets_to_mask_function(masking_utils.causal_mask_function, 3, 0),
        # two patterns of a kind
        masking_utils.and_masks(
            masking_utils.chunked_overlay(4, torch.zeros(1)), masking_utils.chunked_overlay(6, torch.zeros(1))
        ),
    ],
    ids=["own", "lambda", "or", "and own", "blocks", "offsets", "two chunks"],
)
def test_functions_that_are_not_read(function):
    assert read_mask_function(function) is None


# --- what is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "pattern"),
    [
        (masking_utils.causal_mask_function, Pattern(causal=True)),
        (masking_utils.bidirectional_mask_function, Pattern()),
        (masking_utils.sliding_window_overlay(5), Pattern(left=4)),
        (masking_utils.sliding_window_causal_mask_function(5), Pattern(causal=True, left=4)),
        (masking_utils.sliding_window_bidirectional_mask_function(5), Pattern(left=5, right=5)),
        (
            masking_utils.chunked_causal_mask_function(5, torch.zeros(1, dtype=torch.long)),
            Pattern(causal=True, chunk=5),
        ),
        (
            masking_utils.and_masks(
                masking_utils.sliding_window_causal_mask_function(9),
                masking_utils.sliding_window_bidirectional_mask_function(5),
            ),
            Pattern(causal=True, left=5, right=5),
        ),
    ],
    ids=["causal", "bidirectional", "overlay", "sliding", "bidirectional sliding", "chunked", "narrowest"],
)
def test_functions_that_are_read(function, pattern):
    """Fails where a new Transformers renames what is read: its masks would all become M x N numbers."""
    assert read_mask_function(function) == pattern


def test_the_function_of_packed_sequences_is_read():
    ids = torch.tensor([[0, 0, 1]])
    pattern = read_mask_function(masking_utils.packed_sequence_mask_function(ids))
    assert pattern is not None
    assert pattern.sequence_ids is ids


@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask])
def test_packed_sequences_are_ranges(create):
    """As Transformers composes them, positions mapped to each sequence's own or not."""
    actual, _ = both(
        create, model_config(create), 40, batch=1, attention_mask=None, past_key_values=None,
        position_ids=packed_positions([25, 15]),
    )  # fmt: skip
    assert isinstance(actual, RangesMask)
