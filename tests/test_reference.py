"""The reference attention, against dense float64 attention with the precision of every score looked up."""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np
import oracles
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from dma_hf import DMAConfig, diagonal_tiled_attention

EXACT = DMAConfig(low="none", high="none")
each_direction = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def random_qkv(
    m: int,
    n: int,
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 2,
    d: int = 64,
    dv: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal Q [B, H, M, D], K [B, Hkv, N, D] and V [B, Hkv, N, Dv]; K has an outlier channel.

    Q and K are multiples of 1/64 with few bits, so that sums over tokens or channels are exact in any
    order: then the oracle and the package round the same numbers, and no element lands one step away.
    """
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, m, d, generator=g).mul(64).round() / 64
    k = torch.randn(batch, kv_heads, n, d, generator=g).mul(64).round() / 64
    k[..., d // 3] += 4.0
    return q, k, torch.randn(batch, kv_heads, n, dv or d, generator=g)


def by_head(function, q: Tensor, k: Tensor, v: Tensor, **options: object) -> np.ndarray:
    """Apply an oracle for one head to all: query head h reads key head h // (H / Hkv)."""
    group = q.shape[1] // k.shape[1]
    return np.stack(
        [
            np.stack(
                [
                    function(q[b, h].numpy(), k[b, h // group].numpy(), v[b, h // group].numpy(), **options)
                    for h in range(q.shape[1])
                ]
            )
            for b in range(q.shape[0])
        ]
    )


# --- no quantisation: plain attention --------------------------------------------------------------------


@each_direction
@pytest.mark.parametrize(
    ("m", "n"),
    [
        (1, 1),
        (127, 127),
        (128, 128),
        (129, 129),
        (300, 300),
        (1, 300),
        (16, 129),
        (100, 300),
        (300, 100),
        (129, 1),
    ],
)
def test_unquantised_equals_float64_softmax_attention(m, n, causal):
    q, k, v = random_qkv(m, n, heads=4, dv=48)
    out = diagonal_tiled_attention(q, k, v, causal=causal, config=EXACT)
    expected = by_head(oracles.softmax_attention, q, k, v, scale=1 / 8, causal=causal)
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5, rtol=0)


@each_direction
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (4, 1)], ids=["MHA", "GQA", "GQA3", "MQA"]
)
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (80, 80), (128, 32), (17, 5)])
def test_heads_and_head_dims(heads, kv_heads, d, dv, causal):
    q, k, v = random_qkv(70, 150, batch=2, heads=heads, kv_heads=kv_heads, d=d, dv=dv)
    out = diagonal_tiled_attention(q, k, v, causal=causal, scale=0.2, config=EXACT)
    expected = by_head(oracles.softmax_attention, q, k, v, scale=0.2, causal=causal)
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options", [{"smooth_k": True}, {"rotate": True}, {"tile": 16, "diagonal": 0, "sink": 0}]
)
def test_settings_that_only_matter_to_quantisation(options):
    q, k, v = random_qkv(150, 150)
    config = DMAConfig(low="none", high="none", **options)
    expected = diagonal_tiled_attention(q, k, v, config=EXACT)
    torch.testing.assert_close(diagonal_tiled_attention(q, k, v, config=config), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "probability"), [(torch.bfloat16, ml_dtypes.bfloat16), (torch.float16, np.float16)]
)
def test_sixteen_bit_input_rounds_the_probabilities_and_once_at_the_end(dtype, probability):
    q, k, v = (t.to(dtype) for t in random_qkv(200, 200))
    out = diagonal_tiled_attention(q, k, v, config=DMAConfig(low="mxfp4", smooth_k=False))
    floats = (t.float() for t in (q, k, v))
    expected = by_head(
        oracles.attention, *floats, scale=1 / 8, low="mxfp4", high="mxfp8", probability=probability
    )
    # half a step of the output, and now and then a probability that falls on the other side of a tie
    half_step = torch.finfo(dtype).eps / 2
    np.testing.assert_allclose(out.double().numpy(), expected, rtol=half_step * 1.01, atol=half_step / 4)


def test_queries_before_the_first_key_are_zeros():
    q, k, v = random_qkv(300, 130)
    out = diagonal_tiled_attention(q, k, v)
    assert not out[:, :, :170].any()
    assert out[:, :, 170:].abs().amax(-1).min() > 0


