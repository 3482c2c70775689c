"""Element and scale encodings, for every finite bf16 and fp16 value, against ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dma_hf import rounding
from dma_hf.formats import FORMATS


def every_finite(dtype: torch.dtype) -> Tensor:
    """All 65,536 bit patterns of a 16-bit type, as float32, NaN and Inf left out."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    return x[x.isfinite()]


def bits(x: Tensor) -> np.ndarray:
    return x.view(torch.uint8).numpy()


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def test_every_finite_value_is_enumerated():
    assert every_finite(torch.bfloat16).numel() == 2**16 - 2 * 2**7  # one exponent of two signs left out
    assert every_finite(torch.float16).numel() == 2**16 - 2 * 2**10


@DTYPES
@pytest.mark.parametrize(
    ("encode", "element", "largest"),
    [
        (rounding.encode_e2m1, ml_dtypes.float4_e2m1fn, 6.0),
        (rounding.encode_e4m3, ml_dtypes.float8_e4m3fn, 448.0),
        (rounding.encode_e5m2, ml_dtypes.float8_e5m2, 57344.0),
    ],
    ids=["e2m1", "e4m3", "e5m2"],
)
def test_elements_equal_ml_dtypes_for_every_finite_value(dtype, encode, element, largest):
    x = every_finite(dtype)
    expected = oracles.encode(x.numpy(), element, largest).view(np.uint8)
    np.testing.assert_array_equal(bits(encode(x)), expected)


@DTYPES
@pytest.mark.parametrize("rule", ["floor", "ceil"])
@pytest.mark.parametrize("name", ["mxfp8", "mxfp8_e5m2", "mxfp4"])
def test_block_scales_equal_ml_dtypes_for_every_finite_block_maximum(dtype, rule, name):
    maximum = every_finite(dtype)
    maximum = maximum[maximum >= 0]
    code = rounding.e8m0_scale(maximum, FORMATS[name], rule)
    exponent = oracles.e8m0_exponent(maximum.numpy(), oracles.SPECS[name], rule)
    expected = np.exp2(exponent).astype(ml_dtypes.float8_e8m0fnu)
    np.testing.assert_array_equal(code.numpy(), expected.view(np.uint8))


@pytest.mark.parametrize("name", ["mxfp8", "mxfp8_e5m2", "mxfp4"])
def test_ceil_is_the_smallest_scale_under_which_nothing_saturates(name):
    maximum = every_finite(torch.bfloat16)
    maximum = maximum[maximum > 0].double()
    fmt = FORMATS[name]
    scale = torch.exp2(rounding.e8m0_scale(maximum.float(), fmt, "ceil").double() - 127)
    assert (maximum / scale <= fmt.element_max).all()
    not_smallest_code = scale > 2.0**-127
    assert (maximum / (scale / 2) > fmt.element_max)[not_smallest_code].all()


@pytest.mark.parametrize("rule", ["floor", "ceil"])
def test_scale_of_a_non_finite_maximum_is_the_e8m0_nan(rule):
    maximum = torch.tensor([torch.nan, torch.inf])
    assert rounding.e8m0_scale(maximum, FORMATS["mxfp4"], rule).tolist() == [255, 255]


def test_inverse_e8m0_is_the_exact_inverse():
    code = torch.arange(255, dtype=torch.uint8)
    inverse = rounding.inverse_e8m0(code).double()
    assert torch.equal(inverse, torch.exp2(127 - code.double()))
    assert rounding.inverse_e8m0(torch.tensor([255], dtype=torch.uint8)).isnan().all()


def test_e2m1_decodes_to_the_sixteen_values_of_the_specification():
    codes = np.arange(16, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    decoded = rounding.decode_e2m1(torch.from_numpy(codes))
    np.testing.assert_array_equal(decoded.numpy(), expected)
    assert torch.signbit(decoded[8])  # minus zero keeps its sign
    assert torch.equal(rounding.encode_e2m1(decoded), torch.from_numpy(codes))


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        # the published code rounds 0.125 ... 0.25 up to 0.5, and 1.75 ... 2 and 3.5 ... 4 down
        (0.125, 0.0), (0.2, 0.0), (0.25, 0.0), (0.26, 0.5),
        (1.75, 2.0), (1.9, 2.0), (1.74, 1.5),
        (3.5, 4.0), (3.9, 4.0), (3.49, 3.0),
        # the other ties, and saturation
        (0.75, 1.0), (1.25, 1.0), (2.5, 2.0), (5.0, 4.0), (5.01, 6.0), (7.9, 6.0), (1e30, 6.0),
    ],
)  # fmt: skip
def test_e2m1_rounds_to_nearest_even(x, expected):
    both_signs = rounding.decode_e2m1(rounding.encode_e2m1(torch.tensor([x, -x])))
    assert both_signs.tolist() == [expected, -expected]


def test_int8_rounds_ties_to_even_and_saturates_symmetrically():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, 1e9, -127.5, -128.0, -1e9])
    expected = [0, 2, 2, 0, -2, -2, 126, 127, 127, -127, -127, -127]
    assert rounding.encode_int8(x).tolist() == expected


def test_fp8_encodings_keep_nan():
    nan = torch.tensor([torch.nan])
    assert rounding.encode_e4m3(nan).float().isnan().all()
    assert rounding.encode_e5m2(nan).float().isnan().all()


def test_even_elements_are_packed_into_the_low_nibble():
    packed = rounding.pack_fp4(torch.tensor([0x1, 0x2, 0xF], dtype=torch.uint8))
    assert packed.tolist() == [0x21, 0x0F]


@given(codes=st.lists(st.integers(0, 15), min_size=1, max_size=70), rows=st.integers(1, 3))
def test_unpack_is_the_inverse_of_pack(codes, rows):
    code = torch.tensor([codes] * rows, dtype=torch.uint8)
    packed = rounding.pack_fp4(code)
    assert packed.shape == (rows, (len(codes) + 1) // 2)
    assert torch.equal(rounding.unpack_fp4(packed, len(codes)), code)
