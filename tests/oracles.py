"""Independent implementations of the formats and of the attention, for tests to compare with.

Written from the OCP Microscaling specification v1.0 and from the definition of the method, in numpy and
ml_dtypes; nothing here comes from `dma_hf`. Everything is literal and slow on purpose: blocks are cut by
a loop, the precision of every single score is looked up, scores and softmax are dense float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np


class Spec(NamedTuple):
    """One operand format: element type, its largest number and exponent, elements per scale."""

    element: type
    largest: float
    emax: int
    block: int | None  # None: the whole token
    scale: str


SPECS = {
    "mxfp8": Spec(ml_dtypes.float8_e4m3fn, 448.0, 8, 32, "e8m0"),
    "mxfp8_e4m3": Spec(ml_dtypes.float8_e4m3fn, 448.0, 8, 32, "e8m0"),
    "mxfp8_e5m2": Spec(ml_dtypes.float8_e5m2, 57344.0, 15, 32, "e8m0"),
    "mxfp4": Spec(ml_dtypes.float4_e2m1fn, 6.0, 2, 32, "e8m0"),
    "nvfp4": Spec(ml_dtypes.float4_e2m1fn, 6.0, 2, 16, "e4m3 and float32"),
    "fp8": Spec(ml_dtypes.float8_e4m3fn, 448.0, 8, None, "float32"),
    "int8": Spec(np.int8, 127.0, 6, None, "float32"),
}
SMALLEST_NORMAL = np.finfo(np.float32).tiny
FORMATS = tuple(SPECS)
E8M0_FORMATS = tuple(name for name, spec in SPECS.items() if spec.scale == "e8m0")


class Quantized(NamedTuple):
    """Element codes [..., D] as uint8, scale codes [..., blocks], NVFP4's token scale, and the values."""

    codes: np.ndarray
    scales: np.ndarray
    global_scale: np.ndarray | None
    values: np.ndarray


def encode(x: np.ndarray, element: type, largest: float) -> np.ndarray:
    """Nearest element, ties to even, saturating: ml_dtypes does the rounding, numpy the saturation."""
    x = np.clip(x, -largest, largest)
    return np.rint(x).astype(np.int8) if element is np.int8 else x.astype(element)


def e8m0_exponent(maximum: np.ndarray, spec: Spec, rule: str) -> np.ndarray:
    """The exponent of a block's E8M0 scale; `maximum` finite. A block of zeros gets the smallest."""
    maximum = maximum.astype(np.float64)  # every float32, subnormals too, is a normal float64
    with np.errstate(divide="ignore"):
        if rule == "floor":
            exponent = np.floor(np.log2(maximum)) - spec.emax
        else:
            exponent = np.ceil(np.log2(maximum / spec.largest))
    return np.clip(exponent, -127, 127)


def quantize(x: np.ndarray, name: str, rule: str = "floor") -> Quantized:
    """Quantise the last axis of a finite or non-finite float32 array."""
    spec = SPECS[name]
    x = np.asarray(x, np.float32)
    length = x.shape[-1]
    block = spec.block or length
    token_max = np.abs(x).max(-1)
    global_scale = None
    if name == "nvfp4":
        global_scale = np.maximum(token_max / np.float32(6.0 * 448.0), SMALLEST_NORMAL)
        global_scale = np.where(np.isfinite(token_max), global_scale, np.float32(np.nan))
    codes, scales, values = [], [], []
    for start in range(0, length, block):
        part = x[..., start : start + block]
        maximum = np.abs(part).max(-1)  # NaN when the block holds one
        bad = ~np.isfinite(maximum)
        if name == "nvfp4":
            bad = ~np.isfinite(token_max)
            with np.errstate(invalid="ignore"):
                ratio = maximum / np.float32(6.0) / global_scale
            ratio = np.where(bad, np.float32(1.0), ratio)
            scale = encode(np.maximum(ratio, np.float32(2.0**-9)), ml_dtypes.float8_e4m3fn, 448.0)
            factor = scale.astype(np.float32) * global_scale
        elif spec.scale == "e8m0":
            exponent = e8m0_exponent(np.where(bad, 1.0, maximum), spec, rule)
            power = np.where(bad, np.nan, np.exp2(exponent))
            scale = power.astype(ml_dtypes.float8_e8m0fnu)
            factor = power.astype(np.float32)
        else:
            scale = np.maximum(maximum / np.float32(spec.largest), SMALLEST_NORMAL)
            scale = factor = np.where(bad, np.float32(np.nan), scale).astype(np.float32)
        with np.errstate(invalid="ignore"):
            scaled = np.where(bad[..., None], np.float32(0.0), part / factor[..., None])
        element = encode(scaled.astype(np.float32), spec.element, spec.largest)
        codes.append(element.view(np.uint8))
        scales.append(scale)
        with np.errstate(over="ignore"):  # the largest float32 may round up to 2^128
            values.append(element.astype(np.float32) * factor[..., None])
    return Quantized(
        np.concatenate(codes, -1), np.stack(scales, -1), global_scale, np.concatenate(values, -1)
    )


