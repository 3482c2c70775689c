"""How the report writes numbers."""

from __future__ import annotations


def small(value: float) -> str:
    """A divergence in one significant digit: 3e-4, and 0 for nothing (or less, by rounding)."""
    if value <= 0:
        return "0"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def ratio(value: float) -> str:
    """A ratio in two decimals, without zeros at the end: 1.3×, 0.93×."""
    return f"{value:.2f}".rstrip("0").rstrip(".") + "×"


def tokens(count: int) -> str:
    """A length in tokens: 32k for 32,768, 1,900 as it is."""
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else f"{count:,}"


def commit(name: str) -> str:
    """As much of a commit's name as tells it from others."""
    return name[:12]


def percent(fraction: float, places: int = 1) -> str:
    """0.125 as 12.5 %."""
    return f"{100 * fraction:.{places}f} %"
