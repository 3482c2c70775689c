"""`quantize`: every format, bit for bit against the independent implementation in oracles.py."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dma_hf import quantize
from dma_hf.rounding import unpack_fp4

FORMATS = oracles.FORMATS
each_format = pytest.mark.parametrize("name", FORMATS)
each_rule = pytest.mark.parametrize("rule", ["floor", "ceil"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def codes_of(t) -> np.ndarray:
    """Element codes, one a byte."""
    elements = unpack_fp4(t.elements, t.length) if t.format.packed else t.elements
    return elements.contiguous().view(torch.uint8).numpy()


def assert_equals_oracle(x: Tensor, name: str, rule: str = "floor") -> None:
    """Elements, scales, global scale and values are those of the oracle, bit for bit; NaN equals NaN."""
    t = quantize(x, name, scale_rule=rule)
    expected = oracles.quantize(x.float().numpy(), name, rule)
    assert t.shape == x.shape
    np.testing.assert_array_equal(codes_of(t), expected.codes)
    if t.format.scale == "float32":
        np.testing.assert_array_equal(t.scales.numpy(), expected.scales)
    elif name != "nvfp4":
        np.testing.assert_array_equal(t.scales.view(torch.uint8).numpy(), expected.scales.view(np.uint8))
    if name == "nvfp4":
        np.testing.assert_array_equal(t.global_scale[..., 0].numpy(), expected.global_scale)
        finite = np.isfinite(expected.global_scale)  # a NaN token's block scales mean nothing
        ours = t.scales.view(torch.uint8).numpy()
        np.testing.assert_array_equal(ours[finite], expected.scales.view(np.uint8)[finite])
    else:
        assert t.global_scale is None
    np.testing.assert_array_equal(t.dequantize().numpy(), expected.values)


def random_rows(*shape: int, seed: int = 0) -> Tensor:
    """Normal values whose rows differ by many binades."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g)
    return x * torch.exp2(torch.randint(-20, 20, (*shape[:-1], 1), generator=g).float())


@each_format
@each_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_random_values(name, rule, dtype):
    x = random_rows(2, 3, 17, 128)
    x = x.clamp(-6e4, 6e4).to(dtype)  # stay finite in fp16
    assert_equals_oracle(x, name, rule)


@each_format
@pytest.mark.parametrize("length", [1, 7, 16, 31, 33, 64, 80, 96, 100, 127, 192])
def test_last_dimension_that_is_no_multiple_of_the_block(name, length):
    assert_equals_oracle(random_rows(5, length, seed=length), name)


def outlier(value: float) -> Tensor:
    x = torch.full((64,), 0.37)
    x[5] = value
    return x


ADVERSARIAL = {
    "zeros": torch.zeros(64),
    "minus zeros": -torch.zeros(64),
    "one block of zeros": torch.cat(
        (torch.zeros(32), torch.randn(32, generator=torch.Generator().manual_seed(1)))
    ),
    "all negative": -torch.arange(1.0, 65.0),
    "float32 subnormals": torch.arange(64) * 2.0**-149,
    "smallest subnormal": torch.full((64,), 2.0**-149),
    "smallest normal": torch.full((64,), 2.0**-126),
    "around the smallest E8M0": torch.exp2(torch.arange(-149.0, -85.0)),
    "huge": torch.linspace(-3.4e38, 3.4e38, 64),
    "largest float32": torch.full((64,), torch.finfo(torch.float32).max),
    "whole range": torch.exp2(torch.linspace(-149.0, 127.0, 64)),
    "one outlier": outlier(1e6),
    "one negative outlier": outlier(-3e38),
    "zeros but for one subnormal": torch.zeros(64).index_fill(0, torch.tensor([9]), 1e-40),
    "ties of e2m1": torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 8),
    "ties of e4m3": (torch.arange(64) * 2 + 1) * 0.5 + 256.0,
    "below a power of two": torch.full((64,), float(np.nextafter(np.float32(4), np.float32(0)))),
    "powers of two": torch.exp2(torch.arange(-32.0, 32.0)),
    "the element maxima": torch.tensor([6.0, 448.0, 57344.0, 127.0] * 16),
}


@each_format
@each_rule
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_adversarial_values(name, rule, case):
    x = ADVERSARIAL[case]
    assert_equals_oracle(torch.stack((x, -x, x.flip(0))), name, rule)


@each_format
@given(data=st.data())
@settings(max_examples=40)
def test_any_finite_float32(name, data):
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=40))
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    x = data.draw(hnp.arrays(np.float32, shape, elements=finite))
    rule = data.draw(st.sampled_from(["floor", "ceil"]))
    assert_equals_oracle(torch.from_numpy(x), name, rule)


@each_format
def test_views_that_are_not_contiguous(name):
    x = random_rows(48, 64)
    assert_equals_oracle(x.t(), name)
    assert_equals_oracle(x[::3, 1::2], name)
    assert_equals_oracle(x[:1].expand(4, 64), name)


@each_format
def test_the_input_is_left_alone(name):
    x = random_rows(4, 64)
    before = x.clone()
    quantize(x, name)
    assert torch.equal(x, before)


@each_format
@each_rule
def test_zeros_give_zeros(name, rule):
    x = torch.zeros(3, 40)
    assert torch.equal(quantize(x, name, scale_rule=rule).dequantize(), x)


