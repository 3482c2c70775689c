"""The attention kernel against the reference, on small shapes; test_kernels_gpu.py has the large ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    CAPABILITIES,
    DEVICE,
    DTYPES,
    FORMATS,
    LAYOUTS,
    Case,
    act_as,
    check,
    laid_out,
    pairwise,
    relative_error,
    run,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dma_hf import DMAConfig, diagonal_tiled_attention
from dma_hf.kernels.attention import attend_quantized
from dma_hf.kernels.quantize import quantize_key
from dma_hf.masks import query_ranges
from dma_hf.plan import Plan
from dma_hf.tuning import Blocks

PADDINGS = {
    "": (),
    "left": ((0.3, 1.0), (0.0, 1.0)),
    "right": ((0.0, 0.8), (0.0, 1.0)),
    "both": ((0.2, 0.9), (0.5, 0.6)),
}

CASES = [
    (choice, Case(
        config=DMAConfig(
            low=choice["low"], high=choice["high"], tile=choice["tiles"][0], diagonal=choice["tiles"][1],
            sink=choice["tiles"][2], rotate=choice["rotate"], smooth_k=choice["smooth"],
            scale_rule=choice["rule"],
        ),
        lengths=choice["lengths"], dims=choice["dims"], batch=choice["heads"][0], heads=choice["heads"][1:],
        causal="causal" in choice["mask"], real=PADDINGS[choice["mask"].partition(" ")[2]],
        dtype=choice["dtype"], layout=choice["layout"],
    ))
    for choice in pairwise(
        low=FORMATS,
        high=FORMATS,
        tiles=((32, 32, 32), (16, 16, 16), (64, 64, 64), (128, 128, 128), (32, 0, 0), (32, 64, 32),
               (16, 0, 48), (16, 48, 0)),
        lengths=((33, 100), (1, 1), (17, 17), (127, 127), (129, 129), (100, 33), (1, 129)),
        dims=((32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (64, 96),
              (128, 64)),
        mask=("causal", "bidirectional", "causal left", "causal right", "causal both", "bidirectional both"),
        heads=((1, 1, 1), (1, 4, 2), (2, 2, 1), (2, 2, 2)),  # batch, heads, KV heads
        dtype=DTYPES,
        layout=LAYOUTS,
        rotate=(False, True),
        smooth=(True, False),
        rule=("floor", "ceil"),
        capability=CAPABILITIES,
    )
]  # fmt: skip


def label(choice: object) -> str:
    if isinstance(choice, tuple):
        return "x".join(label(part) for part in choice)
    return str(choice).removeprefix("torch.").replace(" ", "-")


@pytest.mark.parametrize(
    ("choice", "case"), CASES, ids=["-".join(label(part) for part in choice.values()) for choice, _ in CASES]
)
def test_pairwise_covering(choice, case, monkeypatch):
    act_as(choice["capability"], monkeypatch)
    check(case)


def test_the_covering_has_every_format_pair():
    assert {(choice["low"], choice["high"]) for choice, _ in CASES} == {
        (a, b) for a in FORMATS for b in FORMATS
    }


@pytest.mark.parametrize(
    "block", [Blocks(16, 64, 32, 4, 1), Blocks(64, 16, 16, 4, 1), Blocks(32, 32, 64, 4, 1)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_block_sizes_do_not_show(block, causal):
    config = DMAConfig(tile=64, diagonal=64, sink=64)
    case = Case(config, lengths=(150, 201), causal=causal)
    inputs = case.inputs()
    out = attend_quantized(
        **inputs, quantized=quantize_key(inputs["key"], config, "16bit", "16bit"),
        causal=causal, scale=64**-0.5, config=config,
        plan=Plan("16bit", "16bit", block, use_tma=False, via_memory=False),
    )  # fmt: skip
    assert relative_error(out, run(case, inputs, "reference")) <= 2e-3


@pytest.mark.parametrize("causal", [True, False])
def test_queries_in_chunks_give_the_rows_of_one_call(causal):
    # a chunk that ends before the last key would see fewer keys, so chunks are cut from the end
    case = Case(lengths=(100, 100), causal=causal)
    inputs = case.inputs()
    whole = run(case, inputs, "triton")
    last = run(case, {**inputs, "query": inputs["query"][:, :, -37:]}, "triton")
    assert relative_error(last, whole[:, :, -37:]) <= 1e-3


def test_a_row_of_padding_only_is_zeros_and_leaves_the_others_alone():
    case = Case(lengths=(50, 50), batch=3, real=((0.0, 1.0), (0.0, 0.0), (0.4, 1.0)))
    check(case)
    out = run(case, case.inputs(), "triton")
    assert not out[1].any()
    assert not out[2, :, :20].any()  # queries that are padding themselves, before the first real key


def test_what_padding_holds_does_not_matter():
    case = Case(lengths=(60, 60), batch=2, real=((0.3, 1.0), (0.0, 0.7)))
    inputs = case.inputs()
    expected = run(case, inputs, "triton")
    for name in ("key", "value"):
        inputs[name].masked_fill_(~inputs["padding_mask"][:, None, :, None], torch.nan)
    assert torch.equal(run(case, inputs, "triton"), expected)


@pytest.mark.parametrize("dims", [(16, 16), (24, 40)])
@pytest.mark.parametrize("low", ["nvfp4", "mxfp4", "int8"])
def test_heads_smaller_than_a_block(dims, low):
    check(Case(DMAConfig(low=low, tile=16, diagonal=16, sink=16), lengths=(40, 40), dims=dims))


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_scale(scale):
    case = Case()
    inputs = case.inputs()
    out, expected = (
        diagonal_tiled_attention(
            **{name: x.to(device) for name, x in inputs.items()}, scale=scale,
            config=replace(case.config, backend=backend),
        )
        for backend, device in (("triton", DEVICE), ("reference", "cpu"))
    )  # fmt: skip
    assert relative_error(out, expected) <= 2e-3


@pytest.mark.parametrize("low", ["nvfp4", "mxfp4", "fp8", "int8", "none"])
@pytest.mark.parametrize("causal", [True, False])
def test_every_element_is_written(low, causal, uninitialized_memory_is_nan):
    check(
        Case(
            DMAConfig(low=low, tile=32, diagonal=32, sink=32), lengths=(75, 101), dims=(80, 96), causal=causal
        )
    )


@pytest.mark.parametrize("low", ["nvfp4", "mxfp4", "int8", "none"])
def test_two_runs_give_the_same_bits(low):
    case = Case(DMAConfig(low=low, tile=32, diagonal=32, sink=32), real=((0.1, 1.0),))
    inputs = case.inputs()
    first, second = run(case, inputs, "triton"), run(case, inputs, "triton")
    assert torch.equal(first.view(torch.int16), second.view(torch.int16))


def test_input_is_left_alone():
    case = Case(DMAConfig(rotate=True))
    inputs = case.inputs()
    before = {name: x.clone() for name, x in inputs.items()}
    run(case, inputs, "triton")
    assert all(torch.equal(inputs[name], x) for name, x in before.items())


@pytest.mark.parametrize(("batch", "m", "n"), [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty_input(batch, m, n):
    case = Case(lengths=(m, n), batch=batch)
    out = run(case, case.inputs(), "triton")
    assert out.shape == (batch, 2, m, 64)
    assert not out.any()


# a failing example is small as it is: shrinking it would take minutes in the interpreter
@settings(max_examples=15, phases=[Phase.generate])
@given(data=st.data())
def test_any_setting(data):
    def draw(*values):
        return data.draw(st.sampled_from(values))

    tile = draw(16, 32)
    kv_heads = draw(1, 2)
    case = Case(
        config=DMAConfig(
            low=draw(*FORMATS), high=draw(*FORMATS), tile=tile, diagonal=tile * draw(0, 1, 2, 3),
            sink=tile * draw(0, 1, 2), smooth_k=draw(True, False), rotate=draw(False, True),
            scale_rule=draw("floor", "ceil"),
        ),
        lengths=(data.draw(st.integers(1, 50)), data.draw(st.integers(1, 50))),
        dims=(8 * data.draw(st.integers(4, 12)), 8 * data.draw(st.integers(4, 12))),
        heads=(kv_heads * draw(1, 2, 3), kv_heads),
        batch=draw(1, 2),
        causal=draw(True, False),
        real=draw(*PADDINGS.values()),
        dtype=draw(*DTYPES),
        layout=draw(*LAYOUTS),
    )  # fmt: skip
    check(case, seed=data.draw(st.integers(0, 99)))


# --- NaN and Inf --------------------------------------------------------------------------------------


def sdpa(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """SDPA in float32. Causal rows are calls of their own: a mask that is added turns NaN into more NaN."""
    query, key, value = (x.cpu().float() for x in (query, key, value))
    if not causal:
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(query, key, value, enable_gqa=True)
    rows = [
        sdpa(query[:, :, i : i + 1], key[:, :, : i + 1], value[:, :, : i + 1], causal=False)
        for i in range(query.shape[2])
    ]
    return torch.cat(rows, dim=2)


@pytest.mark.parametrize("config", [
    "paper", "low=mxfp4", "low=int8,high=fp8", "low=fp8,high=mxfp8_e5m2,rotate=true", "high=none",
    "low=none,high=none", "low=mxfp4,high=mxfp4,smooth_k=false",
])  # fmt: skip
@pytest.mark.parametrize("name", ["query", "key"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_tokens_show_where_sdpa_shows_them(config, name, bad):
    case = Case(DMAConfig.parse(f"{config},tile=32,diagonal=32,sink=32"), lengths=(100, 100), heads=(2, 2))
    inputs = case.inputs()
    inputs[name][0, 0, 40, 7] = bad  # one token of one head, far from the sink
    inputs[name][0, 1, 99, 7] = bad  # and the last token of the other
    out, expected = run(case, inputs, "triton").cpu(), sdpa(**inputs, causal=True)
    assert torch.equal(out.isnan(), expected.isnan())
    assert not out.isinf().any()
    # the neighbours are as good as they are in the reference
    reference = run(case, inputs, "reference")
    assert torch.equal(out.isnan(), reference.isnan())
    assert relative_error(out.nan_to_num(), reference.nan_to_num()) <= 2e-3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_values_stay_in_their_channel(bad):
    case = Case(lengths=(100, 100), causal=False)
    inputs = case.inputs()
    clean = run(case, inputs, "triton")
    inputs["value"][0, 0, 40, 7] = bad
    out, expected = run(case, inputs, "triton"), sdpa(**inputs, causal=False)
    assert torch.equal(out.isfinite().cpu(), expected.isfinite())
    finite = out.isfinite()
    assert torch.equal(out[finite], clean[finite])


# --- what is refused ----------------------------------------------------------------------------------


@pytest.fixture
def no_launch(monkeypatch):
    def launched(*args: object, **kwargs: object) -> None:
        pytest.fail("a kernel was launched")

    monkeypatch.setattr("dma_hf.triton_backend.quantize_key_value", launched)
    monkeypatch.setattr("dma_hf.triton_backend.attend_quantized", launched)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_last_dimension_with_gaps_is_refused(name, no_launch):
    inputs = Case().inputs()
    inputs[name] = inputs[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    with pytest.raises(ValueError, match=rf"^{name} has strides .*contiguous last dimension") as caught:
        run(Case(), inputs, "triton")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dims", [(8, 64), (264, 64), (36, 64), (64, 8), (64, 264), (64, 36)])
def test_a_head_dimension_without_kernels_is_refused(dims, no_launch):
    size = next(size for size in dims if size != 64)
    case = Case(dims=dims)
    with pytest.raises(ValueError, match=rf'backend="triton".*head_dim.*={size}\b.*reference'):
        run(case, case.inputs(), "triton")


def test_a_device_without_kernels_is_refused(no_launch):
    meta = {name: x.to("meta") for name, x in Case().inputs().items()}
    with pytest.raises(ValueError, match=r'backend="triton".*CUDA device, not meta.*reference'):
        diagonal_tiled_attention(**meta, config=DMAConfig(backend="triton"))


def test_a_cpu_without_the_interpreter_is_refused(no_launch, monkeypatch):
    monkeypatch.setattr("dma_hf.policy.interpreting", lambda: False)
    inputs = Case().inputs(torch.device("cpu"))
    with pytest.raises(ValueError, match=r'backend="triton".*CUDA device, not cpu.*reference'):
        diagonal_tiled_attention(**inputs, config=DMAConfig(backend="triton"))


def test_auto_on_a_cpu_is_the_reference_even_under_the_interpreter(no_launch):
    inputs = Case().inputs(torch.device("cpu"))
    auto, reference = (
        diagonal_tiled_attention(**inputs, config=DMAConfig(backend=backend))
        for backend in ("auto", "reference")
    )
    assert torch.equal(auto, reference)


# --- the custom op ------------------------------------------------------------------------------------


SETTING = (True, 0.125, "nvfp4", "mxfp8", 32, 32, 32, True, False, "floor", "none", "triton")


@pytest.mark.parametrize("modified", [False, True])
def test_the_operator_is_well_formed(modified):
    inputs = Case(lengths=(20, 40), dims=(64, 32)).inputs()
    modifiers = (None, None, None, None)
    if modified:
        ranges = query_ranges(20, 40, causal=True, left=9, device=DEVICE)
        bias, sinks = torch.zeros(1, 2, 20, 40, device=DEVICE), torch.zeros(2, device=DEVICE)
        modifiers = (ranges, bias, sinks, 20.0)
    torch.library.opcheck(torch.ops.dma_hf.attention.default, (*inputs.values(), *modifiers, *SETTING))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [(20, 40), (1, 1), (0, 7), (5, 0)])
def test_the_fake_output_has_the_real_strides(layout, lengths):
    inputs = Case(lengths=lengths, dims=(64, 32), heads=(4, 2), batch=2, layout=layout).inputs()
    arguments = (None, None, None, None, *SETTING)
    real = torch.ops.dma_hf.attention(*inputs.values(), *arguments)
    fake = torch.ops.dma_hf.attention(*(x.to("meta") for x in inputs.values()), *arguments)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_a_function_that_calls_it_compiles_without_graph_breaks():
    case = Case(lengths=(40, 40))
    inputs = case.inputs()
    config = replace(case.config, backend="triton")

    def twice(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return 2 * diagonal_tiled_attention(query, key, value, config=config)

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), twice(**inputs))


def test_layouts_are_what_they_say():
    x = torch.randn(2, 3, 5, 16)
    strides = {layout: laid_out(x, layout).stride() for layout in LAYOUTS}
    assert len(set(strides.values())) == len(LAYOUTS)
    assert all(stride[-1] == 1 for stride in strides.values())
    assert all(torch.equal(laid_out(x, layout), x) for layout in LAYOUTS if layout != "broadcast")
