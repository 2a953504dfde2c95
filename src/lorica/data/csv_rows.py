"""Rows of a comma-separated file, each with the number of its first line."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lorica.data.jsonl import Line, read_lines
from lorica.data.record import MAX_ROW_BYTES, Record, Rejected, RowError
from lorica.errors import LoricaError, one_line

MAX_ROW_LINES = 2**16
"""So many lines may a row have: a quote that nobody closed would swallow the file."""


def csv_records(path: Path) -> Iterator[Record | Rejected]:
    """Yield the rows of a file with a header line; every value is a string.

    Raises:
        LoricaError: no header, or a column named twice.
    """
    lines = _Lines(path)
    # The limit belongs to the whole process: it is put back.
    old_limit = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        reader = csv.reader(lines, strict=True)
        header = _header(path, reader, lines)
        while True:
            lines.row.clear()
            problem = None
            try:
                cells = next(reader, None)
            except csv.Error as error:
                cells, problem = [], RowError("malformed CSV", str(error))
            except RowError as error:
                cells, problem = [], error
            if cells is None:
                return
            if cells or problem:
                yield _row(path, header, cells, list(lines.row), problem)
    finally:
        csv.field_size_limit(old_limit)


class _Lines:
    """The lines of a file as text for the parser; ``row`` are those of the current row, as one may span several."""

    def __init__(self, path: Path) -> None:
        self._lines = read_lines(path)
        self.row: list[Line] = []
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._size = line.size + (self._size if self.row else 0)
        self.row.append(line)
        if self._size > MAX_ROW_BYTES or len(self.row) > MAX_ROW_LINES:
            # The parser forgets what it read of the row and goes on behind it; a generator could not.
            raise RowError("line too long", f"a row of over {MAX_ROW_BYTES} bytes or {MAX_ROW_LINES} lines")
        return line.raw.decode("utf-8", errors="replace") + "\n"


def _header(path: Path, reader: Iterator[list[str]], lines: _Lines) -> list[str]:
    try:
        header = next((cells for cells in reader if cells), [])
        for line in lines.row:
            line.text()
    except (csv.Error, RowError) as error:
        raise LoricaError(f"{path}:1: the header line cannot be read: {error}.") from None
    twice = next((name for name, count in Counter(header).items() if count > 1), None)
    if twice is not None:
        raise LoricaError(
            f"{path}:1: the header names column {one_line(repr(twice))} more than once; rename one of them."
        )
    return header


def _row(
    path: Path, header: list[str], cells: list[str], lines: list[Line], problem: RowError | None
) -> Record | Rejected:
    # Blank lines before the row are skipped by the parser one at a time, so the first line is the row's own.
    raw = b"\n".join(line.raw for line in lines)
    number = lines[0].number
    try:
        for line in lines:
            line.text()
        if problem:
            raise problem
        if len(cells) != len(header):
            raise RowError("malformed CSV", f"{len(cells)} fields, the header has {len(header)}")
        return Record(str(path), number, dict(zip(header, cells, strict=True)), raw)
    except RowError as error:
        return Rejected.of(str(path), number, raw[:MAX_ROW_BYTES], error)
