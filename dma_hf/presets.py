"""What the formats "auto" become: the one table of hardware against formats.

Measured on Hopper: INT8 with a scale for each token is closer to exact than any 8-bit floating-point
format, and runs at the same rate (README, "Presets"). Elsewhere the kernels are compiled and checked, not
run: the choice there follows from what the tensor cores multiply.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .config import AUTO, DMAConfig
from .formats import NONE
from .memo import memoized


@dataclass(frozen=True)
class AutoFormats:
    """Formats of one family of hardware, and the first compute capability that has them."""

    hardware: str
    capability: int
    low: str
    high: str
    pv: str


AUTO_FORMATS = (
    # native block-scaled MMA: the paper's formats
    AutoFormats("Blackwell", 100, "nvfp4", "mxfp8", NONE),
    AutoFormats("Hopper", 90, "int8_tile", NONE, "fp8"),
    # no kernel for a second product in 8 bits there
    AutoFormats("Ada, Ampere", 80, "int8", NONE, NONE),
)
"""From the newest on. Without a GPU the choice is Hopper's, so that quality can be judged anywhere."""

CPU = 90


@memoized
def resolve(config: DMAConfig, capability: int | None) -> DMAConfig:
    """`config` with formats in the place of "auto".

    Args:
        capability: compute capability of the device, 90 for sm_90; None for a device without CUDA.
    """
    if AUTO not in (config.low, config.high, config.pv):
        return config
    capability = CPU if capability is None else capability
    row = next((row for row in AUTO_FORMATS if capability >= row.capability), AUTO_FORMATS[-1])
    fields = {name: getattr(row, name) for name in ("low", "high", "pv") if getattr(config, name) == AUTO}
    return replace(config, **fields)
