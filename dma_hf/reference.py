"""The reference attention: design definition of DMA, in plain PyTorch. Every kernel is tested against it.

Works through the queries one precision tile at a time, so working memory grows with tile x N, never
with M x N. All arithmetic is float32 on dequantised operands; the probabilities that multiply V are
rounded to V's dtype, as on a tensor core, while their sum is not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .config import DMAConfig
from .formats import NONE, get_format
from .masks import POSITION, SEQUENCE, START, STOP
from .modifiers import LOG2_E, NO_MODIFIERS, Modifiers, additive_mask
from .precision_map import precision_spans
from .quantization import quantize
from .rounding import encode_e4m3
from .transforms import key_mean, rotate

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
    modifiers: Modifiers = NO_MODIFIERS,
) -> Tensor:
    """Diagonal-tiled mixed-precision attention, literally.

    Args:
        query: [B, H, M, D]; key: [B, Hkv, N, D]; value: [B, Hkv, N, Dv], H a multiple of Hkv.
        causal: query i, at position i + N - M, sees keys up to its position. Query ranges, where there
            are any, say it instead.
        scale: multiplies QK^T.
        config: formats and tiles.
        modifiers: masks, soft-capping, sinks. Query ranges also say where positions, and with them the
            tiles, count from: the first query's sequence. The sink of a query tile is where the sequence
            of its first query begins.

    Returns:
        [B, H, M, Dv] in the dtype of `query`. Rows that see no key are zeros, as in SDPA.
    """
    batch, heads, query_length, _ = query.shape
    kv_heads, key_length = key.shape[1:3]
    # under autocast the matrix products would silently run in 16 bits
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
        modifiers = _by_group(modifiers, kv_heads)
        offset = key_length - query_length
        if modifiers.query_ranges is None or query_length == 0:
            out = _attend(grouped, key, value, offset, causal, scale, config, modifiers)
        else:
            # rows start at different tokens: one at a time, from the first token that it sees
            rows = []
            for b, ranges in enumerate(modifiers.query_ranges):
                one = slice(b, b + 1)
                first, stop = int(ranges[0, SEQUENCE]), int(ranges[-1, STOP])
                tokens = slice(first, max(stop, first))
                mask = modifiers.mask
                if mask is not None:
                    mask = mask[one if len(mask) > 1 else slice(None), ..., tokens]
                row = replace(modifiers, query_ranges=ranges - first, mask=mask)
                offset = int(ranges[0, POSITION]) - first
                keys = (one, slice(None), tokens)
                rows.append(_attend(grouped[one], key[keys], value[keys], offset, causal, scale, config, row))
            out = torch.cat(rows)
    return out.reshape(batch, heads, query_length, value.shape[-1]).to(query.dtype)


def _by_group(modifiers: Modifiers, kv_heads: int) -> Modifiers:
    """The modifiers with heads as [Hkv, G], in the units of the scores: log2."""
    mask, sinks = modifiers.mask, modifiers.sinks
    if mask is not None:
        mask = additive_mask(mask)
        mask = mask.unsqueeze(1) if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, -1))
    if sinks is not None:
        sinks = sinks.float().mul(LOG2_E).view(kv_heads, -1, 1, 1)
    return replace(modifiers, mask=mask, sinks=sinks)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offset: int,
    causal: bool,
    scale: float,
    config: DMAConfig,
    modifiers: Modifiers,
) -> Tensor:
    """Attention of queries [B, Hkv, G, M, D] at positions offset ... offset + M - 1; float32.

    Of the modifiers, query_ranges is [M, 4] (for B = 1), mask [B or 1, Hkv or 1, G or 1, M, N] and sinks
    [Hkv, G, 1, 1], both in units of log2.
    """
    ranges = modifiers.query_ranges
    query_length, key_length = query.shape[-2], key.shape[-2]
    # the factor log2(e) lets softmax use exp2
    query = query.float() * (scale * LOG2_E)
    key = key.float()
    exact = _Operands(query, key)
    shift: Tensor | float = 0.0
    if config.quantizes and key_length:
        if config.smooth_k:
            mean = key_mean(key)
            key = key - mean
            if modifiers.absolute_scores:
                shift = (query * mean.unsqueeze(2)).sum(-1, keepdim=True)
        if config.rotate:
            query, key = rotate(query), rotate(key)
    low = _quantized(query, key, config.low, config)
    high = low if config.high == config.low else _quantized(query, key, config.high, config)
    bad_query, bad_key = ~query.isfinite().all(-1), ~key.isfinite().all(-1)
    any_bad = config.quantizes and bool(bad_query.any() or bad_key.any())

    probability_dtype, value = value.dtype, value.float()
    value_mean: Tensor | None = None
    if config.pv == "fp8":
        # the largest magnitude of each channel of V becomes E4M3's largest; a NaN or Inf stays what it
        # is and does not count, or one bad token would spoil its channel for every row
        if modifiers.sinks is None and key_length:
            # weights sum to one, so V's mean passes attention as it is, and what is left is smaller
            value_mean = key_mean(value)
            value = value - value_mean
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
        visible = min(key_length, max(rows.stop + offset, 0)) if causal and ranges is None else key_length
        sink_tile = 0
        if ranges is not None:
            visible = min(visible, int(ranges[rows, STOP].amax()))
            sink_tile = int(ranges[rows.start, SEQUENCE]) // config.tile
        if visible <= 0:
            continue
        scores = torch.cat(
            [
                (high if span.high else low).scores(rows, slice(span.start, span.stop))
                for span in precision_spans(tile, visible, config, causal and ranges is None, sink_tile)
            ],
            dim=-1,
        )
        if isinstance(shift, Tensor):
            scores = scores + shift[..., rows, :]  # what smoothing took away
        if any_bad:
            # no format holds NaN and Inf as float32 does: tokens that have them keep exact scores
            bad = bad_query[..., rows].unsqueeze(-1) | bad_key[..., None, None, :visible]
            scores = torch.where(bad, exact.scores(rows, slice(0, visible)), scores)
        if modifiers.softcap is not None:
            cap = modifiers.softcap * LOG2_E
            scores = cap * torch.tanh(scores / cap)
        if modifiers.mask is not None:
            mask = modifiers.mask[..., rows, :visible]
            # not by addition alone: a hidden NaN stays hidden
            scores = (scores + mask).masked_fill(mask == -torch.inf, -torch.inf)
        keys = torch.arange(visible, device=query.device)
        if ranges is not None:
            seen = (keys >= ranges[rows, START, None]) & (keys < ranges[rows, STOP, None])
            scores = scores.masked_fill(~seen, -torch.inf)
        elif causal:
            positions = torch.arange(rows.start, rows.stop, device=query.device) + offset
            scores = scores.masked_fill(keys > positions[:, None], -torch.inf)
        # Whole powers of two, so that shifting the probabilities by a maximum is exact: their rounding
        # to 16 or 8 bits is then the same for a final and for a running maximum.
        row_max = scores.amax(dim=-1, keepdim=True)
        if modifiers.sinks is not None:
            row_max = row_max.maximum(modifiers.sinks)
        row_max = row_max.ceil()
        # a row with nothing but -inf must not become -inf - -inf = NaN
        row_max = torch.where(row_max == -torch.inf, 0.0, row_max)
        probabilities = torch.exp2(scores - row_max)
        row_sum = probabilities.sum(dim=-1, keepdim=True)
        if modifiers.sinks is not None:
            row_sum = row_sum + torch.exp2(modifiers.sinks - row_max)
        if config.pv == "fp8":
            probabilities = encode_e4m3(probabilities * FP8_PROBABILITY_SCALE).float()
        else:
            probabilities = probabilities.to(probability_dtype).float()
        grouped = probabilities.flatten(2, 3) @ value[..., :visible, :]
        product = grouped.unflatten(2, probabilities.shape[2:4])
        if config.pv == "fp8":
            product = product * (value_scale.unsqueeze(2) / FP8_PROBABILITY_SCALE)
        result = product / row_sum
        if value_mean is not None:
            result = result + value_mean.unsqueeze(2)
        out[..., rows, :] = torch.where(row_sum == 0, 0.0, result)
    return out


def _quantized(query: Tensor, key: Tensor, format: str, config: DMAConfig) -> _Operands:
    if format == NONE:
        return _Operands(query, key)
    return _Operands(
        quantize(query, format, scale_rule=config.scale_rule).dequantize(),
        quantize(
            key, format, scale_rule=config.scale_rule, tokens=get_format(format).key_tokens
        ).dequantize(),
    )
