"""`RangesMask`: to a model it is SDPA's bool mask [B, 1, M, N]; in memory it is four numbers a query."""

from __future__ import annotations

import copy

import pytest
import torch
from test_reference import LargestTensor
from torch import Tensor
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from dma_hf.masks import query_ranges
from dma_hf.ranges_mask import RangesMask, dense_mask

M, N = 20, 33


@pytest.fixture
def mask() -> RangesMask:
    """Two rows, one of them padded, with a sliding window of seven tokens."""
    padding = torch.tensor([[0, N], [9, 30]])
    return RangesMask(query_ranges(M, N, causal=True, left=6, key_ranges=padding), N)


def test_it_has_the_shape_dtype_and_device_of_the_mask(mask):
    assert mask.shape == (2, 1, M, N)
    assert mask.dtype == torch.bool
    assert mask.device.type == "cpu"
    assert mask.ndim == 4
    assert mask.size(-1) == N


def test_it_is_the_mask_that_the_ranges_say(mask):
    keys = torch.arange(N)
    for b in range(2):
        for i in range(M):
            start, stop = mask.ranges[b, i, :2].tolist()
            assert torch.equal(mask.dense()[b, 0, i], (keys >= start) & (keys < stop))


@pytest.mark.parametrize(
    "operation",
    [
        lambda m: m[:, :, :, :10],
        lambda m: m[:, :, -1:, :],
        lambda m: m[1:],
        lambda m: m[:, 0, None],
        lambda m: m[..., torch.tensor([3, 1])],
        lambda m: torch.cat((m, torch.ones(2, 1, M, 4, dtype=torch.bool)), -1),
        lambda m: torch.cat((m, m), 0),
        lambda m: torch.where(m, 0.0, torch.finfo(torch.float32).min),
        lambda m: torch.where(m, torch.zeros(()), torch.tensor(-torch.inf)),
        lambda m: ~m,
        lambda m: m.logical_not(),
        lambda m: m & ~m,
        lambda m: m | torch.eye(M, N, dtype=torch.bool),
        lambda m: m + torch.randn(2, 1, M, N, generator=torch.Generator().manual_seed(0)),
        lambda m: (1.0 - m.float()) * -1e4,
        lambda m: m.to(torch.float32),
        lambda m: m.to(dtype=torch.bfloat16),
        lambda m: m.long(),
        lambda m: m.type_as(torch.zeros(1)),
        lambda m: m.all(),
        lambda m: m.any(-1),
        lambda m: m.sum(),
        lambda m: m.sum(-1),
        lambda m: torch.zeros(2, 4, M, N).masked_fill(m, -1.0),
        lambda m: torch.zeros(2, 4, M, N).masked_fill(~m, -1.0),
        lambda m: torch.ones(2, 1, M, N)[m],
        lambda m: m.masked_fill(m, value=False),
        lambda m: m.expand(2, 4, M, N),
        lambda m: m.expand(-1, 3, -1, -1),
        lambda m: m.repeat(1, 2, 1, 1),
        lambda m: m.repeat_interleave(2, dim=0),
        lambda m: m.squeeze(1),
        lambda m: m.view(2, M * N),
        lambda m: m.reshape(-1),
        lambda m: m.transpose(-1, -2),
        lambda m: m.contiguous(),
        lambda m: m.clone(),
        lambda m: torch.nn.functional.pad(m, (0, 3)),
        lambda m: m == m,
        lambda m: torch.stack([m, m]),
        lambda m: m.index_select(0, torch.tensor([1, 0, 1])),
        lambda m: torch.split(m, 1)[1],
        lambda m: torch.nn.functional.scaled_dot_product_attention(
            torch.ones(2, 4, M, 8), torch.ones(2, 4, N, 8), torch.ones(2, 4, N, 8), attn_mask=m
        ),
    ],
)  # fmt: skip
def test_any_operation_gives_what_it_gives_on_the_dense_mask(mask, operation):
    actual, expected = operation(mask), operation(mask.dense())
    if isinstance(actual, RangesMask):
        actual = actual.dense()
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


def test_values_leave_it_as_they_leave_a_mask(mask):
    assert mask[0, 0, 3].tolist() == mask.dense()[0, 0, 3].tolist()
    assert mask[0, 0, 0, 0].item() == mask.dense()[0, 0, 0, 0].item()
    assert bool(mask.all()) is False