def precision_is_high(
    i: int, j: int, m: int, n: int, *, tile: int, diagonal: int, sink: int, causal: bool
) -> bool:
    """Whether score (i, j) of an m x n call is high precision; diagonal and sink in tiles."""
    row, column = (i + n - m) // tile, j // tile
    near = row - column < diagonal if causal else abs(row - column) < diagonal
    return column < sink or near


def hadamard(size: int) -> np.ndarray:
    """Entry (i, j) is (-1)^popcount(i & j), over sqrt(size)."""
    sign = [[(-1.0) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
    return np.array(sign) / math.sqrt(size)


def rotate(x: np.ndarray) -> np.ndarray:
    """Multiply by block-diagonal Hadamard matrices of the largest power of two that divides D."""
    length = x.shape[-1]
    size = 1
    while length % (2 * size) == 0:
        size *= 2
    matrix = np.kron(np.eye(length // size), hadamard(size))
    return (x.astype(np.float64) @ matrix).astype(np.float32)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    causal: bool = True,
    low: str = "none",
    high: str = "none",
    diagonal: int = 1,
    sink: int = 1,
    tile: int = 128,
    smooth_k: bool = False,
    rotated: bool = False,
    rule: str = "floor",
    pv: str = "none",
    probability: type = np.float32,
) -> np.ndarray:
    """Dense attention of one head: q [M, D], k [N, D], v [N, Dv], float32 -> float64 [M, Dv].

    `diagonal` and `sink` count tiles. Softmax is taken to the base 2 of scores times log2(e), because
    that factor is part of what is quantised. Probabilities are rounded to `probability` (to E4M3 after
    multiplying by 256 when `pv` is "fp8") relative to the power of two at or above the row's largest;
    their sum is not.
    """
    m, n = len(q), len(k)
    q = q.astype(np.float32) * np.float32(scale * math.log2(math.e))
    k = k.astype(np.float32)
    if smooth_k:
        k = k - k.astype(np.float64).mean(0).astype(np.float32)
    if rotated:
        q, k = rotate(q), rotate(k)
    scores = {}
    for name in {low, high}:
        q_, k_ = (
            (q, k) if name == "none" else (quantize(q, name, rule).values, quantize(k, name, rule).values)
        )
        scores[name] = q_.astype(np.float64) @ k_.astype(np.float64).T
    out = np.zeros((m, v.shape[-1]))
    v = v.astype(np.float64)
    if pv == "fp8":
        v_scale = np.maximum(np.abs(v).max(0) / 448.0, SMALLEST_NORMAL)
        v = (v / v_scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * v_scale
    for i in range(m):
        visible = [j for j in range(n) if not causal or j <= i + n - m]
        if not visible:
            continue
        s = np.array(
            [
                scores[
                    high
                    if precision_is_high(i, j, m, n, tile=tile, diagonal=diagonal, sink=sink, causal=causal)
                    else low
                ][i, j]
                for j in visible
            ]
        )
        p = np.exp2(s - np.ceil(s.max()))
        total = p.sum()
        if pv == "fp8":
            p = (p * 256.0).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) / 256.0
        else:
            p = p.astype(np.float32).astype(probability).astype(np.float64)
        out[i] = p @ v[visible] / total
    return out


def softmax_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, scale: float, causal: bool
) -> np.ndarray:
    """Float64 softmax attention of one head, bottom-right aligned; rows that see no key are zeros."""
    q, k, v = (t.astype(np.float64) for t in (q, k, v))
    m, n = len(q), len(k)
    visible = np.ones((m, n), bool)
    if causal:
        visible = np.arange(n)[None, :] <= np.arange(m)[:, None] + n - m
    scores = np.where(visible, q @ k.T * scale, -np.inf)
    top = np.where(visible.any(1, keepdims=True), scores.max(1, keepdims=True, initial=-np.inf), 0.0)
    p = np.exp(scores - top)
    total = p.sum(1, keepdims=True)
    return np.divide(p @ v, total, out=np.zeros((m, v.shape[1])), where=total > 0)
