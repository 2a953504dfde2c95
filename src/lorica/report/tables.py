"""Tables as data, and the few ways to write a figure. HTML, Markdown and the terminal print the same cells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lorica.scores import shorten

MISSING = "-"


@dataclass(frozen=True)
class Table:
    """Cells ready to print.

    Attributes:
        header: column names.
        rows: one list of cells per row, as long as the header.
        left: how many leading columns hold words and are aligned left; the rest hold numbers.
        words: further columns that hold words, counted from 0.
    """

    header: list[str]
    rows: list[list[str]]
    left: int = 1
    words: tuple[int, ...] = ()

    def is_word(self, column: int) -> bool:
        """Return whether a column holds words."""
        return column < self.left or column in self.words

    def text(self, *, widest: int = 40) -> str:
        """Return the table aligned for a terminal, cells cut to ``widest`` characters."""
        lines = [[shorten(cell, widest) for cell in line] for line in (self.header, *self.rows)]
        widths = [max(len(line[j]) for line in lines) for j in range(len(self.header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if self.is_word(j) else cell.rjust(width)
                for j, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown, cells escaped."""
        rule = [":--" if self.is_word(j) else "--:" for j in range(len(self.header))]
        body = [[markdown(cell) for cell in line] for line in self.rows]
        lines = [[markdown(cell) for cell in self.header], rule, *body]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(text: str) -> str:
    """Return ``text`` on one line, with what Markdown or HTML would read as markup escaped."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", line)


def percent(value: float | None) -> str:
    """One decimal, or ``-`` where not measured."""
    return MISSING if value is None or value != value else f"{value:.1f}"


def points(value: float | None) -> str:
    """A difference in percentage points, with its sign."""
    return MISSING if value is None or value != value else f"{round(value, 1) + 0.0:+.1f}"


def scientific(value: float | None) -> str:
    """Two significant digits, exponent below 0.01: for leakage and learning rates."""
    if value is None:
        return MISSING
    return f"{value:.2g}" if value == 0 or abs(value) >= 0.01 else f"{value:.1e}"


def duration(seconds: float | None) -> str:
    """``820 ms``, ``12.3 s``, ``4 min 05 s``, ``2 h 10 min``."""
    if seconds is None:
        return MISSING
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


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