def test_views_that_are_not_contiguous():
    q, k, v = random_qkv(150, 150, heads=4, kv_heads=2)
    expected = diagonal_tiled_attention(q, k, v)
    strided = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))  # [B, N, H, D] in memory
    assert torch.equal(diagonal_tiled_attention(*strided), expected)


# --- mixed precision: the definition ---------------------------------------------------------------------


@each_direction
@pytest.mark.parametrize("low", oracles.FORMATS)
def test_each_low_format_equals_the_dense_oracle(low, causal):
    q, k, v = random_qkv(300, 300, heads=1, kv_heads=1)
    config = DMAConfig(low=low, high="none", smooth_k=False)
    out = diagonal_tiled_attention(q, k, v, causal=causal, config=config)
    expected = by_head(oracles.attention, q, k, v, scale=1 / 8, causal=causal, low=low)
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5, rtol=0)


@each_direction
@pytest.mark.parametrize(("m", "n"), [(150, 150), (128, 129), (1, 200), (40, 150), (150, 60)])
@pytest.mark.parametrize(
    ("tile", "diagonal", "sink"), [(16, 1, 1), (32, 2, 0), (16, 0, 2), (16, 0, 0), (64, 1, 1)], ids=str
)
def test_each_tile_has_its_own_precision(tile, diagonal, sink, m, n, causal):
    q, k, v = random_qkv(m, n, heads=2, kv_heads=1, d=48, dv=8)
    config = DMAConfig(
        low="mxfp4", high="mxfp8", tile=tile, diagonal=diagonal * tile, sink=sink * tile, smooth_k=False
    )
    out = diagonal_tiled_attention(q, k, v, causal=causal, config=config)
    expected = by_head(
        oracles.attention, q, k, v, scale=48**-0.5, causal=causal, low="mxfp4", high="mxfp8",
        tile=tile, diagonal=diagonal, sink=sink,
    )  # fmt: skip
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5, rtol=0)


@each_direction
@pytest.mark.parametrize("low", ["nvfp4", "mxfp4", "int8"])
@pytest.mark.parametrize("rule", ["floor", "ceil"])
def test_smoothed_keys_equal_the_dense_oracle(low, rule, causal):
    q, k, v = random_qkv(200, 300, heads=2, kv_heads=1)
    config = DMAConfig(low=low, smooth_k=True, scale_rule=rule)
    out = diagonal_tiled_attention(q, k, v, causal=causal, config=config)
    expected = by_head(
        oracles.attention,
        q,
        k,
        v,
        scale=1 / 8,
        causal=causal,
        low=low,
        high="mxfp8",
        smooth_k=True,
        rule=rule,
    )
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5, rtol=0)


@each_direction
@pytest.mark.parametrize("d", [64, 80])
@pytest.mark.parametrize("smooth_k", [True, False])
def test_rotated_operands_equal_the_dense_oracle(d, smooth_k, causal):
    q, k, v = random_qkv(256, 256, heads=1, kv_heads=1, d=d)
    scale = 1 / math.log2(math.e)  # keeps Q's few bits: see random_qkv
    config = DMAConfig(low="nvfp4", smooth_k=smooth_k, rotate=True)
    out = diagonal_tiled_attention(q, k, v, causal=causal, scale=scale, config=config)
    expected = by_head(
        oracles.attention, q, k, v, scale=scale, causal=causal, low="nvfp4", high="mxfp8",
        smooth_k=smooth_k, rotated=True,
    )  # fmt: skip
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5, rtol=0)


@each_direction
def test_fp8_second_product_is_close_to_the_dense_oracle(causal):
    q, k, v = random_qkv(200, 200, heads=1, kv_heads=1)
    v[..., 3] *= 100.0  # each channel has its own scale
    v[..., 4] = 0.0
    config = DMAConfig(low="mxfp4", high="mxfp8", smooth_k=False, pv="fp8")
    out = diagonal_tiled_attention(q, k, v, causal=causal, config=config)
    # weights sum to one, so V's mean stays out of the rounding
    mean = v.mean(2, keepdim=True)
    expected = mean.numpy() + by_head(
        oracles.attention, q, k, v - mean, scale=1 / 8, causal=causal, low="mxfp4", high="mxfp8", pv="fp8"
    )
    # a probability next to a tie may round the other way, which moves it by up to 1/16 of itself
    size = v.abs().amax(2, keepdim=True).clamp(min=1.0).numpy()
    np.testing.assert_allclose(out.numpy() / size, expected / size, atol=2e-3, rtol=0)
    assert not out[..., 4].any()


