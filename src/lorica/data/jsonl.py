"""JSON lines: rows with the numbers of their lines, one line in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.data.json_array import array_records
from lorica.data.record import MAX_ROW_BYTES, Record, Rejected, RowError
from lorica.data.strict_json import BOM, StrictDecoder, as_row, decode_utf8


@dataclass(frozen=True)
class Line:
    """One line of a file: its number from 1, its byte offset, its bytes without the line end.

    ``size`` is the length in the file; where it exceeds ``MAX_ROW_BYTES``, ``raw`` holds only the start.
    """

    number: int
    offset: int
    raw: bytes
    size: int

    @property
    def blank(self) -> bool:
        return self.size <= MAX_ROW_BYTES and not self.raw.strip()

    def text(self) -> str:
        """Return the line decoded.

        Raises:
            RowError: the line is too long, holds a NUL byte or is not UTF-8.
        """
        if self.size > MAX_ROW_BYTES:
            raise RowError("line too long", f"{self.size} bytes, the limit is {MAX_ROW_BYTES}")
        return decode_utf8(self.raw, self.offset)


def read_lines(path: Path) -> Iterator[Line]:
    """Yield every line of a file in bounded memory; a UTF-8 byte order mark and line ends are taken off."""
    offset = number = 0
    with path.open("rb") as file:
        while chunk := file.readline(MAX_ROW_BYTES + 2):
            number += 1
            size, tail = len(chunk), chunk
            while not tail.endswith(b"\n") and (tail := file.readline(2**20)):
                size += len(tail)
            raw = chunk.rstrip(b"\r\n")
            mark = len(BOM) if number == 1 and raw.startswith(BOM) else 0
            line_end = len(tail) - len(tail.rstrip(b"\r\n"))
            yield Line(number, offset + mark, raw[mark : mark + MAX_ROW_BYTES], size - mark - line_end)
            offset += size


def json_records(path: Path) -> Iterator[Record | Rejected]:
    """Yield the rows of a ``.json`` or ``.jsonl`` file; whether it is an array is read from its first byte."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(BOM).lstrip(b" \t\r\n")
    return array_records(path) if head.startswith(b"[") else _line_records(path)


def _line_records(path: Path) -> Iterator[Record | Rejected]:
    decoder = StrictDecoder()
    for line in read_lines(path):
        if line.blank:
            continue
        try:
            value = _parse_line(decoder, line.text())
        except RowError as error:
            yield Rejected.of(str(path), line.number, line.raw, error)
        else:
            yield Record(str(path), line.number, value, line.raw)


def _parse_line(decoder: StrictDecoder, text: str) -> dict[str, Any]:
    start = len(text) - len(text.lstrip())
    value, end, problem = decoder.decode(text, start)
    if text[end:].strip():
        raise RowError("malformed JSON", f"text after the row's end at column {end + 1}")
    if problem:
        raise problem
    return as_row(value)
