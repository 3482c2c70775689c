"""The attention kernel under every mask and feature against the reference, on small shapes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import MASKS, Case, check, run

from dma_hf import DMAConfig
from dma_hf.kernels.mask_tiles import visited_tiles

# NumPy's, in the interpreter: NaN and Inf are what is tested
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")

CONFIG = DMAConfig(tile=32, diagonal=32, sink=32)
CHEAP = DMAConfig(low="int8", high="none", tile=32, diagonal=32, sink=32)
CASE = Case(CHEAP, lengths=(70, 70), dims=(32, 32), heads=(1, 1))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [True, False])
def test_masks(mask, causal):
    check(replace(CASE, config=CONFIG, mask=mask, causal=causal))


@pytest.mark.parametrize("shape", ["B1", "1H", "BH"])
def test_masks_broadcast(shape):
    check(replace(CASE, heads=(2, 1), batch=2, mask="empty rows", mask_shape=shape, causal=False))


@pytest.mark.parametrize("window", [1, 7, 32, 33, 1000])
@pytest.mark.parametrize("causal", [True, False])
def test_windows_smaller_and_larger_than_a_block(window, causal):
    check(replace(CASE, window=window, causal=causal))


@pytest.mark.parametrize("sequences", [(1,), (3, 1, 40), (32,), (31, 33), (65,)])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_shorter_and_longer_than_a_block(sequences, causal):
    check(replace(CASE, sequences=sequences, causal=causal))


# with 70 keys, shares that end just before, at and behind the edges of blocks of 32
@pytest.mark.parametrize("start", [31 / 70, 32 / 70, 33 / 70])
@pytest.mark.parametrize("stop", [63 / 70, 64 / 70, 65 / 70])
def test_ranges_that_straddle_a_block(start, stop):
    check(replace(CASE, real=((start, stop), (0.0, 1.0)), batch=2, causal=False))


@pytest.mark.parametrize("options", [
    {"window": 20, "real": ((0.3, 1.0),)},
    {"window": 20, "sequences": (30, 11)},
    {"window": 20, "mask": "bias", "mask_shape": "1H"},
    {"real": ((0.2, 0.9),), "mask": "additive"},
    {"lengths": (40, 70), "window": 20},
    {"lengths": (70, 40), "mask": "dense"},
])  # fmt: skip
@pytest.mark.parametrize("features", [{}, {"softcap": 5.0}, {"sinks": True}])
def test_combinations(options, features):
    check(replace(CASE, **options, **features))


@pytest.mark.parametrize("config", ["low=nvfp4", "low=mxfp4,rotate=true", "high=none,smooth_k=false"])
def test_features_that_need_exact_scores(config):
    config = DMAConfig.parse(f"{config},tile=32,diagonal=32,sink=32")
    check(replace(CASE, config=config, heads=(2, 1), softcap=8.0, sinks=True))


def test_a_row_that_sees_nothing_is_zeros_and_with_the_smallest_float_the_mean():
    case = replace(CASE, mask="empty rows", causal=False)
    inputs = case.inputs()
    inputs["attn_mask"][..., 10, :] = False
    assert not run(case, inputs, "triton")[:, :, 10].any()

    case = replace(case, mask="additive")
    inputs = case.inputs()
    inputs["attn_mask"][..., 10, :] = torch.finfo(torch.bfloat16).min
    out = run(case, inputs, "triton")[:, :, 10].float()
    torch.testing.assert_close(out, inputs["value"].float().mean(2), atol=5e-3, rtol=0)


def test_only_keys_up_to_the_query_count_for_a_row_that_a_causal_mask_empties():
    # left padding as an additive mask: the first rows see padding alone
    case = replace(CASE, mask="additive")
    inputs = case.inputs()
    inputs["attn_mask"].zero_()[..., :40] = torch.finfo(torch.bfloat16).min
    out, expected = run(case, inputs, "triton"), run(case, inputs, "reference")
    torch.testing.assert_close(out.cpu(), expected, atol=1e-2, rtol=0)
    assert out[:, :, :40].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [
    {"window": 20}, {"window": 20, "causal": False}, {"sequences": (20, 30)}, {"real": ((0.0, 0.8),)},
])  # fmt: skip
def test_a_bad_key_shows_only_where_it_is_seen(bad, options):
    check(replace(CASE, bad_key=bad, **options))


def test_a_bad_key_that_a_mask_hides_does_not_show():
    case = replace(CASE, mask="dense", bad_key=math.nan, causal=False)
    inputs = case.inputs()
    out = run(case, inputs, "triton")
    seen = inputs["attn_mask"][0, 0, :, 35]  # where `Case.inputs` puts the bad number
    assert torch.equal(out.isnan().all(-1)[0, 0], seen)
    assert torch.equal(out.isnan().any(-1)[0, 0], seen)


@pytest.mark.parametrize("mask", ["sparse", "empty rows", "additive"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(70, 70), (40, 90), (90, 40)])
def test_visited_tiles_are_those_that_a_row_sees(mask, causal, lengths):
    case = replace(CASE, mask=mask, lengths=lengths, batch=2, heads=(2, 1), mask_shape="BH")
    tensor = case.inputs()["attn_mask"]
    m, n = lengths
    block_m, block_n, tile = 16, 8, CONFIG.tile
    position = torch.arange(m) + n - m
    seen = tensor if tensor.dtype == torch.bool else tensor > torch.finfo(tensor.dtype).min
    if causal:
        visible = torch.arange(n) <= position[:, None]
        seen = seen & visible
    if tensor.dtype != torch.bool:  # a row that sees nothing gets the mean of all it may see
        empty = ~seen.any(-1, keepdim=True)
        seen = seen | (empty & (visible if causal else True))
    for high in (False, True):
        tiles = visited_tiles(tensor, CONFIG, causal=causal, high=high, block_m=block_m, block_n=block_n)
        for b in range(2):
            for h in range(2):
                for row, (count, *blocks) in enumerate(tiles[b, h].tolist()):
                    first = (n - m) // block_m * block_m + row * block_m
                    rows = (position >= first) & (position < first + block_m)
                    visited = set(blocks[:count])
                    for block in range(-(-n // block_n)):
                        start = block * block_n
                        distance = first // tile - start // tile
                        near = (distance if causal else abs(distance)) < CONFIG.diagonal_tiles
                        is_high = near or start < CONFIG.sink
                        wanted = bool(seen[b, h, rows, start : start + block_n].any()) and is_high == high
                        assert not wanted or block in visited
                        # what is visited in vain costs time: blocks of a causal row's own tile at most
                        assert wanted or block not in visited or (causal and start + block_n > first)
