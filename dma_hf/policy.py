"""The one place where it is decided what runs: which backend, which tensor-core operands, what SDPA keeps."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
import triton

from .config import DMAConfig
from .formats import NONE, get_format
from .memo import memoized

# A decode step reads the unquantised cache once. Quantising it first would read it once as well and then
# write and read it again, so there is nothing to save: SDPA already runs at the card's copy rate.
MAX_DECODE_QUERIES = 16

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
"""Head dimensions the kernels are built and tested for."""

FP8_CAPABILITY = 89
MIN_CAPABILITY = 80
"""Ampere: the first architecture with bfloat16 tensor cores."""

OperandKind = Literal["raw", "16bit", "e4m3", "int8", "scaled"]
"""What the tensor core multiplies.

"raw": Q and K as given. "16bit": dequantised elements in bfloat16. "e4m3", "int8": 8-bit elements, one
scale a token or tile. "scaled": elements and block scales, multiplied by the hardware (`tl.dot_scaled`).
"""


def is_decode_step(query_length: int, key_length: int) -> bool:
    """Whether a call is a decode step (a few queries against a longer cache), which SDPA serves."""
    return query_length <= MAX_DECODE_QUERIES and query_length < key_length


def runs_on_sdpa(
    config: DMAConfig, query_length: int, key_length: int, causal: bool, unmodified: bool
) -> bool:
    """Whether a call is too short for `config.min_length`, and one that SDPA computes as it is.

    SDPA aligns causal queries to the first keys, so fewer queries than keys are another computation.
    """
    short = key_length < config.min_length
    return short and unmodified and not (causal and query_length != key_length)


def operand_kind(format: str, capability: int) -> OperandKind:
    """What a format becomes on a GPU of compute capability `capability` (90 for sm_90).

    Every choice is exact: the products are those of the dequantised elements, to the last bit.
    """
    if format == NONE:
        return "raw"
    if capability >= 100 and get_format(format).block is not None:
        return "scaled"
    fmt = get_format(format)
    if fmt.element == "int8":
        # Triton has no INT8 MMA for sm_100 and later; INT8 elements are exact in bfloat16
        return "int8" if capability < 100 else "16bit"
    # MXFP4 is exact on FP8 tensor cores (dma.md, section 3); NVFP4's and MXFP8's elements times
    # their block scales are not all E4M3 numbers, but are all bfloat16 numbers
    if (format == "mxfp4" or (fmt.element == "e4m3" and fmt.scale == "float32")) and capability >= 89:
        return "e4m3"
    return "16bit"


class DMAFallbackWarning(UserWarning):
    """The kernels cannot run a call, so something slower does. Once for each reason.

    `warnings.simplefilter("error", DMAFallbackWarning)` makes it an error.
    """


_warned: set[str] = set()


@torch.compiler.assume_constant_result
def warn_fallback(message: str) -> None:
    """Warn of a fallback, once for each message."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, DMAFallbackWarning, stacklevel=4)


def forget_warnings() -> None:
    """Let `warn_fallback` say everything once more."""
    _warned.clear()


def why_sdpa(head_dim: int, value_dim: int, device: torch.device, dropout: float, paged: bool) -> str | None:
    """Why SDPA must serve a layer's call instead of dma; None where dma serves it."""
    if dropout:
        return f"attention dropout (dropout={dropout}), which only training uses; model.eval() turns it off"
    if paged:
        return "the paged cache of continuous batching"
    if device.type == "cuda":
        # the reference would do it, too slowly for a model
        return _why_not_head_dim(head_dim, value_dim)
    return None


def _why_not_head_dim(head_dim: int, value_dim: int) -> str | None:
    for name, size in (("head_dim", head_dim), ("head_dim of value", value_dim)):
        if not MIN_HEAD_DIM <= size <= MAX_HEAD_DIM or size % 8:
            return f"{name}={size} is no multiple of 8 from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    return None


def choose_backend(config: DMAConfig, device: torch.device, head_dim: int, value_dim: int) -> str:
    """The backend for one call: "reference" or "triton".

    "auto" takes the kernels on a CUDA device and the reference elsewhere; on a CUDA device that the
    kernels cannot serve it warns with a `DMAFallbackWarning`.

    Raises:
        ValueError: `backend="triton"` where the kernels cannot run.
    """
    if config.backend == "reference":
        return "reference"
    why_not = _why_not_triton(config, device, head_dim, value_dim)
    if config.backend == "triton":
        if why_not is not None:
            raise ValueError(f'backend="triton": {why_not}; accepted is backend="auto" or "reference"')
        return "triton"
    if device.type != "cuda":
        return "reference"
    if why_not is not None:
        warn_fallback(f"dma runs on the PyTorch reference: {why_not}")
        return "reference"
    capability = device_capability(device)
    if capability not in RUN_ON:
        _announce_untested(capability)
    return "triton"


def _why_not_triton(config: DMAConfig, device: torch.device, head_dim: int, value_dim: int) -> str | None:
    on_gpu = device.type == "cuda"
    if not on_gpu and not (device.type == "cpu" and interpreting()):
        return f"the kernels need a CUDA device, not {device.type} (or TRITON_INTERPRET=1)"
    head_dim_reason = _why_not_head_dim(head_dim, value_dim)
    if head_dim_reason is not None or not on_gpu:
        return head_dim_reason
    capability = device_capability(device)
    if config.pv == "fp8" and capability < FP8_CAPABILITY:
        return f"pv='fp8' needs FP8 tensor cores (sm_{FP8_CAPABILITY}), not sm_{capability}"
    if capability < MIN_CAPABILITY:
        return f"the kernels need sm_{MIN_CAPABILITY} or later, not sm_{capability}"
    return None


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1), as the tests do."""
    return bool(triton.knobs.runtime.interpret)


@torch.compiler.assume_constant_result
@memoized
def device_capability(device: torch.device) -> int:
    """Compute capability as one number: 90 for sm_90. The interpreter acts as sm_90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@memoized
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere, where kernels are only compiled or interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


RUN_ON = (90,)
"""Architectures on which this project has run its kernels, not only compiled them."""


@torch.compiler.assume_constant_result
@memoized
def _announce_untested(capability: int) -> None:
    # once for each architecture
    warnings.warn(
        f"dma kernels on sm_{capability}: compiled and checked, never run by this project on this hardware",
        stacklevel=3,
    )