@each_format
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_stay_in_their_own_block_or_token(name, bad):
    x = random_rows(3, 96)
    clean = quantize(x, name).dequantize()
    x[1, 40] = bad
    out = quantize(x, name).dequantize()
    # MX formats: the block of 32 that holds element 40; the others have a scale for the whole token
    poisoned = torch.zeros(3, 96, dtype=torch.bool)
    if name.startswith("mx"):
        poisoned[1, 32:64] = True
    else:
        poisoned[1] = True
    assert torch.equal(out.isnan(), poisoned)
    assert torch.equal(out[~poisoned], clean[~poisoned])
    assert_equals_oracle(x, name)


@pytest.mark.parametrize("name", oracles.E8M0_FORMATS)
def test_ceil_never_saturates(name):
    x = random_rows(64, 128)
    t = quantize(x, name, scale_rule="ceil")
    scaled = x / t.scales.float().repeat_interleave(32, -1)
    assert (scaled.abs() <= t.format.element_max).all()
    # and floor does, on the same values, or this test would say nothing
    floor = quantize(x, name, scale_rule="floor")
    assert (x / floor.scales.float().repeat_interleave(32, -1)).abs().max() > t.format.element_max


@pytest.mark.parametrize(
    ("name", "relative_to_block_maximum"),
    [
        # half the spacing below the largest element, over the smallest maximum a scale may stand for
        ("mxfp8", 16 / 224),
        ("mxfp8_e5m2", 4096 / 28672),
        ("mxfp4", 1 / 3),
        ("nvfp4", (1 / 6) * 17 / 16),  # the block scale itself is rounded, by up to 1/16
        ("fp8", 16 / 448),
        ("int8", 0.5 / 127),
    ],
)
def test_error_is_within_half_a_step_of_the_block(name, relative_to_block_maximum):
    x = random_rows(64, 128)
    t = quantize(x, name, scale_rule="ceil")
    block = t.format.block or 128
    error = (t.dequantize() - x).abs().unflatten(-1, (-1, block)).amax(-1)
    maximum = x.abs().unflatten(-1, (-1, block)).amax(-1)
    assert (error <= maximum * relative_to_block_maximum * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", ["fp8", "int8", "nvfp4"])
def test_the_scale_follows_the_largest_magnitude_not_the_largest_value(name):
    # the published code takes |max(x)|
    x = torch.tensor([[-100.0, 1.0, 0.5, 0.25]])
    assert quantize(x, name).dequantize()[0, 0].item() == pytest.approx(-100.0, rel=1e-6)


def test_nvfp4_keeps_a_small_block_beside_a_large_one():
    x = torch.cat((torch.full((16,), 1000.0), torch.full((16,), 0.01)))
    # without the floor under its scale the second block would divide by zero
    out = quantize(x, "nvfp4").dequantize()
    assert out.isfinite().all()
    assert out[:16].tolist() == [1000.0] * 16


@pytest.mark.parametrize(
    ("name", "elements", "element_dtype", "scales", "scale_dtype", "nbytes"),
    [
        ("mxfp8", 40, torch.float8_e4m3fn, 2, torch.float8_e8m0fnu, 42),
        ("mxfp8_e5m2", 40, torch.float8_e5m2, 2, torch.float8_e8m0fnu, 42),
        ("mxfp4", 20, torch.uint8, 2, torch.float8_e8m0fnu, 22),
        ("nvfp4", 20, torch.uint8, 3, torch.float8_e4m3fn, 27),
        ("fp8", 40, torch.float8_e4m3fn, 1, torch.float32, 44),
        ("int8", 40, torch.int8, 1, torch.float32, 44),
    ],
)
def test_storage(name, elements, element_dtype, scales, scale_dtype, nbytes):
    t = quantize(torch.ones(2, 3, 40), name)
    assert t.elements.shape == (2, 3, elements)
    assert t.elements.dtype == element_dtype
    assert t.scales.shape == (2, 3, scales)
    assert t.scales.dtype == scale_dtype
    assert t.nbytes == 6 * nbytes
    assert t.shape == (2, 3, 40)
    assert t.format.bits * 40 == elements * 8
    if name == "nvfp4":
        assert t.global_scale.shape == (2, 3, 1)
        assert t.global_scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_rounds_once_to_the_dtype_asked_for(dtype):
    t = quantize(random_rows(4, 64), "nvfp4")
    assert torch.equal(t.dequantize(dtype), t.dequantize().to(dtype))


def test_mxfp8_e4m3_is_another_name_of_mxfp8():
    assert quantize(torch.ones(32), "mxfp8_e4m3").format is quantize(torch.ones(32), "mxfp8").format


@each_format
def test_no_tokens(name):
    assert quantize(torch.ones(2, 0, 48), name).dequantize().shape == (2, 0, 48)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.ones(4), {"format": "fp6"}, ValueError, r"format='fp6'.*mxfp8.*int8"),
        (torch.ones(4), {"format": "none"}, ValueError, r'format="none"'),
        (torch.ones(4), {"format": "mxfp4", "scale_rule": "up"}, ValueError, r"scale_rule='up'.*floor, ceil"),
        (torch.ones(4, dtype=torch.float64), {"format": "fp8"}, TypeError, r"x has dtype torch.float64"),
        (torch.ones(4, dtype=torch.int32), {"format": "fp8"}, TypeError, r"x has dtype torch.int32"),
        ([1.0], {"format": "fp8"}, TypeError, r"x has dtype list"),
        (torch.tensor(1.0), {"format": "fp8"}, ValueError, r"x has shape \[\]"),
        (torch.ones(3, 0), {"format": "fp8"}, ValueError, r"x has shape \[3, 0\]"),
    ],
)
def test_bad_input_is_named(x, options, error, message):
    with pytest.raises(error, match=message):
        quantize(x, options.pop("format"), **options)
