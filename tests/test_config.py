"""`DMAConfig`: defaults, validation, presets, the command-line form and JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dma_hf import DMAConfig
from dma_hf.formats import FORMAT_NAMES, FORMATS, get_format


def test_the_default_is_the_papers_setting():
    config = DMAConfig()
    assert config == DMAConfig.preset("paper")
    assert (config.low, config.high) == ("nvfp4", "mxfp8")
    assert (config.diagonal, config.sink, config.tile) == (128, 128, 128)
    assert (config.diagonal_tiles, config.sink_tiles) == (1, 1)
    assert config.smooth_k
    assert not config.rotate
    assert (config.scale_rule, config.pv, config.backend) == ("floor", "none", "auto")


def test_it_is_frozen_and_hashable():
    config = DMAConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.low = "mxfp4"
    assert hash(config) == hash(DMAConfig())


def test_every_format_name_is_accepted_and_made_canonical():
    for name in ("mxfp8", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "nvfp4", "fp8", "int8", "none"):
        assert name in FORMAT_NAMES
        config = DMAConfig(low=name, high=name)
        assert config.low == config.high == ("mxfp8" if name == "mxfp8_e4m3" else name)


def test_quantizes():
    assert not DMAConfig(low="none", high="none").quantizes
    assert DMAConfig(low="none", high="fp8").quantizes
    assert DMAConfig(low="fp8", high="none").quantizes


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"low": "fp6"}, ValueError, r"low='fp6' is not a format; choose from mxfp8,.*none"),
        ({"high": "MXFP8"}, ValueError, r"high='MXFP8'"),
        ({"high": None}, ValueError, r"high=None"),
        ({"tile": 100}, ValueError, r"tile=100 must be a power of two"),
        ({"tile": 8}, ValueError, r"tile=8 .*at least 16"),
        ({"tile": 0}, ValueError, r"tile=0"),
        ({"tile": -128}, ValueError, r"tile=-128"),
        ({"diagonal": 100}, ValueError, r"diagonal=100 must be 0 or a positive multiple of tile=128"),
        ({"diagonal": -128}, ValueError, r"diagonal=-128"),
        ({"sink": 64}, ValueError, r"sink=64 .*tile=128"),
        ({"tile": 256}, ValueError, r"diagonal=128 .*tile=256"),
        ({"diagonal": 128.0}, TypeError, r"diagonal=128.0 must be an int"),
        ({"sink": "128"}, TypeError, r"sink='128' must be an int"),
        ({"tile": True}, TypeError, r"tile=True must be an int"),
        ({"smooth_k": 1}, TypeError, r"smooth_k=1 must be True or False"),
        ({"rotate": "yes"}, TypeError, r"rotate='yes' must be True or False"),
        ({"scale_rule": "round"}, ValueError, r"scale_rule='round'.*floor, ceil"),
        ({"pv": "int8"}, ValueError, r"pv='int8'.*none, fp8"),
        ({"backend": "cuda"}, ValueError, r"backend='cuda'.*auto, reference, triton"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_fields_are_named_with_their_value(fields, error, message):
    with pytest.raises(error, match=message) as caught:
        DMAConfig(**fields)
    assert "\n" not in str(caught.value)


def test_unknown_preset_lists_the_presets():
    with pytest.raises(ValueError, match=r"preset='best' is unknown; choose from.*paper"):
        DMAConfig.preset("best")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("paper", DMAConfig()),
        ("low=mxfp4", DMAConfig(low="mxfp4")),
        ("low=mxfp4,diagonal=256", DMAConfig(low="mxfp4", diagonal=256)),
        ("paper,rotate=true", DMAConfig(rotate=True)),
        (" paper , smooth_k = false ", DMAConfig(smooth_k=False)),
        ("low=none,high=none", DMAConfig(low="none", high="none")),
        ("tile=64,diagonal=64,sink=0,rotate=1", DMAConfig(tile=64, diagonal=64, sink=0, rotate=True)),
        ("high=mxfp8_e4m3", DMAConfig()),
    ],
)
def test_parse(text, expected):
    assert DMAConfig.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"config=''"),
        ("papers", r"'papers'.*paper"),
        ("low=fp6", r"low='fp6'"),
        ("paper,mxfp4", r"'mxfp4' is not field=value"),
        ("paper,", r"'' is not field=value"),
        ("lo=mxfp4", r"unknown field 'lo'; choose from low, high"),
        ("low=mxfp4,low=nvfp4", r"'low' is given twice"),
        ("diagonal=wide", r"diagonal='wide'.*whole number"),
        ("rotate=maybe", r"rotate='maybe'.*true or false"),
        ("tile=256", r"tile=256"),
    ],
)
def test_parse_errors_are_one_line_that_names_the_part(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        DMAConfig.parse(text)
    assert "\n" not in str(caught.value)


def test_from_dict_names_unknown_fields():
    with pytest.raises(ValueError, match=r"colour"):
        DMAConfig.from_dict({"low": "fp8", "colour": "red"})


@given(
    low=st.sampled_from(FORMAT_NAMES),
    high=st.sampled_from(FORMAT_NAMES),
    tile=st.sampled_from([16, 32, 64, 128, 256]),
    diagonal=st.integers(0, 4),
    sink=st.integers(0, 4),
    flags=st.tuples(st.booleans(), st.booleans()),
    scale_rule=st.sampled_from(["floor", "ceil"]),
    pv=st.sampled_from(["none", "fp8"]),
    backend=st.sampled_from(["auto", "reference", "triton"]),
)
def test_round_trips_through_json_and_through_text(
    low, high, tile, diagonal, sink, flags, scale_rule, pv, backend
):
    config = DMAConfig(
        low=low, high=high, tile=tile, diagonal=diagonal * tile, sink=sink * tile, smooth_k=flags[0],
        rotate=flags[1], scale_rule=scale_rule, pv=pv, backend=backend,
    )  # fmt: skip
    assert DMAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert DMAConfig.parse(",".join(f"{k}={v}" for k, v in config.to_dict().items())) == config


def test_get_format():
    assert get_format("mxfp8_e4m3") is FORMATS["mxfp8"]
    with pytest.raises(ValueError, match=r'format="none"'):
        get_format("none")
    with pytest.raises(ValueError, match=r"format='fp6'"):
        get_format("fp6")


def test_layers_set_fields_otherwise(tmp_path):
    config = DMAConfig(low="mxfp4", layers={3: {"low": "none"}, 0: {"diagonal": 512, "low": "mxfp8_e4m3"}})
    assert config.for_layer(1) == config.for_layer(None) == DMAConfig(low="mxfp4")
    assert config.for_layer(3) == DMAConfig(low="none")
    assert config.for_layer(0) == DMAConfig(low="mxfp8", diagonal=512)
    assert hash(config) == hash(dataclasses.replace(config))
    # a change of the whole reaches the layers that do not say otherwise
    assert dataclasses.replace(config, sink=256).for_layer(3) == DMAConfig(low="none", sink=256)

    config.save(tmp_path / "calibrated.json")
    assert DMAConfig.load(tmp_path / "calibrated.json") == config
    assert DMAConfig.parse(str(tmp_path / "calibrated.json")) == config


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({-1: {}}, "layers has the key -1"),
        ({0: {"colour": 1}}, "colour"),
        ({0: {"low": "fp5"}}, r"layers\[0\].*fp5"),
        ({0: {"layers": {}}}, "layers"),
        ({1: {}, "1": {}}, "twice"),
    ],
)
def test_layers_are_checked(layers, message):
    with pytest.raises(ValueError, match=message):
        DMAConfig(layers=layers)


@pytest.mark.parametrize("text", ["", "[]", '{"low": "fp5"}'])
def test_a_file_that_holds_no_setting_is_named(tmp_path, text):
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"wrong\.json"):
        DMAConfig.load(path)
