"""The quantiser of V against the definition in `dma_hf.reference`, bit for bit."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, LAYOUTS, laid_out
from torch import Tensor

from dma_hf.kernels.operands import TILE
from dma_hf.kernels.quantize_value import PERMUTATION, QuantizedValue, quantize_value
from dma_hf.rounding import encode_e4m3
from dma_hf.transforms import key_mean


def make_value(
    length: int = 150, dim: int = 64, dtype: torch.dtype = torch.bfloat16, layout: str = "transposed"
) -> Tensor:
    """[2, 2, N, Dv] on DEVICE: channels of very different size, one of zeros."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 2, length, dim, generator=generator)
    value *= torch.randn(2, 2, 1, dim, generator=generator).mul(2).exp()
    value[..., 1] = 0
    return laid_out(value.to(dtype).to(DEVICE), layout)


def expected(value: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 elements [B, Hkv, N, Dv] as float32, and scales [B, Hkv, Dv], as the reference makes them."""
    value = value.cpu().float()
    finite = value.isfinite()
    channel_max = torch.where(finite, value.abs(), 0.0).amax(-2, keepdim=True)
    scale = (channel_max / 448.0).clamp(min=torch.finfo(torch.float32).tiny)
    elements = encode_e4m3(value / scale).float()
    return torch.where(finite, elements, torch.nan), scale.squeeze(-2)


def assert_is_quantized(quantized: QuantizedValue, value: Tensor) -> None:
    """`quantized`, in the tokens' own order, is what the definition makes of `value`; zeros after it."""
    elements, scale = expected(value)
    length = value.shape[2]
    stored = quantized.elements.cpu().float().transpose(-1, -2)
    assert stored.shape[2] % TILE == 0
    if quantized.permuted:
        order = torch.arange(stored.shape[2]).unflatten(0, (-1, 16))[:, list(PERMUTATION)].flatten()
        unpermuted = torch.empty_like(stored)
        unpermuted[:, :, order] = stored
        stored = unpermuted
    assert torch.equal(quantized.scale.cpu(), scale)
    assert torch.equal(stored[:, :, :length].isnan(), elements.isnan())
    assert torch.equal(stored[:, :, :length].nan_to_num(), elements.nan_to_num())
    assert not stored[:, :, length:].any()


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_definition(dtype: torch.dtype, permuted: bool) -> None:
    value = make_value(dtype=dtype)
    assert_is_quantized(quantize_value(value, smooth=False, permuted=permuted), value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_takes_any_strides(layout: str) -> None:
    value = make_value(length=40, dim=32, layout=layout)
    assert_is_quantized(quantize_value(value, smooth=False), value)


@pytest.mark.parametrize(("length", "dim"), [(1, 16), (128, 128), (129, 80), (300, 256)])
def test_takes_any_shape(length: int, dim: int) -> None:
    value = make_value(length, dim)
    assert_is_quantized(quantize_value(value, smooth=False, permuted=True), value)


def test_bad_tokens_do_not_spoil_their_channel() -> None:
    value = make_value()
    value[0, 0, 3, 5] = torch.inf
    value[0, 1, 4, 6] = torch.nan
    assert_is_quantized(quantize_value(value, smooth=False), value)


def test_the_mean_is_left_out_of_the_rounding() -> None:
    value = make_value().mul(4).round().div(4).clamp(-64, 64)  # sums without rounding, in any order
    value[0, 0, 3, 5] = torch.nan
    quantized = quantize_value(value)
    mean = key_mean(value)
    assert quantized.mean is not None
    assert torch.equal(quantized.mean, mean.squeeze(-2))
    assert_is_quantized(quantized, value.float() - mean)


def test_padding_is_left_out() -> None:
    """Each row is quantised as its own tokens are alone, whatever the padding holds."""
    value = make_value()
    value[0, :, :7] = 1e4
    ranges = torch.tensor([[7, 150], [0, 90]], dtype=torch.int32, device=DEVICE)
    quantized = quantize_value(value, ranges, smooth=False, permuted=True)
    for row, (start, stop) in enumerate(ranges.tolist()):
        one = slice(row, row + 1)
        alone = QuantizedValue(quantized.elements[one], quantized.scale[one], None, True)
        assert_is_quantized(alone, value[one, :, start:stop])
