"""The reference attention: design definition of DMA, in plain PyTorch. Every kernel is tested against it.

Works through the queries one precision tile at a time, so working memory grows with tile x N, never
with M x N. All arithmetic is float32 on dequantised operands; the probabilities that multiply V are
rounded to V's dtype, as on a tensor core, while their sum is not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .config import DMAConfig
from .formats import NONE
from .precision_map import precision_spans
from .quantization import quantize
from .rounding import encode_e4m3
from .transforms import key_mean, rotate

LOG2_E = math.log2(math.e)
# E4M3 holds 448; a probability in [0, 1] times 2^8 uses its range without ever saturating
FP8_PROBABILITY_SCALE = 256.0


class _Operands(NamedTuple):
    """Dequantised operands of QK^T in one precision: query [B, Hkv, G, M, D], key [B, Hkv, N, D]."""

    query: Tensor
    key: Tensor

    def scores(self, rows: slice, columns: slice) -> Tensor:
        """Scores [B, Hkv, G, rows, columns], in units of log2."""
        query = self.query[..., rows, :]
        grouped = query.flatten(2, 3) @ self.key[..., columns, :].transpose(-1, -2)
        return grouped.unflatten(2, query.shape[2:4])


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    scale: float,
    config: DMAConfig,
    key_ranges: Tensor | None = None,
) -> Tensor:
    """Diagonal-tiled mixed-precision attention, literally.

    Args:
        query: [B, H, M, D]; key: [B, Hkv, N, D]; value: [B, Hkv, N, Dv], H a multiple of Hkv.
        causal: query i, at position i + N - M, sees keys up to its position.
        scale: multiplies QK^T.
        config: formats and tiles.
        key_ranges: integer [B, 2]: row b's keys are tokens [start, stop), all others are padding.
            Positions, and with them the tiles, count from `start`.

    Returns:
        [B, H, M, Dv] in the dtype of `query`. Rows that see no key are zeros, as in SDPA.
    """
    batch, heads, query_length, _ = query.shape
    kv_heads, key_length = key.shape[1:3]
    # under autocast the matrix products would silently run in 16 bits
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
        offset = key_length - query_length
        if key_ranges is None:
            out = _attend(grouped, key, value, offset, causal, scale, config)
        else:
            # a padded row is the attention of its own tokens: slice them out, one sequence at a time
            rows = []
            for b, (start, stop) in enumerate(key_ranges.tolist()):
                one = slice(b, b + 1)
                keys = (one, slice(None), slice(start, stop))
                rows.append(
                    _attend(grouped[one], key[keys], value[keys], offset - start, causal, scale, config)
                )
            out = torch.cat(rows)
    return out.reshape(batch, heads, query_length, value.shape[-1]).to(query.dtype)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, offset: int, causal: bool, scale: float, config: DMAConfig
) -> Tensor:
    """Attention of queries [B, Hkv, G, M, D] at positions offset ... offset + M - 1; float32."""
    query_length, key_length = query.shape[-2], key.shape[-2]
    # the factor log2(e) lets softmax use exp2
    query = query.float() * (scale * LOG2_E)
    key = key.float()
    exact = _Operands(query, key)
    if config.quantizes and key_length:
        if config.smooth_k:
            key = key - key_mean(key)
        if config.rotate:
            query, key = rotate(query), rotate(key)
    low = _quantized(query, key, config.low, config)
    high = low if config.high == config.low else _quantized(query, key, config.high, config)
    bad_query, bad_key = ~query.isfinite().all(-1), ~key.isfinite().all(-1)
    any_bad = config.quantizes and bool(bad_query.any() or bad_key.any())

    probability_dtype, value = value.dtype, value.float()
    if config.pv == "fp8":
        # the largest magnitude of each channel of V becomes E4M3's largest; a NaN or Inf stays what it
        # is and does not count, or one bad token would spoil its channel for every row
        finite = value.isfinite()
        magnitude = torch.where(finite, value.abs(), 0.0)
        # a row of zeros in front gives channels without tokens a maximum, too
        channel_max = torch.nn.functional.pad(magnitude, (0, 0, 1, 0)).amax(-2, keepdim=True)
        value_scale = (channel_max / 448.0).clamp(min=torch.finfo(torch.float32).tiny)
        value = torch.where(finite, encode_e4m3(value / value_scale).float(), value)

    out = query.new_zeros(*query.shape[:-1], value.shape[-1])
    first = 0
    while first < query_length:
        tile = (first + offset) // config.tile
        rows = slice(first, min((tile + 1) * config.tile - offset, query_length))
        first = rows.stop
        visible = min(key_length, max(rows.stop + offset, 0)) if causal else key_length
        if visible == 0:
            continue
        scores = torch.cat(
            [
                (high if span.high else low).scores(rows, slice(span.start, span.stop))
                for span in precision_spans(tile, visible, config, causal)
            ],
            dim=-1,
        )
        if any_bad:
            # no format holds NaN and Inf as float32 does: tokens that have them keep exact scores
            bad = bad_query[..., rows].unsqueeze(-1) | bad_key[..., None, None, :visible]
            scores = torch.where(bad, exact.scores(rows, slice(0, visible)), scores)
        if causal:
            positions = torch.arange(rows.start, rows.stop, device=query.device) + offset
            future = torch.arange(visible, device=query.device) > positions[:, None]
            scores = scores.masked_fill(future, -torch.inf)
        # Whole powers of two, so that shifting the probabilities by a maximum is exact: their rounding
        # to 16 or 8 bits is then the same for a final and for a running maximum.
        row_max = scores.amax(dim=-1, keepdim=True).ceil()
        # a row with nothing but -inf must not become -inf - -inf = NaN
        row_max = torch.where(row_max == -torch.inf, 0.0, row_max)
        probabilities = torch.exp2(scores - row_max)
        row_sum = probabilities.sum(dim=-1, keepdim=True)
        if config.pv == "fp8":
            probabilities = encode_e4m3(probabilities * FP8_PROBABILITY_SCALE).float()
        else:
            probabilities = probabilities.to(probability_dtype).float()
        grouped = probabilities.flatten(2, 3) @ value[..., :visible, :]
        product = grouped.unflatten(2, probabilities.shape[2:4])
        if config.pv == "fp8":
            product = product * (value_scale.unsqueeze(2) / FP8_PROBABILITY_SCALE)
        out[..., rows, :] = torch.where(row_sum == 0, 0.0, product / row_sum)
    return out


def _quantized(query: Tensor, key: Tensor, format: str, config: DMAConfig) -> _Operands:
    if format == NONE:
        return _Operands(query, key)
    return _Operands(
        quantize(query, format, scale_rule=config.scale_rule).dequantize(),
        quantize(key, format, scale_rule=config.scale_rule).dequantize(),
    )
