"""Tables as data, and how scores are written in them. HTML, Markdown and the terminal print the same cells."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorica.scores import shorten
from lorica.units import MISSING


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