def test_low_precision_is_really_used_and_high_precision_really_helps():
    q, k, v = random_qkv(512, 512)
    exact = diagonal_tiled_attention(q, k, v, config=EXACT)

    def error(**options: object) -> float:
        return (diagonal_tiled_attention(q, k, v, config=DMAConfig(**options)) - exact).norm().item()

    assert error(low="mxfp4", high="mxfp4") > error(low="mxfp4") > error(low="mxfp4", diagonal=256)
    assert error(low="mxfp4") > error(low="nvfp4") > error(low="mxfp8") > error(low="int8", high="int8") > 0


# --- the result does not depend on how a sequence is cut or padded ---------------------------------------


@pytest.mark.parametrize(
    "pieces", [(300,), (128, 128, 44), (100, 37, 163), (1,) * 5 + (295,), (299, 1)], ids=str
)
@pytest.mark.parametrize("rotate", [True, False])
def test_chunked_prefill_equals_one_prefill(pieces, rotate):
    q, k, v = random_qkv(300, 300, heads=4)
    # smoothing would use the mean of the keys so far
    config = DMAConfig(low="mxfp4", tile=64, diagonal=64, sink=64, smooth_k=False, rotate=rotate)
    whole = diagonal_tiled_attention(q, k, v, config=config)
    start, chunks = 0, []
    for length in pieces:
        stop = start + length
        chunks.append(
            diagonal_tiled_attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], config=config)
        )
        start = stop
    torch.testing.assert_close(torch.cat(chunks, 2), whole, atol=2e-6, rtol=0)


@each_direction
@pytest.mark.parametrize("pv", ["none", "fp8"])
def test_padding_on_any_side_equals_the_sequence_alone(causal, pv):
    lengths, total = [200, 131, 130, 1, 0], 200
    starts = [0, 69, 0, 100, 0]  # none, left, right, both, nothing but padding
    q, k, v = random_qkv(total, total, batch=5, heads=4, kv_heads=2)
    mask = torch.zeros(5, total, dtype=torch.bool)
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        mask[b, start : start + length] = True
    # what stands in the padding must not matter, not even NaN
    for t in (k, v):
        t[~mask[:, None].expand(t.shape[:3])] = torch.nan
    config = DMAConfig(low="mxfp4", tile=64, diagonal=64, sink=64, pv=pv)
    out = diagonal_tiled_attention(q, k, v, causal=causal, config=config, padding_mask=mask)
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own = slice(b, b + 1), slice(None), slice(start, start + length)
        alone = diagonal_tiled_attention(q[own], k[own], v[own], causal=causal, config=config)
        torch.testing.assert_close(out[own], alone, atol=1e-6, rtol=0)
    assert out.isfinite().all()
    assert not out[4].any()
    if causal:  # queries in the padding on the left see nothing
        assert not out[1, :, :69].any()


@each_direction
def test_unquantised_with_padding_equals_float64_softmax_attention(causal):
    q, k, v = random_qkv(150, 150, batch=2)
    mask = torch.ones(2, 150, dtype=torch.int64)
    mask[0, :22] = 0
    mask[1, 129:] = 0
    out = diagonal_tiled_attention(q, k, v, causal=causal, config=EXACT, padding_mask=mask)
    for b, kept in enumerate((slice(22, 150), slice(0, 129))):
        own = slice(b, b + 1), slice(None), kept
        expected = by_head(oracles.softmax_attention, q[own], k[own], v[own], scale=1 / 8, causal=causal)
        np.testing.assert_allclose(out[own].numpy(), expected, atol=1e-5, rtol=0)


