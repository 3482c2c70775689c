"""The kernels at full size on a GPU: lengths, masks, 64-bit offsets, compilation, CUDA graphs, memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import DEVICE, Case, laid_out, relative_error, run
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from triton.testing import do_bench

from dma_hf import DMAConfig, configure, diagonal_tiled_attention
from dma_hf.reference import reference_attention

pytestmark = pytest.mark.gpu

GIB = 2**30


@pytest.fixture(autouse=True)
def _release_memory() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def need_memory(gib: int) -> None:
    """Skip on a smaller card, or one that others fill."""
    if torch.cuda.mem_get_info()[0] < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """[B, H, N, D] in Transformers' layout, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    batch, heads, length, dim = shape
    return torch.randn(batch, length, heads, dim, device="cuda", dtype=dtype, generator=generator).transpose(
        1, 2
    )


def reference_rows(
    query: Tensor, key: Tensor, value: Tensor, config: DMAConfig, causal: bool, first: int, count: int = 128
) -> Tensor:
    """The reference's rows [first, first + count) of one call.

    Bottom-right alignment makes the last rows a call of their own. Causal rows further up are a call with
    fewer keys, which has another mean: only without smoothing.
    """
    if causal:
        stop = key.shape[2] - query.shape[2] + first + count
        assert stop == key.shape[2] or not config.smooth_k
        key, value = key[:, :, :stop], value[:, :, :stop]
    else:
        assert config.low == config.high or first + count == query.shape[2]  # tiles count from the end
    rows = query[:, :, first : first + count]
    return reference_attention(rows, key, value, causal=causal, scale=query.shape[-1] ** -0.5, config=config)