def write_into_a_slice(m):
    m[:, :, :, 3] = True


def write_where_another_mask_says(m):
    m[torch.eye(M, N, dtype=torch.bool).expand(2, 1, M, N)] = True


def write_into_a_view(m):
    rows = m[:, 0]
    rows |= torch.eye(M, N, dtype=torch.bool)
    rows[:, 5].fill_(True)


def write_into_all_of_it(m):
    m[:] = True


@pytest.mark.parametrize(
    "write",
    [
        write_into_a_slice,
        write_where_another_mask_says,
        write_into_a_view,
        write_into_all_of_it,
        lambda m: m.logical_not_(),
        lambda m: m.detach().fill_(True),
        lambda m: m.masked_fill_(torch.eye(M, N, dtype=torch.bool), True),
        lambda m: m.copy_(torch.zeros(2, 1, M, N, dtype=torch.bool)),
        lambda m: torch.logical_not(torch.ones(2, 1, M, N), out=m),
    ],
    ids=lambda write: write.__name__,
)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_is_written_into_it_is_kept(mask, write, context):
    """Vision models open their image's part of the mask; a lost write would be a wrong answer."""
    with context():
        mask = RangesMask(mask.ranges, N)
        expected = mask.dense()
        write(expected)
        write(mask)
        assert mask.ranges is None
        assert torch.equal(mask.dense(), expected)
        assert torch.equal(~mask, ~expected)


def test_to_look_at_it_leaves_the_ranges(mask):
    assert not mask.all()
    assert torch.where(mask, 0.0, 1.0).shape == mask.shape
    assert mask[:, :, :, :N].ranges is not None
    assert mask.ranges is not None


@pytest.mark.parametrize(
    "keep",
    [
        lambda m: m.to("cpu"),
        lambda m: m.to(torch.device("cpu")),
        lambda m: m.to("cpu", copy=True),
        lambda m: m.to(torch.bool),
        lambda m: m.bool(),
        lambda m: m.detach(),
        lambda m: m.to("meta"),
    ],
)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_stays_ranges_when_it_is_moved(mask, keep, context):
    """accelerate moves masks to the device of each layer."""
    with context():
        moved = keep(mask.clone())
    assert isinstance(moved, RangesMask)
    assert moved.shape == mask.shape
    assert moved.ranges.device == moved.device
    if moved.device.type == "cpu":
        assert torch.equal(moved.ranges, mask.ranges)


def test_it_is_copied_and_printed(mask):
    for copied in (copy.copy(mask), copy.deepcopy(mask), mask.clone()):
        assert torch.equal(copied.ranges, mask.ranges)
    assert repr(mask).startswith("RangesMask(tensor(")


# --- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask])
def test_a_long_padded_batch_has_no_mask_of_queries_times_keys(create):
    """The largest tensor that making and moving the mask needs is the numbers of a few columns."""
    length, batch = 8192, 4
    padding = torch.ones(batch, length, dtype=torch.long)
    for row, left in enumerate((0, 100, 3000, 8000)):
        padding[row, :left] = 0
    assert largest(create, padding, length) <= 4 * 2 * batch * length  # int64 columns, counted as int32


def test_long_packed_sequences_have_no_mask_of_queries_times_keys():
    length = 8192
    positions = torch.cat([torch.arange(n) for n in (5000, 3000, 192)])[None]
    assert largest(create_causal_mask, None, length, positions) <= 4 * 2 * length


def largest(create, padding: Tensor | None, length: int, positions: Tensor | None = None) -> int:
    config = LlamaConfig(num_hidden_layers=1, hidden_size=4, num_attention_heads=1, intermediate_size=4)
    config.sliding_window = 512
    config._attn_implementation = "dma"
    embeds = torch.zeros(1 if padding is None else len(padding), length, 1)
    with LargestTensor() as recorded:
        mask = create(
            config=config, inputs_embeds=embeds, attention_mask=padding, past_key_values=None,
            position_ids=positions,
        ).to("cpu")  # fmt: skip
    assert isinstance(mask, RangesMask)
    assert mask.shape[-2:] == (length, length)
    return recorded.numel


def test_dense_mask_of_no_keys_and_no_queries():
    assert dense_mask(query_ranges(0, 5, causal=True), 5).shape == (1, 1, 0, 5)
    assert not dense_mask(query_ranges(3, 0, causal=False, query_offset=0), 0).any()