def test_padding_with_a_cache():
    """Queries at the end of a longer, left-padded key sequence: what a second prompt on a cache sees."""
    q, k, v = random_qkv(60, 200, batch=2)
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[0, :77] = False
    config = DMAConfig(low="mxfp4", tile=32, diagonal=32, sink=32)
    out = diagonal_tiled_attention(q, k, v, config=config, padding_mask=mask)
    alone = diagonal_tiled_attention(q[:1], k[:1, :, 77:], v[:1, :, 77:], config=config)
    torch.testing.assert_close(out[:1], alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(out[1:], diagonal_tiled_attention(q[1:], k[1:], v[1:], config=config))


# --- NaN and Inf -----------------------------------------------------------------------------------------

SETTINGS = {
    "none": EXACT,
    "paper": DMAConfig(),
    "rotated": DMAConfig(rotate=True),
    "int8 and fp8": DMAConfig(low="int8", high="fp8"),
    "mxfp4, small tiles": DMAConfig(low="mxfp4", tile=32, diagonal=32, sink=0),
    "fp8 second product": DMAConfig(pv="fp8"),
}
each_setting = pytest.mark.parametrize("setting", SETTINGS)


@each_direction
@each_setting
@pytest.mark.parametrize("seed", range(4))
def test_bad_queries_and_keys_show_where_sdpa_shows_them(setting, causal, seed):
    q, k, v = random_qkv(160, 160, d=32, seed=seed)
    rng = np.random.default_rng(seed)
    for t in (q, k):
        for bad in (torch.nan, torch.inf, -torch.inf):
            t[0, rng.integers(2), rng.integers(160), rng.integers(32)] = bad
    expected = scaled_dot_product_attention(q, k, v, is_causal=causal)
    out = diagonal_tiled_attention(q, k, v, causal=causal, config=SETTINGS[setting])
    assert expected.isnan().any()
    assert torch.equal(out.isnan(), expected.isnan())
    assert out[~out.isnan()].isfinite().all()


@each_setting
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_key_does_not_change_rows_that_do_not_see_it(setting, bad):
    config = SETTINGS[setting]
    q, k, v = random_qkv(300, 300)
    zeroed = k.clone()
    zeroed[0, 0, 200, 5] = 0.0  # a NaN or Inf enters the key mean as zero
    clean = diagonal_tiled_attention(q, zeroed, v, config=config)
    k[0, 0, 200, 5] = bad
    out = diagonal_tiled_attention(q, k, v, config=config)
    torch.testing.assert_close(out[:, :, :200], clean[:, :, :200], atol=1e-6, rtol=0)
    assert torch.equal(out[:, 1], clean[:, 1])


@each_setting
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_values_stay_in_their_channel_and_out_of_earlier_tiles(setting, bad):
    """A row that sees the token shows it; a zero probability times NaN shows in the token's own tile."""
    q, k, v = random_qkv(300, 300)
    config = SETTINGS[setting]
    clean = diagonal_tiled_attention(q, k, v, config=config)
    v[0, 0, 200, 5] = bad
    out = diagonal_tiled_attention(q, k, v, config=config)
    assert not out[0, 0, 200:, 5].isfinite().any()
    first_row_of_tile = 200 // config.tile * config.tile
    assert torch.isfinite(out[0, 0, :first_row_of_tile]).all()
    others = [c for c in range(64) if c != 5]
    torch.testing.assert_close(out[0, 0][:, others], clean[0, 0][:, others], atol=1e-6, rtol=0)
    assert torch.equal(out[0, 1], clean[0, 1])


@each_direction
@each_setting
def test_zero_queries_and_keys_give_the_mean_of_the_values(setting, causal):
    """The published code divides 0 by 0 here."""
    _, _, v = random_qkv(1, 200)
    zeros = torch.zeros(1, 2, 200, 64)
    out = diagonal_tiled_attention(zeros, zeros, v, causal=causal, config=SETTINGS[setting])
    expected = by_head(oracles.softmax_attention, zeros, zeros, v, scale=1.0, causal=causal)
    # E4M3 rounds a value by up to 1/16 of itself
    tolerance = v.abs().max().item() / 16 if SETTINGS[setting].pv == "fp8" else 1e-5
    np.testing.assert_allclose(out.numpy(), expected, atol=tolerance, rtol=0)


# --- memory ----------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Records the size, in elements, of the largest tensor any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


def largest_tensor(m: int, n: int, config: DMAConfig, causal: bool, padded: bool) -> int:
    q, k, v = random_qkv(m, n, heads=1, kv_heads=1, d=16)
    mask = torch.ones(1, n, dtype=torch.bool) if padded else None
    if padded:
        mask[0, :5] = False
    with LargestTensor() as largest:
        diagonal_tiled_attention(q, k, v, causal=causal, config=config, padding_mask=mask)
    return largest.numel


@each_direction
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_memory_grows_with_the_tile_not_with_queries_times_keys(causal, padded):
    config = DMAConfig(tile=32, diagonal=32, sink=32, rotate=True)
    n = 2048
    largest = largest_tensor(n, n, config, causal, padded)
    assert largest <= 2 * config.tile * n  # one tile of rows
    assert largest < n * n / 16
    # twice the length: twice the memory
    assert largest_tensor(2 * n, 2 * n, config, causal, padded) <= 2.1 * largest


def test_memory_with_bad_tokens_grows_no_faster():
    q, k, v = random_qkv(2048, 2048, heads=1, kv_heads=1, d=16)
    k[0, 0, 3, 3] = torch.nan
    with LargestTensor() as largest:
        diagonal_tiled_attention(q, k, v, config=DMAConfig(tile=32, diagonal=32, sink=32))
    assert largest.numel <= 2 * 32 * 2048


# --- masks, windows, packing, soft-capping, sinks ----------------------------------------------------------


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(QK^T)V in dense float64; `seen` is bool [B or 1, H or 1, M, N]."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is None:
        return torch.softmax(scores, -1).nan_to_num() @ v  # a row that sees nothing: zeros
    column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1] @ v


