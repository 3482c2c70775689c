"""The operand formats: which element, which block, which scale.

One table, read by the quantiser, the reference, the kernels and the docs. The microscaling (MX) formats
are those of the OCP Microscaling Formats specification v1.0; NVFP4 is NVIDIA's, used here with a
per-token second-level scale (the paper's "dual scale").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ElementType = Literal["e2m1", "e4m3", "e5m2", "int8"]
ScaleType = Literal["e8m0", "e4m3", "float32"]


@dataclass(frozen=True)
class Format:
    """One way to store the rows (tokens) of Q or K.

    Attributes:
        name: canonical name, as `DMAConfig.low` and `DMAConfig.high` take it.
        element: element type; E2M1 is packed two to a byte.
        element_max: largest finite magnitude of the element type.
        element_emax: exponent of the largest power of two of the element type (OCP's emax_elem).
        block: elements along D that share a scale; None means the whole token.
        scale: type of the block scale.
        global_scale: whether a float32 scale per token multiplies the block scales.
        key_tokens: neighbouring keys that share one scale, counted from the sequence's first token.
            Queries have a scale each: it joins the softmax's multiplication and costs nothing, while
            a scale for each key costs a multiplication for each score.
    """

    name: str
    element: ElementType
    element_max: float
    element_emax: int
    block: int | None
    scale: ScaleType
    global_scale: bool = False
    key_tokens: int = 1

    @property
    def packed(self) -> bool:
        """Whether two elements share a byte."""
        return self.element == "e2m1"

    @property
    def bits(self) -> int:
        """Bits per element, scales not counted."""
        return 4 if self.packed else 8


NONE = "none"
"""The name that stands for "not quantised": Q and K stay as they are given."""

FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Format("mxfp8", "e4m3", 448.0, 8, 32, "e8m0"),
        Format("mxfp8_e5m2", "e5m2", 57344.0, 15, 32, "e8m0"),
        Format("mxfp4", "e2m1", 6.0, 2, 32, "e8m0"),
        Format("nvfp4", "e2m1", 6.0, 2, 16, "e4m3", global_scale=True),
        Format("fp8", "e4m3", 448.0, 8, None, "float32"),
        Format("int8", "int8", 127.0, 6, None, "float32"),
        Format("fp8_tile", "e4m3", 448.0, 8, None, "float32", key_tokens=128),
        Format("int8_tile", "int8", 127.0, 6, None, "float32", key_tokens=128),
    )
}

ALIASES = {"mxfp8_e4m3": "mxfp8"}

FORMAT_NAMES: tuple[str, ...] = (*FORMATS, *ALIASES, NONE)
"""Every name a user may write."""


def canonical_name(name: str, argument: str = "format") -> str:
    """The canonical spelling of a format name.

    Raises:
        ValueError: `name` is no format; the message names `argument` and lists what is accepted.
    """
    if not isinstance(name, str) or name not in FORMAT_NAMES:
        raise ValueError(f"{argument}={name!r} is not a format; choose from {', '.join(FORMAT_NAMES)}")
    return ALIASES.get(name, name)


def get_format(name: str) -> Format:
    """The `Format` called `name`. Raises ValueError for an unknown name and for "none"."""
    canonical = canonical_name(name)
    if canonical == NONE:
        raise ValueError('format="none" means unquantised: there is nothing to encode')
    return FORMATS[canonical]
