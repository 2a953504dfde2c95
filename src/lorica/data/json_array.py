"""A JSON array as rows: its text passes through a window, so that a file of any size takes bounded memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lorica.data.record import MAX_ROW_BYTES, Record, Rejected, RowError
from lorica.data.strict_json import BOM, StrictDecoder, as_row, decode_utf8
from lorica.errors import LoricaError

_CHUNK = 2**20
_BLANK = re.compile(r"[ \t\r\n]*")


def array_records(path: Path) -> Iterator[Record | Rejected]:
    """Yield the elements of an array. Past a syntax error rows cannot be told apart, so that one is raised."""
    decoder = StrictDecoder()
    with path.open("rb") as file:
        window = _Window(path, file)
        window.skip_blank()
        window.advance(window.at + 1)  # the opening bracket
        more = window.skip_blank() != "]"
        while more:
            window.skip_blank()
            line = window.line
            try:
                value, end, problem = window.value(decoder)
                row = _element(path, line, value, window.text[window.at : end], problem)
                window.advance(end)
                more = _comma_follows(window)
            except RowError as error:
                raise LoricaError(
                    f"{path}:{line}: {error}. After it the rows of a JSON array cannot be told apart: "
                    "repair the file, or store one JSON object per line (.jsonl)."
                ) from None
            yield row
        window.advance(window.at + 1)
        if window.skip_blank():
            raise LoricaError(f"{path}:{window.line}: text after the end of the JSON array; remove it.")


def _element(path: Path, line: int, value: Any, text: str, problem: RowError | None) -> Record | Rejected:
    raw = text.encode("utf-8")
    try:
        if problem:
            raise problem
        if len(raw) > MAX_ROW_BYTES:
            raise RowError("line too long", f"a row of {len(raw)} bytes, the limit is {MAX_ROW_BYTES}")
        return Record(str(path), line, as_row(value), raw)
    except RowError as error:
        return Rejected.of(str(path), line, raw[:MAX_ROW_BYTES], error)


def _comma_follows(window: _Window) -> bool:
    """Tell whether another element follows, and go behind the comma; else stay at the closing bracket."""
    char = window.skip_blank()
    if char == ",":
        window.advance(window.at + 1)
    if char not in (",", "]"):
        raise RowError("malformed JSON", "expected ',' or ']' after the row")
    return char == ","


class _Window:
    """The part of a file's text that is being read; what was passed is dropped when more is read.

    Attributes:
        text: what is held.
        at: the position in it.
        line: the number of the line at that position, from 1.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file, self._offset = path, file, 0
        self._first_line = self._first_column = 1  # of the text that is held
        self.text, self.at, self.line = "", 0, 1

    def advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def skip_blank(self) -> str:
        """Go to the next character that is no blank and return it; "" at the end of the file."""
        while True:
            blank = _BLANK.match(self.text, self.at)
            self.advance(blank.end() if blank else self.at)
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def value(self, decoder: StrictDecoder) -> tuple[Any, int, RowError | None]:
        """Return the JSON value here, where it ends, and its problem; what is missing of it is read.

        Raises:
            RowError: no value, or one of more than ``MAX_ROW_BYTES``.
        """
        before = ""
        while True:
            failed = None
            try:
                found = decoder.decode(self.text, self.at, self._first_line, self._first_column)
                if found[1] + 2 < len(self.text):  # a number may go on with "e+1"
                    return found
            except RowError as error:
                failed = error
            if failed and str(failed) == before and "Unterminated string" not in before:
                raise failed  # more text did not help
            if len(self.text) - self.at > MAX_ROW_BYTES:
                reason = f"; {failed.detail}" if failed else ""
                raise RowError("line too long", f"no end of the row within {MAX_ROW_BYTES} characters{reason}")
            if not self._more():
                if failed:
                    raise failed
                return found
            before = str(failed)

    def _more(self) -> bool:
        """Drop what was passed and read at least as much as is left; False at the end of the file."""
        raw = self._whole_characters(max(_CHUNK, len(self.text) - self.at))
        if not raw:
            return False
        newline = self.text.rfind("\n", 0, self.at)
        self._first_column = self.at - newline if newline >= 0 else self._first_column + self.at
        if self._offset == 0 and raw.startswith(BOM):
            self._offset, raw = len(BOM), raw[len(BOM) :]
        try:
            self.text = self.text[self.at :] + decode_utf8(raw, self._offset)
        except RowError as error:
            raise LoricaError(f"{self._path}: {error}.") from None
        self.at, self._first_line = 0, self.line
        self._offset += len(raw)
        return True

    def _whole_characters(self, size: int) -> bytes:
        raw = self._file.read(size)
        for _ in range(3):  # a character has at most three bytes behind its first
            following = self._file.read(1)
            if not following or not 0x80 <= following[0] < 0xC0:
                self._file.seek(-len(following), 1)
                break
            raw += following
        return raw