def causal_mask(m: int, n: int) -> Tensor:
    return torch.ones(1, 1, m, n, dtype=torch.bool).tril(n - m)


def everything(m: int, n: int) -> Tensor:
    return torch.ones(1, 1, m, n, dtype=torch.bool)


def distance(m: int, n: int) -> Tensor:
    """How far behind its query each key is, [1, 1, M, N]."""
    return (torch.arange(m)[:, None] + n - m - torch.arange(n))[None, None]


LENGTH = 130
PADDING = torch.ones(2, LENGTH, dtype=torch.long)
PADDING[0, :37] = 0
PADDING[1, 101:] = 0
REAL = PADDING[:, None, None].bool()
PACKED = torch.tensor([[0] * 50 + [1] * 3 + [2] * 77, [0] * 1 + [3] * 64 + [4] * 65])
TOGETHER = PACKED[:, None, :, None] == PACKED[:, None, None]
RANDOM = torch.Generator().manual_seed(7)
BIAS = torch.randn(1, 4, LENGTH, LENGTH, generator=RANDOM) * 2
HOLES = torch.rand(2, 1, LENGTH, LENGTH, generator=RANDOM) < 0.3
HOLES[:, :, :, 40:70] = False  # whole tiles that nobody sees
HOLES[0, 0, 5] = False  # a row that sees nothing
PREFIX = causal_mask(LENGTH, LENGTH).clone()
PREFIX[..., :25] = True  # prefix-LM
SINKS = torch.randn(4, generator=RANDOM) * 3

