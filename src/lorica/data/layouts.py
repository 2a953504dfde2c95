"""Data sets whose files are not rows with named columns.

A layout turns a file, or a folder of them, into rows with a prompt, an answer and, where a model is to choose, the
choices. Answers and choices start with the blank that stands behind the prompt's cue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.data.example import Pair
from lorica.data.formats import Format
from lorica.data.reader import FileSource, Records
from lorica.data.record import Record, Rejected, RowError
from lorica.errors import LoricaError

Row = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How a data set lies in its files.

    Attributes:
        files: the files of a path, those that the prompts are made of included.
        rows: the rows of one question file.
        pattern: the question files of a folder.
    """

    rows: Callable[[Path], Records]
    files: Callable[[Path], list[Path]] = lambda path: [path]
    pattern: str = "*"


@dataclass(frozen=True)
class LayoutSource:
    """A file or folder read by a layout."""

    name: str
    layout: Layout

    def records(self) -> Records:
        for path in self._questions():
            yield from self.layout.rows(path)

    def sha256(self) -> str:
        """Return the SHA-256 of the files' names and digests, of one file that of its bytes."""
        files = tuple(file for path in self._questions() for file in self.layout.files(path))
        return FileSource(self.name, files).sha256()

    def _questions(self) -> list[Path]:
        path = Path(self.name)
        found = sorted(path.glob(self.layout.pattern)) if path.is_dir() else [path]
        if not found:
            raise LoricaError(f"{path}: the folder holds no file {self.layout.pattern}.")
        return found


def as_pair(where: str, row: Row) -> Pair:
    """Return the row of a layout as an example."""
    return Pair(where, row["prompt"], row["answer"], choices=tuple(row.get("choices", ())))


FORMAT = Format("layout", ("prompt", "answer"), ("choices",), as_pair)


def converted(records: Records, convert: Callable[[Row], Row]) -> Records:
    """Yield records with their rows converted; where that raises `RowError`, rejected."""
    for record in records:
        if isinstance(record, Rejected):
            yield record
            continue
        try:
            yield Record(record.path, record.line, convert(record.value), record.raw)
        except RowError as error:
            yield record.rejected(error)
