"""Which rows a batch is made of: so that a message can name them, and a batch can be made again in parts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from torch.utils.data import ConcatDataset, Dataset

from lorica.methods.task import Collate, Row, Rows

NUMBER = "row_number"
"""Key of a row's number in its dataset; in a batch it holds the numbers of all rows, as a list."""

SHOWN = 32
"""Of more rows the rest is only counted."""


class Numbered(Dataset[Row]):
    """Rows that bring their number with them; for ``NumberedCollate``."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return {**self.rows[index], NUMBER: index}


class NumberedCollate:
    """A collator that leaves the numbers of ``Numbered`` rows in the batch; others, which are only scored, have none.

    Args:
        collate: makes a batch of numbered rows.
        scored: makes one of the others; the same by default.
    """

    def __init__(self, collate: Collate, scored: Collate | None = None) -> None:
        self.collate, self.scored = collate, scored or collate

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        numbers = [row[NUMBER] for row in rows if NUMBER in row]
        if not numbers:
            return self.scored(rows)
        return {**self.collate([{key: row[key] for key in row if key != NUMBER} for row in rows]), NUMBER: numbers}


def tokens_of(row: Row) -> int:
    """Return how many tokens a row's passes work on: of what is read, and of an encoder-decoder's target."""
    return len(row["input_ids"]) + len(row["labels"])


def where(rows: Rows, number: int) -> str:
    """Return the file and line of a row, or its number (from 0) where the dataset cannot tell."""
    if isinstance(rows, ConcatDataset):
        part = bisect_right(rows.cumulative_sizes, number)
        return where(rows.datasets[part], number - (rows.cumulative_sizes[part - 1] if part else 0))
    tell = getattr(rows, "where", None)
    return f"row {number}" if tell is None else str(tell(number))


def named(rows: Rows, numbers: Sequence[int]) -> str:
    """Return the files and lines of some rows: ``a.jsonl:3,17; b.jsonl:2``."""
    lines: dict[str, list[str]] = {}
    for number in numbers[:SHOWN]:
        file, _, line = where(rows, number).rpartition(":")
        lines.setdefault(file, []).append(line)
    text = "; ".join(f"{file}:{','.join(held)}" if file else ", ".join(held) for file, held in lines.items())
    return f"{text} and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else text
