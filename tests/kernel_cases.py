"""Cases for the kernel tests: inputs in every layout, a pairwise covering of settings, the comparison.

The kernels run on the GPU where there is one, and under Triton's interpreter on a CPU elsewhere (conftest.py
turns it on). The reference always runs on the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import triton
import triton.runtime.interpreter
from torch import Tensor

from dma_hf import DMAConfig, diagonal_tiled_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMATS = ("mxfp8", "mxfp8_e5m2", "mxfp4", "nvfp4", "fp8", "int8", "none")
LAYOUTS = ("contiguous", "transposed", "packed", "unaligned", "broadcast")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Architectures whose choice of operands is tested. The interpreter runs them all (block-scaled products since
# Triton's version that has a function for their scales); a GPU is what it is.
_DECODE_SCALES = getattr(triton.runtime.interpreter, "_dot_scaled_scale_to_f32", None)
CAPABILITIES = (None,) if DEVICE.type == "cuda" else (80, 90, 100) if _DECODE_SCALES else (80, 90)


def act_as(capability: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend choose operands and blocks as on sm_`capability`; None leaves the device's own."""
    if capability is None:
        return
    monkeypatch.setattr("dma_hf.plan.device_capability", lambda device: capability)
    if capability >= 100:
        monkeypatch.setattr("triton.runtime.interpreter._dot_scaled_scale_to_f32", _decode_scales)


def _decode_scales(scale: Any, compute_type: Any) -> Any:
    """The interpreter reads every block scale of `tl.dot_scaled` as E8M0; NVFP4's are E4M3."""
    if scale.dtype == triton.language.float8e4nv:
        return torch.from_numpy(scale.data.copy()).view(torch.float8_e4m3fn).float().numpy()
    assert _DECODE_SCALES is not None
    return _DECODE_SCALES(scale, compute_type)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """`x` [B, H, N, D] with other strides; the last dimension stays contiguous."""
    batch, heads, length, dim = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "broadcast":  # stride 0: every sequence of the batch is the first
        return x[:1].contiguous().expand_as(x)
    if layout == "transposed":  # what Transformers hands over
        view = x.new_empty(batch, length, heads, dim).transpose(1, 2)
    elif layout == "packed":  # a slice of a fused QKV projection
        fused = x.new_empty(batch, length, 3, heads, dim)
        view = fused[:, :, 1].transpose(1, 2)
    else:  # every second token, rows that start at odd addresses
        view = x.new_empty(batch, heads, 2 * length, dim + 3)[:, :, ::2, 1 : dim + 1]
    view.copy_(x)
    return view


SMALL_TILES = DMAConfig(tile=32, diagonal=32, sink=32)


MASKS = ("dense", "sparse", "empty rows", "additive", "infinite", "bias")
"""Kinds of `attn_mask`: bool that hides a little, much, or whole rows; additive with the smallest float or
-inf for "not seen"; a position bias, which hides nothing."""


