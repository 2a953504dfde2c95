"""How figures are written, wherever they are told: sizes, times, counts, small numbers, lists."""

from __future__ import annotations

from collections.abc import Sequence

MISSING = "-"
"""Stands for what was not measured."""


def scientific(value: float | None) -> str:
    """Two significant digits, exponent below 0.01: for leakage and learning rates."""
    if value is None:
        return MISSING
    return f"{value:.2g}" if value == 0 or abs(value) >= 0.01 else f"{value:.1e}"


def duration(seconds: float | None) -> str:
    """What was measured: ``820 ms``, ``12.3 s``, ``4 min 05 s``, ``2 h 10 min``."""
    if seconds is None:
        return MISSING
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def estimate(seconds: float) -> str:
    """What is expected, in the largest unit that fits: ``0.041 s``, ``45 s``, ``12 min``, ``3.2 h``."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def count(value: int | None) -> str:
    """``950``, ``1.2 M``, ``7.0 B``."""
    return _scaled(value, ("", " k", " M", " B"))


def size(value: int | None) -> str:
    """Decimal units: ``820 B``, ``1.2 GB``."""
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def listed(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else "".join(items)


def _scaled(value: int | None, units: Sequence[str]) -> str:
    if value is None:
        return MISSING
    scaled, step = float(value), 0
    while scaled >= 999.5 and step < len(units) - 1:
        scaled, step = scaled / 1000, step + 1
    return f"{scaled:.0f}{units[step]}" if step == 0 else f"{scaled:.1f}{units[step]}"
