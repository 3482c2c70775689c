"""`diagonal_tiled_attention`: what it accepts, and how it refuses everything else."""

from __future__ import annotations

import pytest
import torch

from dma_hf import DMAConfig, diagonal_tiled_attention

Q = torch.ones(2, 4, 5, 16)
KV = torch.ones(2, 2, 7, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": None}, TypeError, r"query is a NoneType"),
        ({"key": [1.0]}, TypeError, r"key is a list"),
        ({"value": 3}, TypeError, r"value is a int"),
        ({"query": Q[0]}, ValueError, r"query has shape \[4, 5, 16\].*\[batch, heads, length, head_dim\]"),
        ({"value": KV[0]}, ValueError, r"value has shape \[2, 7, 16\]"),
        ({"query": Q.double()}, TypeError, r"query has dtype torch.float64; accepted are bfloat16"),
        ({"key": KV.long()}, TypeError, r"key has dtype torch.int64"),
        ({"key": KV.bfloat16()}, TypeError, r"key has dtype torch.bfloat16, query has torch.float32"),
        ({"value": KV.half()}, TypeError, r"value has dtype torch.float16, query has torch.float32"),
        ({"value": KV.to("meta")}, ValueError, r"value is on meta, query on cpu"),
        ({"key": KV[:1]}, ValueError, r"batch sizes differ: query 2, key 1, value 2"),
        ({"key": KV[:, :1].expand(2, 3, 7, 16)}, ValueError, r"query has 4 heads, key has 3"),
        ({"key": KV[:, :0]}, ValueError, r"query has 4 heads, key has 0"),
        ({"value": KV[:, :1]}, ValueError, r"value has 1 heads and 7 tokens,\s+key has 2"),
        ({"value": KV[:, :, :6]}, ValueError, r"value has 2 heads and 6 tokens"),
        ({"key": KV[..., :8]}, ValueError, r"key has head_dim 8, query has 16"),
        ({"query": Q[..., :0], "key": KV[..., :0]}, ValueError, r"head_dim of query is 0"),
        ({"value": KV[..., :0]}, ValueError, r"of value 0"),
        ({"scale": float("nan")}, ValueError, r"scale=nan must be finite"),
        ({"scale": float("inf")}, ValueError, r"scale=inf must be finite"),
        ({"scale": "big"}, (TypeError, ValueError), r"scale='big'"),
        ({"config": "paper"}, TypeError, r"config='paper' must be a DMAConfig"),
        ({"config": {"low": "fp8"}}, TypeError, r"config=\{'low': 'fp8'\}"),
        ({"padding_mask": torch.ones(2, 5).bool()}, ValueError, r"padding_mask has shape \[2, 5\].*\[2, 7\]"),
        (
            {"padding_mask": torch.ones(2, 1, 5, 7).bool()},
            ValueError,
            r"padding_mask has shape \[2, 1, 5, 7\]",
        ),
        ({"padding_mask": [[1] * 7] * 2}, TypeError, r"padding_mask is a list"),
        # an additive mask (0 where visible, -inf where not) means the opposite of a padding mask
        ({"padding_mask": torch.zeros(2, 7)}, TypeError, r"padding_mask has dtype torch.float32"),
        (
            {"padding_mask": torch.tensor([[1, 1, 0, 0, 1, 1, 1]] * 2)},
            NotImplementedError,
            r"padding_mask has padding between real tokens",
        ),
        ({"padding_mask": torch.ones(2, 7)}, TypeError, r"padding_mask has dtype torch.float32"),
        ({"sequence_ids": [[0] * 7] * 2}, TypeError, r"sequence_ids must be a tensor of integers"),
        ({"sequence_ids": torch.zeros(2, 7)}, TypeError, r"sequence_ids must be a tensor of integers"),
        (
            {"sequence_ids": torch.zeros(2, 7).long()},
            ValueError,
            r"sequence_ids has shape \[2, 7\] for 5 queries; .* with as many queries as keys",
        ),
        (
            {
                "query": Q[:, :, :1].expand(2, 4, 7, 16),
                "sequence_ids": torch.tensor([[0, 0, 1, 1, 0, 0, 0]] * 2),
            },
            ValueError,
            r"sequence_ids decreases along a row",
        ),
        ({"sliding_window": 0}, ValueError, r"sliding_window=0 must be at least 1 token"),
        ({"sliding_window": 4.0}, TypeError, r"sliding_window=4.0 must be an int"),
        ({"sliding_window": True}, TypeError, r"sliding_window=True must be an int"),
        ({"attn_mask": [[1.0]]}, TypeError, r"attn_mask is a list"),
        ({"attn_mask": torch.ones(1, 1, 5, 7).int()}, TypeError, r"attn_mask has dtype torch.int32"),
        (
            {"attn_mask": torch.ones(5, 7).bool()},
            ValueError,
            r"attn_mask has shape \[5, 7\].*\[2 or 1, 4 or 1",
        ),
        ({"attn_mask": torch.ones(1, 2, 5, 7)}, ValueError, r"attn_mask has shape \[1, 2, 5, 7\]"),
        ({"attn_mask": torch.ones(1, 1, 1, 7)}, ValueError, r"attn_mask has shape \[1, 1, 1, 7\]"),
        ({"attn_mask": torch.ones(1, 1, 5, 7, device="meta")}, ValueError, r"attn_mask is on meta"),
        ({"softcap": 0.0}, ValueError, r"softcap=0.0 must be finite and positive"),
        ({"softcap": "50"}, TypeError, r"softcap='50' must be a number"),
        ({"sinks": [0.0] * 4}, TypeError, r"sinks must be a tensor of floating-point numbers"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks has shape \[2\]; accepted is \[heads\] = \[4\]"),
        ({"scale": -1.0}, ValueError, r"scale=-1.0 must be finite and positive"),
        ({"scale": 0.0}, ValueError, r"scale=0.0 must be finite and positive"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(arguments, error, message):
    arguments = {"query": Q, "key": KV, "value": KV, **arguments}
    with pytest.raises(error, match=message) as caught:
        diagonal_tiled_attention(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_shape_and_dtype_it_promises(dtype):
    out = diagonal_tiled_attention(Q.to(dtype), KV.to(dtype), KV[..., :3].to(dtype), config=DMAConfig())
    assert out.shape == (2, 4, 5, 3)
    assert out.dtype == dtype
    assert torch.equal(out, torch.ones_like(out))  # the mean of equal values


def test_arguments_that_may_be_left_out():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 32, generator=g) for _ in range(3))
    auto = DMAConfig.preset("auto")
    expected = diagonal_tiled_attention(q, k, v, causal=True, scale=32**-0.5, config=auto)
    assert torch.equal(diagonal_tiled_attention(q, k, v), expected)


@pytest.mark.parametrize("pv", ["none", "fp8"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=["no batch", "no queries", "no keys"]
)
def test_empty_input(shape, causal, pv):
    batch, m, n = shape
    out = diagonal_tiled_attention(
        torch.ones(batch, 4, m, 16), torch.ones(batch, 2, n, 16), torch.ones(batch, 2, n, 8),
        causal=causal, config=DMAConfig(pv=pv),
    )  # fmt: skip
    assert out.shape == (batch, 4, m, 8)
    assert not out.any()


def test_grad_enabled_forward_works_and_backward_is_refused():
    q = Q.clone().requires_grad_()
    out = diagonal_tiled_attention(q, KV, KV)
    assert torch.equal(out.detach(), diagonal_tiled_attention(Q, KV, KV))
    with pytest.raises(RuntimeError, match=r"dma attention is for inference and has no gradient"):
        out.sum().backward()


def test_input_is_left_alone():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 32, generator=g) for _ in range(3))
    before = [t.clone() for t in (q, k, v)]
    diagonal_tiled_attention(q, k, v, config=DMAConfig(rotate=True, pv="fp8"))
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True))


def test_autocast_changes_nothing():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 32, generator=g) for _ in range(3))
    expected = diagonal_tiled_attention(q, k, v, config=DMAConfig(rotate=True))
    with torch.autocast("cpu", torch.bfloat16):
        out = diagonal_tiled_attention(q, k, v, config=DMAConfig(rotate=True))
    assert torch.equal(out, expected)
