"""`DMAConfig`: what the user chooses, validated when it is made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from .formats import NONE, canonical_name
from .memo import memoized

ScaleRule = Literal["floor", "ceil"]
PVFormat = Literal["none", "fp8", "auto"]
Backend = Literal["auto", "reference", "triton"]

MIN_TILE = 16
AUTO = "auto"
"""A format that the hardware decides, see `dma_hf.presets`."""

Overrides = tuple[tuple[str, Any], ...]
"""Fields that one layer sets otherwise: (name, value) pairs, which hash."""


@dataclass(frozen=True)
class DMAConfig:
    """Settings of diagonal-tiled mixed-precision attention (arXiv 2604.03950).

    The score matrix is cut into square tiles of `tile` tokens. Tiles on the diagonal and in the sink
    columns multiply Q and K in the `high` format, all others in the `low` format.

    Attributes:
        low: format of the tiles far from the diagonal: "mxfp8" (= "mxfp8_e4m3"), "mxfp8_e5m2",
            "mxfp4", "nvfp4", "fp8", "int8", "fp8_tile", "int8_tile", "none" (unquantised) or "auto" (the
            hardware decides).
        high: format of diagonal and sink tiles; the same names.
        diagonal: width of the high-precision diagonal in tokens, a multiple of `tile`; with
            `diagonal == tile` a query tile sees only its own tile in high precision.
        sink: leading tokens kept in high precision for every query, a multiple of `tile`.
        tile: side of a precision tile in tokens, a power of two, at least 16.
        smooth_k: subtract from K its mean over tokens before quantising (softmax does not change).
        rotate: multiply Q and K by an orthonormal Hadamard matrix before quantising.
        scale_rule: how an E8M0 scale is chosen: "floor" (OCP MX v1.0) or "ceil" (nothing saturates).
        pv: format of the second product: "none" (16-bit), "fp8" (E4M3, V scaled per channel) or "auto".
        min_length: calls with fewer keys than this go to SDPA, where they have no masks or other
            modifiers: the kernels' launches cost more there than low precision saves.
        backend: "auto", "reference" (PyTorch, any device) or "triton".
        layers: fields that single layers set otherwise, by layer index, as in
            `layers={0: {"low": "mxfp8"}, 5: {"diagonal": 512}}`. See `for_layer`.

    Raises:
        ValueError: a field holds a value that is not accepted.
        TypeError: a field holds a value of the wrong type.
    """

    low: str = "nvfp4"
    high: str = "mxfp8"
    diagonal: int = 128
    sink: int = 128
    tile: int = 128
    smooth_k: bool = True
    rotate: bool = False
    scale_rule: ScaleRule = "floor"
    pv: PVFormat = "none"
    min_length: int = 0
    backend: Backend = "auto"
    layers: Mapping[int, Mapping[str, Any]] | tuple[tuple[int, Overrides], ...] = ()

    def __post_init__(self) -> None:
        # frozen: the canonical spelling is stored through object.__setattr__
        for name in ("low", "high"):
            value = getattr(self, name)
            object.__setattr__(self, name, AUTO if value == AUTO else canonical_name(value, name))
        for name in ("diagonal", "sink", "tile", "min_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r} must be an int (tokens)")
        if self.tile < MIN_TILE or self.tile & (self.tile - 1):
            raise ValueError(f"tile={self.tile} must be a power of two, at least {MIN_TILE}")
        for name in ("diagonal", "sink"):
            value = getattr(self, name)
            if value < 0 or value % self.tile:
                raise ValueError(
                    f"{name}={value} must be 0 or a positive multiple of tile={self.tile} (tokens)"
                )
        if self.min_length < 0:
            raise ValueError(f"min_length={self.min_length} must be at least 0 (tokens)")
        for name in ("smooth_k", "rotate"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r} must be True or False")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r} is not accepted; choose from {', '.join(choices)}")
        layers = _frozen_layers(self.layers)
        object.__setattr__(self, "layers", layers)
        for index, overrides in layers:
            try:
                dataclasses.replace(self, layers=(), **dict(overrides))
            except (ValueError, TypeError) as error:
                raise type(error)(f"layers[{index}]: {error}") from None

    def for_layer(self, index: int | None) -> DMAConfig:
        """The setting of one layer: this one with the layer's own fields, and without `layers`.

        Args:
            index: the layer's index, as Transformers counts; None for a layer that has none.
        """
        return self if not self.layers else _of_layer(self, index)

    @property
    def diagonal_tiles(self) -> int:
        """Width of the diagonal in tiles."""
        return self.diagonal // self.tile

    @property
    def sink_tiles(self) -> int:
        """Number of leading key tiles kept in high precision."""
        return self.sink // self.tile

    @property
    def quantizes(self) -> bool:
        """Whether any tile is quantised at all."""
        return self.low != NONE or self.high != NONE

    @classmethod
    def preset(cls, name: str) -> DMAConfig:
        """The named setting. Raises ValueError for an unknown name, listing the presets."""
        if name not in PRESETS:
            raise ValueError(f"preset={name!r} is unknown; choose from {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def parse(cls, text: str) -> DMAConfig:
        """Read a setting from the command line: "paper", "low=mxfp4,diagonal=256", "paper,rotate=true".

        A first part without "=" names the preset to start from; every other part sets a field. A text
        that ends in ".json" is a file that `save` wrote.

        Raises:
            ValueError: a part is not `field=value`, a field is unknown, a value is not accepted, or a
                file cannot be read.
        """
        if text.endswith(".json"):
            return cls.load(text)
        preset_name = "paper"
        changes: dict[str, Any] = {}
        for position, part in enumerate(piece.strip() for piece in text.split(",")):
            field, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals:
                if position > 0 or not part:
                    raise ValueError(f"config={text!r}: {part!r} is not field=value")
                preset_name = part
            elif field not in _FIELD_PARSERS:
                raise ValueError(
                    f"config={text!r}: unknown field {field!r}; choose from {', '.join(_FIELD_PARSERS)}"
                )
            elif field in changes:
                raise ValueError(f"config={text!r}: {field!r} is given twice")
            else:
                try:
                    changes[field] = _FIELD_PARSERS[field](value)
                except ValueError as error:
                    raise ValueError(f"config={text!r}: {field}={value!r}: {error}") from None
        return dataclasses.replace(cls.preset(preset_name), **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; `layers` only where there are any."""
        fields = dataclasses.asdict(self)
        del fields["layers"]
        if self.layers:
            layers = _frozen_layers(self.layers)
            fields["layers"] = {str(index): dict(overrides) for index, overrides in layers}
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> DMAConfig:
        """The inverse of `to_dict`. Raises ValueError for a field that does not exist."""
        _check_names(fields, {*_FIELD_PARSERS, "layers"})
        return cls(**fields)

    def save(self, path: str | Path) -> None:
        """Write the setting as JSON. Raises OSError where the file cannot be written."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> DMAConfig:
        """Read what `save` wrote. Raises ValueError, naming the file, where it is no such thing."""
        try:
            fields = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"config={str(path)!r} cannot be read: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"config={str(path)!r} holds no JSON object of DMAConfig fields")
        try:
            return cls.from_dict(fields)
        except (ValueError, TypeError) as error:
            raise ValueError(f"config={str(path)!r}: {error}") from None


def _check_names(fields: Mapping[str, Any], accepted: set[str]) -> None:
    unknown = sorted(set(fields) - accepted)
    if unknown:
        raise ValueError(
            f"unknown DMAConfig field(s) {', '.join(unknown)}; choose from {', '.join(sorted(accepted))}"
        )


def _frozen_layers(layers: Any) -> tuple[tuple[int, Overrides], ...]:
    """`layers` in the one form that hashes and compares, sorted by index. JSON has the indices as text."""
    if not isinstance(layers, (Mapping, tuple)):
        raise TypeError(f"layers={layers!r} must map layer indices to fields")
    frozen = []
    for key, overrides in dict(layers).items():
        index = int(key) if isinstance(key, str) and key.isdecimal() else key
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"layers has the key {key!r}; accepted are layer indices from 0")
        if not isinstance(overrides, (Mapping, tuple)):
            raise TypeError(f"layers[{index}]={overrides!r} must map field names to values")
        fields = dict(overrides)
        _check_names(fields, set(_FIELD_PARSERS))
        frozen.append((index, tuple(sorted(fields.items()))))
    if len({index for index, _ in frozen}) < len(frozen):
        raise ValueError("layers names the same layer twice")
    return tuple(sorted(frozen))


@memoized
def _of_layer(config: DMAConfig, index: int | None) -> DMAConfig:
    # validated once, not once a layer and step
    overrides = dict(_frozen_layers(config.layers)).get(-1 if index is None else index, ())
    return dataclasses.replace(config, layers=(), **dict(overrides))


def _parse_bool(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise ValueError("expected true or false")
    return values[text.lower()]


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("expected a whole number") from None


_CHOICES: dict[str, tuple[str, ...]] = {
    "scale_rule": get_args(ScaleRule),
    "pv": get_args(PVFormat),
    "backend": get_args(Backend),
}
_PARSERS_BY_ANNOTATION: dict[str, Any] = {"int": _parse_int, "bool": _parse_bool}
_FIELD_PARSERS: dict[str, Any] = {
    field.name: _PARSERS_BY_ANNOTATION.get(str(field.type), str)
    for field in dataclasses.fields(DMAConfig)
    if field.name != "layers"  # too much for a command line: a file holds them
}

SHORT = 2048
"""Keys under which the preset "auto" leaves a call to SDPA: measured on one H200, see the README."""

PRESETS: dict[str, DMAConfig] = {
    # what the hardware at hand does best within the quality that the README states
    "auto": DMAConfig(low=AUTO, high=AUTO, pv="auto", min_length=SHORT),
    # the paper's setting: NVFP4 far away, MXFP8 on one diagonal and one sink tile, keys smoothed
    "paper": DMAConfig(),
    # as close to exact as low precision gets: 8-bit integers far away, nothing else quantised
    "accurate": DMAConfig(low="int8", high="none"),
    # the most speed: both products in 8 bits
    "fast": DMAConfig(low="fp8_tile", high="none", pv="fp8"),
}
