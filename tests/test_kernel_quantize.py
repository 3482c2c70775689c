"""The fused quantiser against `dma_hf.quantize`, bit for bit."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, FORMATS, LAYOUTS, laid_out, pairwise
from torch import Tensor

from dma_hf import DMAConfig, quantize
from dma_hf.formats import FORMATS as TABLE
from dma_hf.kernels.quantize import TILE, KeyOperand, QuantizedKey, quantize_key
from dma_hf.policy import operand_kind
from dma_hf.rounding import decode_e2m1, unpack_fp4
from dma_hf.transforms import key_mean, rotate

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def make_key(
    length: int = 200, dim: int = 64, dtype: torch.dtype = torch.bfloat16, layout: str = "transposed"
) -> Tensor:
    """[2, 2, N, D] on DEVICE: rows of very different size, large channel means, a token of zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, length, dim, generator=generator)
    x = x * torch.randn(2, 2, length, 1, generator=generator).exp() + 3 * torch.randn(
        1, 2, 1, dim, generator=generator
    )
    x[:, 0, length // 2] = 0
    return laid_out(x.to(dtype).to(DEVICE), layout)


def quantized(
    key: Tensor, config: DMAConfig, capability: int, key_ranges: Tensor | None = None
) -> QuantizedKey:
    kinds = (operand_kind(config.low, capability), operand_kind(config.high, capability))
    return quantize_key(key, config, *kinds, key_ranges=key_ranges)


def unswizzle(block_scales: Tensor) -> Tensor:
    """Blackwell's layout [B, H, tiles, groups, 32, 4, 4] as [B, H, rows, blocks]."""
    return block_scales.permute(0, 1, 2, 5, 4, 3, 6).flatten(5).flatten(2, 4)


def equal(a: Tensor, b: Tensor) -> bool:
    """Same values, and NaN in the same places."""
    a, b = a.cpu().float(), b.cpu().float()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_is_quantized(operand: KeyOperand, x: Tensor, rule: str = "floor") -> None:
    """`operand` [B, H, rows, D] is what the definition makes of `x` [B, H, N, D], and zeros after it."""
    length, dim = x.shape[2:]
    expected = quantize(x, operand.format, scale_rule=rule)
    elements = operand.elements.cpu()
    assert not elements[:, :, length:].float().any() if elements.dtype != torch.uint8 else True
    elements = elements[:, :, :length]
    token_scale = None if operand.scale is None else operand.scale.cpu()[:, :, :length]

    if operand.kind == "scaled":
        assert torch.equal(elements.view(torch.uint8), expected.elements.view(torch.uint8))
        blocks = expected.scales.shape[-1]
        block_scales = unswizzle(operand.block_scales).cpu()[:, :, :length, :blocks]
        assert torch.equal(block_scales, expected.scales.view(torch.uint8))
        if expected.global_scale is not None:
            assert equal(token_scale, expected.global_scale[..., 0])
    elif operand.format == "nvfp4":
        # the elements times their block scales, exactly; the token scale apart
        values = decode_e2m1(unpack_fp4(expected.elements, dim))
        block = TABLE["nvfp4"].block
        products = values * expected.scales.float().repeat_interleave(block, -1)[..., :dim]
        good = token_scale.isfinite()  # a token that holds a NaN or Inf has a NaN here, whatever its elements
        assert torch.equal(elements.float()[good], products[good])
        assert equal(token_scale, expected.global_scale[..., 0])
    elif TABLE[operand.format].block is None:  # one scale a token
        assert torch.equal(elements.float(), expected.elements.float())
        assert equal(token_scale, expected.scales[..., 0])
    elif operand.kind == "e4m3":  # MXFP4 with one scale a tile
        scale = operand.scale.cpu().repeat_interleave(TILE, -1)[:, :, :length, None]
        assert equal(elements.float() * scale, expected.dequantize())
    else:
        assert equal(elements, expected.dequantize())


def assert_all_is_quantized(key: Tensor, config: DMAConfig, capability: int) -> None:
    result = quantized(key, config, capability)
    x = key.float().cpu()
    assert (result.mean is not None) == (config.smooth_k and config.quantizes)
    if result.mean is not None:
        x = x - result.mean.cpu()[:, :, None]
    if config.rotate:
        x = rotate(x)
    for operand in (result.low, result.high):
        if operand.kind != "raw":
            assert_is_quantized(operand, x, config.scale_rule)


CASES = list(
    pairwise(
        low=FORMATS,
        high=FORMATS,
        dim=(64, 32, 80, 96, 128, 192, 256),
        length=(129, 1, 17, 127, 128, 300),
        dtype=DTYPES,
        layout=LAYOUTS,
        rotate=(False, True),
        smooth=(True, False),
        rule=("floor", "ceil"),
        capability=(80, 90, 100),
    )
)


@pytest.mark.parametrize("choice", CASES, ids=["-".join(map(str, choice.values())) for choice in CASES])
def test_pairwise_covering(choice):
    key = make_key(choice["length"], choice["dim"], choice["dtype"], choice["layout"])
    config = DMAConfig(
        low=choice["low"], high=choice["high"], rotate=choice["rotate"], smooth_k=choice["smooth"],
        scale_rule=choice["rule"],
    )  # fmt: skip
    assert_all_is_quantized(key, config, choice["capability"])


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("config", ["paper", "low=mxfp4,high=mxfp8_e5m2,rotate=true", "low=fp8,high=int8"])
def test_a_bad_token_spoils_its_own_block_or_token_only(config, capability):
    key = make_key()
    key[0, 0, 5, 3], key[0, 1, 150, 40], key[1, 1, 199, 63] = torch.nan, torch.inf, -torch.inf
    assert_all_is_quantized(key, DMAConfig.parse(config), capability)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("config", ["low=nvfp4,high=mxfp8", "low=mxfp4,high=int8", "low=fp8,high=mxfp8_e5m2"])
def test_every_element_is_written_and_rows_beyond_the_end_are_zeros(
    config, capability, uninitialized_memory_is_nan
):
    key = make_key(150, 80)
    config = DMAConfig.parse(config)
    assert_all_is_quantized(key, config, capability)
    result = quantized(key, config, capability)
    for operand in (result.low, result.high):
        assert not operand.elements[:, :, 150:].view(torch.uint8).any()


def test_padding_is_left_out():
    key = make_key(100)
    ranges = torch.tensor([[30, 95], [0, 0]], dtype=torch.int32, device=DEVICE)
    config = DMAConfig(low="nvfp4", high="mxfp8")
    padded = quantized(key, config, 100, ranges)
    alone = quantized(key[:1, :, 30:95], config, 100)
    assert torch.equal(padded.mean[:1], alone.mean)
    assert not padded.mean[1].any()
    for operand, expected in ((padded.low, alone.low), (padded.high, alone.high)):
        assert torch.equal(operand.elements[:1].view(torch.uint8), expected.elements.view(torch.uint8))
        blocks = 64 // TABLE[operand.format].block
        ours, theirs = (unswizzle(o.block_scales)[:1, :, :65, :blocks] for o in (operand, expected))
        assert torch.equal(ours, theirs)
        assert not operand.elements[1].view(torch.uint8).any()


@pytest.mark.parametrize("length", [1, 17, 129, 3000])
def test_mean(length):
    key = make_key(length, 96)
    mean = quantized(key, DMAConfig(), 90).mean.cpu()
    expected = key.cpu().double().mean(2)
    largest = key.cpu().double().abs().mean(2)
    assert ((mean - expected).abs() <= 1e-6 * largest).all()


def test_mean_counts_nan_and_inf_as_zeros():
    key = make_key(130)
    key[0, 0, 3], key[0, 1, 7, 5], key[1, 0, 129, 9] = torch.nan, torch.inf, -torch.inf
    mean = quantized(key, DMAConfig(), 90).mean.cpu()
    assert mean.isfinite().all()
    torch.testing.assert_close(mean, key_mean(key.cpu())[:, :, 0])


@pytest.mark.parametrize("config", ["paper", "low=mxfp4,high=int8"])
def test_two_runs_give_the_same_bits(config):
    key = make_key(3000)
    first, second = (quantized(key, DMAConfig.parse(config), 90) for _ in range(2))
    assert torch.equal(first.mean, second.mean)
    for a, b in ((first.low, second.low), (first.high, second.high)):
        assert torch.equal(a.elements.view(torch.uint8), b.elements.view(torch.uint8))


# --- MXFP4 on FP8 tensor cores ------------------------------------------------------------------------


def mxfp4_tile(differences: list[int], exponent: int = 3) -> Tensor:
    """[1, 1, len, 64]: block 0 of every token has block exponent `exponent`, block 1 a smaller one.

    Both blocks hold every E2M1 number with either sign, so that quantising changes nothing.
    """
    block = torch.cat([E2M1, -E2M1, E2M1, -E2M1])
    rows = [torch.cat([block * 2.0**exponent, block * 2.0 ** (exponent - d)]) for d in differences]
    return torch.stack(rows)[None, None].to(DEVICE)


def mxfp4_values(key: Tensor) -> Tensor:
    """What the E4M3 tensor core sees of `key`, scale included."""
    operand = quantized(key, DMAConfig(low="mxfp4", high="mxfp4", smooth_k=False), 90).low
    assert operand.elements.dtype == torch.float8_e4m3fn
    scale = operand.scale.repeat_interleave(TILE, -1)[:, :, : key.shape[2], None]
    return operand.elements[:, :, : key.shape[2]].float() * scale


@pytest.mark.parametrize("exponent", [-100, 0, 3, 100])
def test_mxfp4_is_exact_in_e4m3_for_differences_up_to_14(exponent):
    key = mxfp4_tile(list(range(15)), exponent)
    assert torch.equal(mxfp4_values(key), key)


@pytest.mark.parametrize("difference", [15, 16, 20, 60])
def test_mxfp4_further_below_loses_less_than_2_to_the_minus_14_of_the_largest(difference):
    key = mxfp4_tile([0, difference])
    error = (mxfp4_values(key) - key).abs()
    assert error.max() > 0  # so the bound on the differences above is the best there is
    assert error.max() <= 2.0**-14 * key.abs().max()
    assert not error[..., :32].any()  # the large blocks are exact as ever
