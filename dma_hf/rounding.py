"""Element and scale encodings, bit for bit: round to nearest, ties to even, saturating.

Every function takes float32 and is exact: the same codes as ml_dtypes gives for every finite input in
range, with out-of-range values saturated to the largest finite element. Codes of E4M3 and E5M2 are
torch's own float8 dtypes; E2M1 codes are uint8 in 0..15 (sign, two exponent bits, one mantissa bit).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import Format

# E2M1 magnitudes by code, and the ties between neighbours. A tie goes to the even code, so a magnitude
# on a tie moves up from an odd code ("at least") and stays on an even one ("greater than").
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1_UP_WHEN_GREATER = (0.25, 1.25, 2.5, 5.0)
_E2M1_UP_WHEN_AT_LEAST = (0.75, 1.75, 3.5)

E8M0_BIAS = 127
E8M0_NAN = 255

# Scales below the smallest normal float32 would make the division by them inexact or infinite.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
E4M3_SMALLEST = 2.0**-9
"""Smallest positive E4M3 number."""


def encode_e2m1(x: Tensor) -> Tensor:
    """E2M1 codes of `x` (float32, any shape): uint8 in 0..15, bit 3 the sign."""
    magnitude = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for tie in _E2M1_UP_WHEN_GREATER:
        code += magnitude > tie
    for tie in _E2M1_UP_WHEN_AT_LEAST:
        code += magnitude >= tie
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def decode_e2m1(code: Tensor) -> Tensor:
    """The float32 values of E2M1 codes."""
    table = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float32)
    return table.to(code.device)[code.long()]


def encode_e4m3(x: Tensor) -> Tensor:
    """`x` as torch.float8_e4m3fn, saturated to ±448; NaN stays NaN."""
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def encode_e5m2(x: Tensor) -> Tensor:
    """`x` as torch.float8_e5m2, saturated to ±57344; NaN stays NaN."""
    return x.clamp(-57344.0, 57344.0).to(torch.float8_e5m2)


def encode_int8(x: Tensor) -> Tensor:
    """`x` as torch.int8, rounded to nearest even, saturated to the symmetric range ±127."""
    return x.round().clamp(-127.0, 127.0).to(torch.int8)


def e8m0_scale(block_max: Tensor, fmt: Format, rule: str) -> Tensor:
    """E8M0 codes (uint8) of the scales of blocks whose largest magnitude is `block_max`.

    "floor" is OCP MX v1.0, section 6.3: 2^(floor(log2(max)) - emax). "ceil" is the smallest power of two
    under which no element saturates. A NaN or infinite maximum gives the E8M0 NaN; zero gives 2^-127.
    """
    mantissa, exponent = torch.frexp(block_max)  # max = mantissa * 2^exponent, mantissa in [1/2, 1)
    scale_exponent = exponent - 1 - fmt.element_emax
    if rule == "ceil":
        largest = fmt.element_max / 2.0 ** (fmt.element_emax + 1)  # the element maximum's mantissa
        scale_exponent = scale_exponent + (mantissa > largest).int()
    code = (scale_exponent + E8M0_BIAS).clamp(0, 2 * E8M0_BIAS)
    code = torch.where(block_max == 0, torch.zeros_like(code), code)
    code = torch.where(block_max.isfinite(), code, torch.full_like(code, E8M0_NAN))
    return code.to(torch.uint8)


def inverse_e8m0(code: Tensor) -> Tensor:
    """The float32 inverses 2^(127 - code) of E8M0 scales, exactly; code 255 stays NaN."""
    # in uint8, 254 - 255 wraps around to 255, the NaN
    return (2 * E8M0_BIAS - code).view(torch.float8_e8m0fnu).float()


def pack_fp4(code: Tensor) -> Tensor:
    """Pack 4-bit codes [..., D] into bytes [..., ceil(D / 2)]; the even element is the low nibble."""
    if code.shape[-1] % 2:
        code = torch.nn.functional.pad(code, (0, 1))
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack_fp4(packed: Tensor, length: int) -> Tensor:
    """The inverse of `pack_fp4`: `length` codes along the last dimension."""
    pairs = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    return pairs.flatten(-2)[..., :length]
