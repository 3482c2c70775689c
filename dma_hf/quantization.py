"""`quantize` and `QuantizedTensor`: the definition of every format, in PyTorch, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import rounding
from .config import ScaleRule
from .formats import Format, get_format

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor [..., D] quantised along its last dimension.

    Attributes:
        elements: the encoded elements. FP4: uint8 [..., ceil(D / 2)], two to a byte, the even element in
            the low nibble. E4M3: float8_e4m3fn, E5M2: float8_e5m2, INT8: int8, each [..., D].
        scales: block scales [..., ceil(D / block)]: float8_e8m0fnu (MX formats), float8_e4m3fn (NVFP4),
            or float32 [..., 1] (one a token: "fp8", "int8"; the same for `tokens` of them, if given).
        global_scale: NVFP4's second-level scale, float32 [..., 1]; None for other formats.
        format: the format's entry in `dma_hf.formats.FORMATS`.
        length: D, the logical length of the last dimension.
    """

    elements: Tensor
    scales: Tensor
    global_scale: Tensor | None
    format: Format
    length: int

    @property
    def shape(self) -> torch.Size:
        """The logical shape [..., D]."""
        return torch.Size((*self.scales.shape[:-1], self.length))

    @property
    def nbytes(self) -> int:
        """Bytes of elements and scales together."""
        parts = (self.elements, self.scales, self.global_scale)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The represented values [..., D]; computed in float32, then rounded once to `dtype`."""
        if self.format.packed:
            values = rounding.decode_e2m1(rounding.unpack_fp4(self.elements, self.length))
        else:
            values = self.elements.float()
        scales = self.scales.float()
        if self.global_scale is not None:
            scales = scales * self.global_scale
        block = self.format.block or self.length
        return (values * scales.repeat_interleave(block, dim=-1)[..., : self.length]).to(dtype)


def quantize(x: Tensor, format: str, *, scale_rule: ScaleRule = "floor", tokens: int = 1) -> QuantizedTensor:
    """Quantise the last dimension of `x`.

    A last dimension that is no multiple of the format's block ends in a shorter block. A block of zeros
    gives zeros. A NaN or Inf makes the scale it falls under NaN (NVFP4: the token's), so it shows in its
    own block or token when dequantised and nowhere else.

    Args:
        x: [..., D], bfloat16, float16 or float32, D at least 1.
        format: one of `dma_hf.formats.FORMAT_NAMES`, "none" excepted.
        scale_rule: "floor" (OCP MX v1.0) or "ceil" (nothing saturates); only E8M0 scales heed it.
        tokens: rows along the second-last dimension that share a float32 scale, which a row with a NaN or
            Inf does not enter; 1 unless the format has float32 scales (`Format.key_tokens`).

    Raises:
        ValueError: unknown format or scale rule, or `x` has no last dimension.
        TypeError: `x` is not bfloat16, float16 or float32.
    """
    fmt = get_format(format)
    if scale_rule not in ("floor", "ceil"):
        raise ValueError(f"scale_rule={scale_rule!r} is not accepted; choose from floor, ceil")
    if not isinstance(x, Tensor) or x.dtype not in INPUT_DTYPES:
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x has dtype {given}; accepted are bfloat16, float16 and float32 tensors")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}; a last dimension of at least 1 is needed")

    if tokens < 1 or (tokens > 1 and (fmt.scale != "float32" or x.ndim < 2)):
        raise ValueError(f"tokens={tokens} is not accepted for format {fmt.name!r} and {x.ndim} dimensions")

    length = x.shape[-1]
    block = fmt.block or length
    padding = -length % block
    # zeros added to a short last block never change its maximum
    blocks = torch.nn.functional.pad(x.float(), (0, padding)).unflatten(-1, (-1, block))
    # amax over magnitudes carries NaN and Inf into the scale, where they are encoded as NaN
    block_max = blocks.abs().amax(dim=-1)

    global_scale = None
    if fmt.scale == "e8m0":
        code = rounding.e8m0_scale(block_max, fmt, scale_rule)
        scales = code.view(torch.float8_e8m0fnu)
        # dividing by a power of two is multiplying by its inverse, exactly
        scaled = blocks * rounding.inverse_e8m0(code).unsqueeze(-1)
        bad = code == rounding.E8M0_NAN
    elif fmt.global_scale:
        token_max = block_max.amax(dim=-1, keepdim=True)
        global_scale = _float32_scale(token_max, fmt.element_max * torch.finfo(torch.float8_e4m3fn).max)
        # below the smallest E4M3 a block would lose its scale, not just precision
        relative = _divide(block_max, fmt.element_max) / global_scale
        scales = rounding.encode_e4m3(relative.clamp(min=rounding.E4M3_SMALLEST))
        scaled = blocks / (scales.float() * global_scale).unsqueeze(-1)
        bad = global_scale.isnan().expand_as(block_max)
    else:
        scales = _float32_scale(block_max if tokens == 1 else _shared(block_max, tokens), fmt.element_max)
        scales = torch.where(block_max.isfinite(), scales, torch.nan)
        scaled = blocks / scales.unsqueeze(-1)
        bad = scales.isnan()

    scaled = torch.where(bad.unsqueeze(-1), 0.0, scaled)  # the scale carries the NaN, elements are zeros
    scaled = scaled.flatten(-2)[..., :length]
    return QuantizedTensor(_encode(scaled, fmt), scales, global_scale, fmt, length)


def _shared(token_max: Tensor, tokens: int) -> Tensor:
    """The largest finite value of each group of `tokens` rows of [..., N, 1], for each of its rows."""
    count = token_max.shape[-2]
    finite = torch.where(token_max.isfinite(), token_max, 0.0)
    groups = torch.nn.functional.pad(finite, (0, 0, 0, -count % tokens)).unflatten(-2, (-1, tokens))
    return groups.amax(-2, keepdim=True).expand_as(groups).flatten(-3, -2)[..., :count, :]


def _float32_scale(maximum: Tensor, element_max: float) -> Tensor:
    """maximum / element_max, kept normal so that zeros divide to zeros; NaN for a non-finite maximum."""
    scale = _divide(maximum, element_max).clamp(min=rounding.SMALLEST_SCALE)
    return torch.where(maximum.isfinite(), scale, torch.full_like(scale, torch.nan))


def _divide(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, correctly rounded on every device: CUDA multiplies by the inverse of a Python number."""
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)


def _encode(scaled: Tensor, fmt: Format) -> Tensor:
    if fmt.element == "e2m1":
        return rounding.pack_fp4(rounding.encode_e2m1(scaled))
    if fmt.element == "e4m3":
        return rounding.encode_e4m3(scaled)
    if fmt.element == "e5m2":
        return rounding.encode_e5m2(scaled)
    return rounding.encode_int8(scaled)