@dataclass(frozen=True)
class Case:
    """One call of the attention.

    Attributes:
        lengths: M and N. dims: D and Dv. heads: H and Hkv.
        real: a padded row's real tokens, as shares of N; rows take turns.
        sequences: lengths of packed sequences, again from the first when they are used up.
        window: `sliding_window`.
        mask: one of `MASKS`, or "". mask_shape: its batch and heads; "B1", "1H", "11" or "BH".
        bad_key: what one number of K becomes: NaN or an infinity.
    """

    config: DMAConfig = SMALL_TILES
    lengths: tuple[int, int] = (129, 129)
    dims: tuple[int, int] = (64, 64)
    heads: tuple[int, int] = (2, 1)
    batch: int = 1
    causal: bool = True
    real: tuple[tuple[float, float], ...] = ()
    sequences: tuple[int, ...] = ()
    window: int | None = None
    mask: str = ""
    mask_shape: str = "11"
    softcap: float | None = None
    sinks: bool = False
    bad_key: float | None = None
    dtype: torch.dtype = torch.bfloat16
    layout: str = "transposed"

    def inputs(self, device: torch.device = DEVICE, seed: int = 0) -> dict[str, Any]:
        """The tensors of the call, on `device`, by the names that `diagonal_tiled_attention` gives them.

        Keys have large channel means, for smoothing to remove. They lie on a grid on which float32 sums
        are exact: the mean does not depend on the order of addition.
        """
        generator = torch.Generator().manual_seed(seed)
        (m, n), (d, dv), (heads, kv_heads) = self.lengths, self.dims, self.heads

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        key = normal(self.batch, kv_heads, n, d) * 2 + normal(1, kv_heads, 1, d) * 3
        values = {
            "query": normal(self.batch, heads, m, d),
            "key": (key * 16).round().clamp(-255, 255) / 16,
            "value": normal(self.batch, kv_heads, n, dv),
        }
        if self.bad_key is not None:
            values["key"][-1, -1, n // 2, d // 2] = self.bad_key
        tensors: dict[str, Any] = {
            name: laid_out(x.to(self.dtype).to(device), self.layout) for name, x in values.items()
        }
        if self.real:
            padding = torch.zeros(self.batch, n, dtype=torch.bool)
            for row in range(self.batch):
                start, stop = self.real[row % len(self.real)]
                padding[row, round(start * n) : round(stop * n)] = True
            tensors["padding_mask"] = padding.to(device)
        if self.sequences:
            lengths = list(itertools.islice(itertools.cycle(self.sequences), n))
            ids = torch.arange(n).repeat_interleave(torch.tensor(lengths))[:n]
            tensors["sequence_ids"] = ids.expand(self.batch, -1).to(device)
        if self.mask:
            tensors["attn_mask"] = self._mask(generator).to(device)
        if self.sinks:
            tensors["sinks"] = (2 * normal(heads)).to(self.dtype).to(device)
        return tensors

    def _mask(self, generator: torch.Generator) -> Tensor:
        batch = self.batch if self.mask_shape[0] == "B" else 1
        heads = self.heads[0] if self.mask_shape[1] == "H" else 1
        size = (batch, heads, *self.lengths)
        if self.mask == "bias":  # falls with distance, as T5's and ALiBi's do
            distance = torch.arange(size[3]) - torch.arange(size[2])[:, None] + size[2] - size[3]
            bias = torch.randn(size, generator=generator) - 0.05 * distance.abs()
            return bias.to(self.dtype)
        seen = torch.rand(size, generator=generator) < (0.7 if self.mask == "dense" else 0.05)
        if self.mask not in ("dense", "sparse"):
            # whole blocks are hidden, and some rows see nothing
            blocks = torch.rand((*size[:2], -(-size[2] // 40), -(-size[3] // 24)), generator=generator) < 0.4
            seen |= blocks.repeat_interleave(40, 2).repeat_interleave(24, 3)[..., : size[2], : size[3]]
            seen &= torch.rand((*size[:3], 1), generator=generator) < 0.9
        if self.mask not in ("additive", "infinite"):
            return seen
        hidden = torch.finfo(self.dtype).min if self.mask == "additive" else -torch.inf
        return torch.where(seen, torch.randn(size, generator=generator), hidden).to(self.dtype)


def run(case: Case, inputs: dict[str, Any], backend: str, device: torch.device | None = None) -> Tensor:
    """The attention of a case by the kernels (on DEVICE) or by the reference (on the CPU), or on `device`."""
    device = device or (DEVICE if backend == "triton" else torch.device("cpu"))
    # .to keeps a tensor that is there already, strides and all
    moved = {name: x.to(device) for name, x in inputs.items()}
    config = replace(case.config, backend=backend)  # type: ignore[arg-type]
    return diagonal_tiled_attention(
        **moved, causal=case.causal, config=config, sliding_window=case.window, softcap=case.softcap
    )


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error; a NaN anywhere gives NaN, which is below no bound."""
    out, expected = out.float().cpu(), expected.float().cpu()
    return ((out - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def tolerance(case: Case) -> float:
    """The largest relative error that a case's kernels may have: its dtype rounds the probabilities."""
    return 1e-5 if case.dtype == torch.float32 else 2e-3


def check(case: Case, seed: int = 0) -> None:
    """The kernels agree with the reference, also on which rows are NaN."""
    inputs = case.inputs(seed=seed)
    out, expected = run(case, inputs, "triton").cpu(), run(case, inputs, "reference")
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    assert torch.equal(out.isnan(), expected.isnan())
    assert relative_error(out.nan_to_num(), expected.nan_to_num()) <= tolerance(case)


def pairwise(**axes: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Settings in which any two values of any two axes meet at least once: greedy, and always the same."""
    names = list(axes)
    missing = {
        frozenset(((a, x), (b, y)))
        for a, b in itertools.combinations(names, 2)
        for x in range(len(axes[a]))
        for y in range(len(axes[b]))
    }
    for a, b in itertools.combinations(sorted(names, key=lambda name: -len(axes[name])), 2):
        for x, y in itertools.product(range(len(axes[a])), range(len(axes[b]))):
            if frozenset(((a, x), (b, y))) not in missing:
                continue
            chosen = {a: x, b: y}
            for name in names:
                if name not in chosen:
                    chosen[name] = max(
                        range(len(axes[name])),
                        key=lambda value, name=name: sum(
                            frozenset(((name, value), other)) in missing for other in chosen.items()
                        ),
                    )
            missing -= {frozenset(pair) for pair in itertools.combinations(chosen.items(), 2)}
            yield {name: axes[name][chosen[name]] for name in names}