# name: (queries, keys that are seen, arguments)
CASES: dict[str, tuple[int, Tensor, dict[str, object]]] = {
    "padded": (130, causal_mask(130, 130) & REAL, {"padding_mask": PADDING}),
    "padded, bidirectional": (
        130, everything(130, 130) & REAL, {"padding_mask": PADDING, "causal": False},
    ),
    "padded, fewer queries": (60, causal_mask(60, 130) & REAL, {"padding_mask": PADDING}),
    "window": (130, causal_mask(130, 130) & (distance(130, 130) < 20), {"sliding_window": 20}),
    "window of one token": (130, distance(130, 130) == 0, {"sliding_window": 1}),
    "window, fewer queries": (60, causal_mask(60, 130) & (distance(60, 130) < 33), {"sliding_window": 33}),
    "window, bidirectional": (
        130, distance(130, 130).abs() <= 20, {"sliding_window": 20, "causal": False},
    ),
    "window, padded": (
        130, causal_mask(130, 130) & REAL & (distance(130, 130) < 20),
        {"sliding_window": 20, "padding_mask": PADDING},
    ),
    "packed": (130, causal_mask(130, 130) & TOGETHER, {"sequence_ids": PACKED}),
    "packed, bidirectional": (130, TOGETHER, {"sequence_ids": PACKED, "causal": False}),
    "packed, window": (
        130, causal_mask(130, 130) & TOGETHER & (distance(130, 130) < 20),
        {"sequence_ids": PACKED, "sliding_window": 20},
    ),
    "bool mask": (130, HOLES, {"attn_mask": HOLES, "causal": False}),
    "bool mask, causal": (130, HOLES & causal_mask(130, 130), {"attn_mask": HOLES}),
    "bool mask, fewer queries": (
        60, HOLES[:, :, :60] & causal_mask(60, 130), {"attn_mask": HOLES[:, :, :60]},
    ),
    "prefix-LM": (130, PREFIX, {"attn_mask": PREFIX, "causal": False}),
    "bias of each head": (130, everything(130, 130), {"attn_mask": BIAS, "causal": False}),
    "bias, padded, causal": (
        130, causal_mask(130, 130) & REAL, {"attn_mask": BIAS, "padding_mask": PADDING},
    ),
    "bias, packed": (
        130, causal_mask(130, 130) & TOGETHER, {"attn_mask": BIAS, "sequence_ids": PACKED},
    ),
    "-inf in a bias": (
        130, HOLES, {"attn_mask": torch.where(HOLES, 0.0, -torch.inf), "causal": False},
    ),
    "softcap": (130, causal_mask(130, 130), {"softcap": 1.5}),
    "softcap, bidirectional, fewer queries": (
        60, everything(60, 130), {"softcap": 1.5, "causal": False},
    ),
    "softcap before bias": (
        130, everything(130, 130), {"softcap": 1.5, "attn_mask": BIAS, "causal": False},
    ),
    "sinks": (130, causal_mask(130, 130), {"sinks": SINKS}),
    "sinks of a row that sees nothing": (130, HOLES, {"sinks": SINKS, "attn_mask": HOLES, "causal": False}),
    "sinks, softcap, window, fewer queries": (
        60, causal_mask(60, 130) & (distance(60, 130) < 33),
        {"sinks": SINKS, "softcap": 2.0, "sliding_window": 33},
    ),
    "sinks, window, padded": (
        130, causal_mask(130, 130) & REAL & (distance(130, 130) < 33),
        {"sinks": SINKS, "sliding_window": 33, "padding_mask": PADDING},
    ),
}  # fmt: skip
# relative error of the whole output; what int8 and MXFP8 cost is measured, what "none" costs is rounding
TOLERANCES = {"none": 1e-5, "int8": 1e-2, "mxfp8": 6e-2}


def dense_of(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, arguments: dict[str, object]) -> Tensor:
    mask = arguments.get("attn_mask")
    bias = mask if isinstance(mask, Tensor) and mask.is_floating_point() else None
    return dense_attention(
        q, k, v, seen, bias=bias, softcap=arguments.get("softcap"), sinks=arguments.get("sinks")
    )