@pytest.mark.parametrize(
    ("config", "dims", "heads", "length"),
    [
        ("paper", (128, 128), (8, 2), 32768),
        ("low=mxfp4,high=none", (128, 128), (8, 2), 32768),
        ("paper,diagonal=512,sink=256", (64, 64), (8, 8), 16384),
        ("low=int8,high=fp8,rotate=true", (128, 128), (4, 1), 16385),
        ("low=fp8,high=mxfp8_e5m2", (256, 256), (4, 2), 8191),
        ("low=mxfp4,high=mxfp4", (192, 128), (4, 4), 4096),
        ("low=none,high=none", (80, 96), (4, 2), 8192),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_long_sequences(config, dims, heads, length, causal):
    setting = DMAConfig.parse(config)
    query = normal(1, heads[0], length, dims[0])
    key = normal(1, heads[1], length, dims[0], seed=1) + 3 * normal(1, heads[1], 1, dims[0], seed=2)
    value = normal(1, heads[1], length, dims[1], seed=3)
    out = diagonal_tiled_attention(query, key, value, causal=causal, config=setting)
    assert out.isfinite().all()
    expected = reference_rows(query, key, value, setting, causal, length - 128)
    assert relative_error(out[:, :, -128:], expected) <= 2e-3


@pytest.mark.parametrize("config", ["paper", "low=mxfp4,high=none", "low=int8,high=mxfp8_e5m2"])
def test_rows_in_the_middle(config):
    setting = DMAConfig.parse(f"{config},smooth_k=false")
    query, key, value = (normal(2, heads, 32768, 128, seed=heads) for heads in (4, 2, 2))
    out = diagonal_tiled_attention(query, key, value, config=setting)
    for first in (0, 100, 1000, 17000, 32000):
        expected = reference_rows(query, key, value, setting, True, first)
        assert relative_error(out[:, :, first : first + 128], expected) <= 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_long_sequences_in_other_types(dtype):
    query, key, value = (normal(1, 2, 8192, 128, dtype=dtype, seed=seed) for seed in range(3))
    key = (key * 8).round() / 8  # sums of these are exact, so the mean does not depend on their order
    out = diagonal_tiled_attention(query, key, value, config=DMAConfig())
    expected = reference_rows(query, key, value, DMAConfig(), True, 8192 - 128)
    assert relative_error(out[:, :, -128:], expected) <= (1e-4 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("layout", ["contiguous", "packed", "unaligned", "broadcast"])
def test_layouts(layout):
    query, key, value = (laid_out(normal(2, 4, 2000, 128, seed=seed), layout) for seed in range(3))
    out = diagonal_tiled_attention(query, key, value, config=DMAConfig())
    same = diagonal_tiled_attention(
        query.contiguous(), key.contiguous(), value.contiguous(), config=DMAConfig()
    )
    assert torch.equal(out, same)


# the reference walks through all of these rows, too: few heads keep it short
FULL_SIZE = {
    "padded": Case(DMAConfig(), (8192, 8192), (128, 128), (4, 2), batch=2, real=((0.3, 1.0), (0.1, 0.6))),
    "packed": Case(
        DMAConfig.parse("low=mxfp4"), (16384, 16384), (128, 128), (4, 2), sequences=(5000, 130, 3, 1900)
    ),
    "window": Case(DMAConfig(), (32768, 32768), (128, 128), (2, 1), window=4096),
    "bidirectional window": Case(
        DMAConfig.parse("low=int8"), (16384, 16384), (64, 64), (2, 1), window=500, causal=False
    ),
    "bool": Case(
        DMAConfig.parse("low=mxfp4"), (8192, 8192), (128, 128), (4, 2), mask="empty rows", causal=False
    ),
    "additive": Case(
        DMAConfig(), (8192, 8192), (128, 128), (4, 2), batch=2, mask="additive", mask_shape="B1", causal=False
    ),
    "bias and padding": Case(
        DMAConfig(), (8192, 8192), (64, 64), (4, 2), mask="bias", mask_shape="1H", real=((0.2, 1.0),)
    ),
    "softcap and sinks": Case(
        DMAConfig(), (32768, 32768), (128, 128), (2, 1), softcap=30.0, sinks=True, window=8192
    ),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_masks(name):
    case = FULL_SIZE[name]
    inputs = case.inputs()
    out, expected = run(case, inputs, "triton"), run(case, inputs, "reference", DEVICE)
    assert out.isfinite().all()
    assert relative_error(out, expected) <= 2e-3


def test_a_padded_row_is_what_it_is_alone():
    case = Case(DMAConfig(), (3000, 3000), (128, 128), (4, 2), batch=2, real=((0.3, 1.0), (0.0, 0.6)))
    inputs = case.inputs()
    out = diagonal_tiled_attention(**inputs, config=DMAConfig())
    for row in range(2):
        real = inputs["padding_mask"][row]
        alone = [inputs[name][row : row + 1, :, real] for name in ("query", "key", "value")]
        expected = diagonal_tiled_attention(*alone, config=DMAConfig())
        assert relative_error(out[row : row + 1, :, real], expected) <= 1e-3


def test_a_window_visits_no_more_than_the_window():
    query, key, value = (normal(1, heads, 32768, 128, seed=heads) for heads in (32, 8, 8))
    full, window = (
        do_bench(
            lambda size=size: diagonal_tiled_attention(
                query, key, value, config=DMAConfig(), sliding_window=size
            )
        )
        for size in (None, 4096)
    )
    # 4k of 16k keys that a causal query sees on average: 4.3 times fewer, plus the window's edges
    assert full / window >= 3


def test_more_than_2_to_the_31_elements_of_query():
    need_memory(24)
    query, key, value = normal(1, 64, 262144 + 300, 128), normal(1, 8, 640, 128), normal(1, 8, 640, 128)
    assert query.numel() > 2**31
    setting = DMAConfig()
    out = diagonal_tiled_attention(query, key, value, causal=False, config=setting)
    last = slice(query.shape[2] - 128, None)
    expected = reference_rows(query, key, value, setting, False, query.shape[2] - 128)
    assert relative_error(out[:, :, last], expected) <= 2e-3
    # the first rows, as a call of their own: queries so far before the keys have low tiles only
    setting = DMAConfig(low="mxfp8", high="mxfp8")
    del out
    out = diagonal_tiled_attention(query, key, value, causal=False, config=setting)
    for first in (0, 131072, 262144 + 172):
        expected = reference_rows(query, key, value, setting, False, first)
        assert relative_error(out[:, :, first : first + 128], expected) <= 2e-3


def test_offsets_beyond_2_to_the_31_in_key_and_value():
    # Rows far apart, not many of them: over 2^20 keys the tensor core's own accumulation is what shows.
    need_memory(16)
    length, spacing = 4396, 2**19
    assert length * spacing > 2**31
    storage = torch.zeros(length * spacing, device="cuda", dtype=torch.bfloat16)
    rows = storage.view(1, length, spacing)
    key, value = (
        rows[:, :, start : start + 2 * 128].unflatten(-1, (2, 128)).transpose(1, 2) for start in (0, 1024)
    )
    key.copy_(normal(1, 2, length, 128))
    value.copy_(normal(1, 2, length, 128, seed=1))
    query = normal(1, 2, 256, 128, seed=2)
    out = diagonal_tiled_attention(query, key, value, config=DMAConfig())
    expected = reference_rows(query, key, value, DMAConfig(), True, 128)
    assert relative_error(out[:, :, 128:], expected) <= 2e-3


@pytest.mark.parametrize("config", ["paper", "low=mxfp4", "low=int8,high=none"])
def test_two_runs_give_the_same_bits(config):
    query, key, value = (normal(2, heads, 4000, 128, seed=heads) for heads in (8, 2, 2))
    first, *others = (
        diagonal_tiled_attention(query, key, value, config=DMAConfig.parse(config)) for _ in range(4)
    )
    assert all(torch.equal(first.view(torch.int16), other.view(torch.int16)) for other in others)


def test_every_element_is_written(uninitialized_memory_is_nan):
    query, key, value = (normal(2, heads, 4001, 128, seed=heads) for heads in (8, 2, 2))
    assert diagonal_tiled_attention(query, key, value, config=DMAConfig()).isfinite().all()


@pytest.mark.parametrize("config", ["paper", "low=mxfp4,high=none"])
def test_extra_memory(config):
    query, key, value = (normal(1, heads, 32768, 128, seed=heads) for heads in (32, 8, 8))
    setting = DMAConfig.parse(config)
    diagonal_tiled_attention(
        query[:, :, -256:], key[:, :, -256:], value[:, :, -256:], config=setting
    )  # compile
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = diagonal_tiled_attention(query, key, value, config=setting)
    extra = torch.cuda.max_memory_allocated() - before - out.nbytes
    assert extra <= 1.2 * (key.nbytes + value.nbytes)


@pytest.mark.parametrize("options", ["padding_mask", "sequence_ids", "sliding_window"])
def test_ranges_take_no_memory_of_n_by_n(options):
    batch, length = 4, 32768
    query, key, value = (normal(batch, heads, length, 128, seed=heads) for heads in (8, 2, 2))
    positions = torch.arange(length, device="cuda").expand(batch, -1)
    given = {
        "padding_mask": positions >= torch.tensor([[9000], [0], [500], [32000]], device="cuda"),
        "sequence_ids": positions // 5000,
        "sliding_window": 4096,
    }
    call = {options: given[options], "config": DMAConfig()}
    out = diagonal_tiled_attention(query, key, value, **call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() - out.nbytes
    torch.cuda.reset_peak_memory_stats()
    out = diagonal_tiled_attention(query, key, value, **call)
    extra = torch.cuda.max_memory_allocated() - before - 2 * out.nbytes
    assert extra <= 1.2 * (key.nbytes + value.nbytes)  # a mask of one byte an element: 4 GiB


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation="dma").eval()
    return configure(model.to("cuda", torch.bfloat16), DMAConfig())


@pytest.fixture(scope="module")
def mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=128, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, sliding_window=300,
    )  # fmt: skip
    return (
        MistralForCausalLM._from_config(config, attn_implementation="dma").eval().to("cuda", torch.bfloat16)
    )


@pytest.mark.parametrize("batch", ["padded", "packed", "window"])
def test_a_model_is_equal_to_sdpas(batch, llama, mistral):
    length = 2000
    positions = torch.arange(length, device="cuda").expand(2, -1)
    real = positions >= torch.tensor([[700], [0]], device="cuda")
    call, model, compared = {"use_cache": False}, llama, slice(None)
    if batch == "packed":
        call["position_ids"] = positions % 700
    elif batch == "padded":
        call["attention_mask"], compared = real.long(), real
    else:
        model = mistral
    tokens = torch.randint(
        2, 128, (2, length), device="cuda", generator=torch.Generator("cuda").manual_seed(0)
    )
    exact = DMAConfig(low="none", high="none")
    setting = model.config.dma_config if hasattr(model.config, "dma_config") else None
    try:
        configure(model, exact)
        with torch.inference_mode():
            out = model(tokens, **call).logits
            model.set_attn_implementation("sdpa")
            expected = model(tokens, **call).logits
    finally:
        model.set_attn_implementation("dma")
        configure(model, DMAConfig() if setting is None else DMAConfig.from_dict(setting))
    assert relative_error(out[compared], expected[compared]) <= 2e-2


def test_a_model_compiles_without_graph_breaks(llama):
    tokens = torch.randint(2, 128, (2, 700), device="cuda")
    compiled = torch.compile(llama, fullgraph=True)
    with torch.inference_mode():
        # without a mask or a cache, a tracer cannot rule out packed sequences, and makes a mask of M x N
        out, expected = (model(tokens, torch.ones_like(tokens)).logits for model in (compiled, llama))
    # the compiler fuses, so 16-bit roundings fall elsewhere
    assert relative_error(out, expected) <= 2e-2


@pytest.mark.parametrize("config", ["paper", "low=mxfp4,high=none"])
def test_a_cuda_graph_replays(config):
    setting = DMAConfig.parse(config)
    inputs = [normal(1, heads, 1000, 128, seed=heads) for heads in (4, 2, 2)]
    diagonal_tiled_attention(*inputs, config=setting)  # compilation is no part of a graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = diagonal_tiled_attention(*inputs, config=setting)
    for seed in (10, 20):
        for old, new in zip(
            inputs, (normal(*x.shape, seed=seed + i) for i, x in enumerate(inputs)), strict=True
        ):
            old.copy_(new)
        graph.replay()
        assert torch.equal(out, diagonal_tiled_attention(*inputs, config=setting))


def test_a_model_in_a_cuda_graph_replays(llama):
    tokens = torch.randint(2, 128, (1, 512), device="cuda")
    mask = torch.ones_like(tokens)
    with torch.inference_mode():
        llama(tokens, mask, use_cache=False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = llama(tokens, mask, use_cache=False).logits
        tokens.copy_(torch.randint(2, 128, (1, 512), device="cuda"))
        graph.replay()
        assert torch.equal(out, llama(tokens, mask, use_cache=False).logits)