@pytest.mark.parametrize("format", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_a_modified_call_equals_dense_float64_attention(case, format):
    queries, seen, arguments = CASES[case]
    q, k, v = random_qkv(queries, LENGTH, batch=2, heads=4, kv_heads=2, d=32, dv=24)
    config = DMAConfig(low=format, high=format, tile=32, diagonal=32, sink=32)
    out = diagonal_tiled_attention(q, k, v, config=config, **arguments)
    expected = dense_of(q, k, v, seen, arguments)
    assert out.shape == (2, 4, queries, 24)
    assert (out - expected).norm() / expected.norm() < TOLERANCES[format]
    # what sees nothing is zero exactly
    assert not out[(~seen.any(-1)).expand(2, 4, queries)].any()


@pytest.mark.parametrize("case", CASES)
def test_all_precisions_at_once_and_rotation(case):
    """NVFP4 far away and MXFP8 near, as in the paper: close to what is wanted, not far off as with a bug."""
    queries, seen, arguments = CASES[case]
    q, k, v = random_qkv(queries, LENGTH, batch=2, heads=4, kv_heads=2, d=32)
    config = DMAConfig(tile=32, diagonal=32, sink=32, rotate=True)
    out = diagonal_tiled_attention(q, k, v, config=config, **arguments)
    expected = dense_of(q, k, v, seen, arguments)
    assert (out - expected).norm() / expected.norm() < 0.15


def test_a_mask_of_the_smallest_float_gives_rows_that_see_nothing_the_mean_of_all_values():
    """As in SDPA: such a row's scores are all the same. Models mask so, not with -inf."""
    q, k, v = random_qkv(LENGTH, LENGTH, batch=2, heads=4, kv_heads=2, d=32)
    lowest = torch.finfo(torch.float32).min
    mask = torch.where(causal_mask(LENGTH, LENGTH), 0.0, lowest).expand(2, 1, -1, -1).clone()
    mask[0, 0, 10:20] = lowest
    out = diagonal_tiled_attention(q, k, v, causal=False, config=EXACT, attn_mask=mask)
    mean = v.mean(2, keepdim=True)[0].repeat_interleave(2, 0).expand(4, 10, 64 // 2)
    torch.testing.assert_close(out[0, :, 10:20], mean, atol=1e-5, rtol=0)
    keys = (t.repeat_interleave(2, 1) for t in (k, v))
    expected = scaled_dot_product_attention(q, *keys, attn_mask=mask)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@each_direction
@pytest.mark.parametrize(
    "setting", [EXACT, DMAConfig(low="mxfp4", tile=32, diagonal=32, sink=32)], ids=["none", "mxfp4"]
)
def test_packed_sequences_equal_the_sequences_alone(setting, causal):
    """With quantisation, where sequences begin on tile boundaries: tiles count from the row's first token.

    Keys are not smoothed here: their mean is that of the whole row.
    """
    lengths = [64, 32, 34]
    q, k, v = random_qkv(LENGTH, LENGTH, heads=4, kv_heads=2)
    config = dataclasses.replace(setting, smooth_k=False)
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    out = diagonal_tiled_attention(q, k, v, causal=causal, config=config, sequence_ids=ids)
    for part in torch.arange(LENGTH).split(lengths):
        own = (t[:, :, part] for t in (q, k, v))
        alone = diagonal_tiled_attention(*own, causal=causal, config=config)
        torch.testing.assert_close(out[:, :, part], alone, atol=2e-6, rtol=0)


@pytest.mark.parametrize("left", [1, 31, 32, 77])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 40}, {"softcap": 2.0}, {"sinks": SINKS}], ids=str)
def test_left_padding_equals_the_sequence_alone_quantised_too(left, options):
    """Tiles and the mean of the keys belong to the sequence, wherever padding puts it."""
    q, k, v = random_qkv(LENGTH, LENGTH, heads=4, kv_heads=2)
    config = DMAConfig(tile=32, diagonal=32, sink=32)
    mask = torch.ones(1, LENGTH, dtype=torch.bool)
    mask[:, :left] = False
    out = diagonal_tiled_attention(q, k, v, config=config, padding_mask=mask, **options)
    own = (t[:, :, left:] for t in (q, k, v))
    alone = diagonal_tiled_attention(*own, config=config, **options)
    torch.testing.assert_close(out[:, :, left:], alone, atol=2e-6, rtol=0)
    assert not out[:, :, :left].any()


def test_an_attention_mask_that_says_causal_equals_causal():
    q, k, v = random_qkv(LENGTH, LENGTH)
    config = DMAConfig(low="mxfp4", tile=32, diagonal=32, sink=32, smooth_k=False)
    expected = diagonal_tiled_attention(q, k, v, config=config)
    mask = causal_mask(LENGTH, LENGTH)
    for same in (mask, torch.where(mask, 0.0, -torch.inf)):
        out = diagonal_tiled_attention(q, k, v, config=config, attn_mask=same)
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


def test_a_window_that_holds_all_and_a_softcap_far_above_the_scores_change_nothing():
    q, k, v = random_qkv(LENGTH, LENGTH)
    expected = diagonal_tiled_attention(q, k, v, config=EXACT)
    for options in ({"sliding_window": LENGTH}, {"softcap": 1e6}, {"sinks": torch.full((2,), -1e4)}):
        out = diagonal_tiled_attention(q, k, v, config=EXACT, **options)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_memory_of_a_window_and_of_packed_sequences_grows_with_the_tile():
    q, k, v = random_qkv(2048, 2048, heads=1, kv_heads=1, d=16)
    ids = (torch.arange(2048) // 700)[None]
    for options in ({"sliding_window": 100}, {"sequence_ids": ids}):
        with LargestTensor() as largest:
            diagonal_tiled_attention(q, k, v, config=DMAConfig(tile=32, diagonal=32, sink=32), **options)
        assert largest.numel <= 2 * 32 * 2048
