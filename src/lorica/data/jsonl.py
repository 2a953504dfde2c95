"""Strict JSON rows with line numbers: JSON lines, and arrays of objects.

``json.loads`` takes duplicate keys, ``NaN`` and lone surrogates in silence and ``datasets`` reports none of
them by line, so both forms are read here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.data.record import Record, Rejected, RowError
from lorica.errors import LoricaError

MAX_LINE_BYTES = 8 * 2**20
MAX_DEPTH = 64
MAX_ARRAY_BYTES = 512 * 2**20
BOM = b"\xef\xbb\xbf"
_BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Line:
    """One line of a file: its number from 1, its byte offset, its bytes without the line end.

    ``size`` is the length in the file; where it exceeds ``MAX_LINE_BYTES``, ``raw`` holds only the start.
    """

    number: int
    offset: int
    raw: bytes
    size: int

    def text(self) -> str:
        """Return the line decoded.

        Raises:
            RowError: the line is too long, holds a NUL byte or is not UTF-8.
        """
        if self.size > MAX_LINE_BYTES:
            raise RowError("line too long", f"{self.size} bytes, the limit is {MAX_LINE_BYTES}")
        return decode_utf8(self.raw, self.offset)


def read_lines(path: Path) -> Iterator[Line]:
    """Yield every line of a file in bounded memory; a UTF-8 byte order mark and line ends are taken off."""
    offset = number = 0
    with path.open("rb") as file:
        while chunk := file.readline(MAX_LINE_BYTES + 2):
            number += 1
            size, tail = len(chunk), chunk
            while not tail.endswith(b"\n") and (tail := file.readline(2**20)):
                size += len(tail)
            raw = chunk.rstrip(b"\r\n")
            mark = len(BOM) if number == 1 and raw.startswith(BOM) else 0
            line_end = len(tail) - len(tail.rstrip(b"\r\n"))
            yield Line(number, offset + mark, raw[mark:], size - mark - line_end)
            offset += size


def decode_utf8(raw: bytes, offset: int = 0) -> str:
    """Decode bytes that stand at byte ``offset`` of their file.

    Raises:
        RowError: a NUL byte or invalid UTF-8, with the byte offset and a guess of the true encoding.
    """
    if (nul := raw.find(b"\0")) >= 0:
        raise RowError("NUL byte", f"at byte {offset + nul}{_guess(raw)}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {offset + error.start} is 0x{raw[error.start]:02x}{_guess(raw)}"
        raise RowError("invalid UTF-8", found) from None


def _guess(raw: bytes) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or raw.count(b"\0") * 3 > len(raw):
        return "; the file looks like UTF-16, save it as UTF-8"
    if b"\0" in raw:
        return ""
    try:
        raw.decode("cp1252")
    except UnicodeDecodeError:
        return "; save the file as UTF-8"
    return "; the file looks like Windows-1252 (Latin-1), save it as UTF-8"


class StrictDecoder:
    """A JSON decoder that names what ``json`` lets through.

    A value that is well formed but not allowed (a duplicate key, ``NaN``) comes back with its problem rather than
    as an exception, so that the reader of an array still knows where the next element starts.
    """

    def __init__(self) -> None:
        self._problems: list[RowError] = []
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def decode(self, text: str, start: int = 0) -> tuple[Any, int, RowError | None]:
        """Return the value at ``start``, the position after it, and its problem, if any.

        Raises:
            RowError: no JSON value can be read there.
        """
        self._problems.clear()
        try:
            value, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            line = f"line {error.lineno}, " if error.lineno > 1 else ""
            raise RowError("malformed JSON", f"{error.msg} at {line}column {error.colno}") from None
        except RecursionError:
            raise _too_deep() from None
        except ValueError as error:
            raise RowError("malformed JSON", str(error)) from None
        if "\\u" in text[start:end] and not self._problems:
            self._check_surrogates(value)
        if _depth(value) > MAX_DEPTH:
            self._problems.append(_too_deep())
        return value, end, self._problems[0] if self._problems else None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self._problems.append(RowError("duplicate key", repr(twice)))
        return value

    def _constant(self, literal: str) -> float:
        self._problems.append(RowError("number not allowed", f"{literal} is no JSON number"))
        return math.nan

    def _float(self, literal: str) -> float:
        value = float(literal)
        if math.isinf(value):
            self._problems.append(RowError("number not allowed", f"{literal[:30]} is too large"))
        return value

    def _check_surrogates(self, value: Any) -> None:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            self._problems.append(RowError("malformed JSON", f"lone surrogate \\u{code:04x} in a string"))


def _too_deep() -> RowError:
    return RowError("nested too deeply", f"the limit is {MAX_DEPTH} levels")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [child for parent in level for child in _children(parent)]:
        depth += 1
        if depth > MAX_DEPTH:
            break
    return depth


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def json_records(path: Path) -> Iterator[Record | Rejected]:
    """Yield the rows of a ``.json`` or ``.jsonl`` file; whether it is an array is read from its first byte."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(BOM).lstrip()
    return _array_records(path) if head.startswith(b"[") else _line_records(path)


def _line_records(path: Path) -> Iterator[Record | Rejected]:
    decoder = StrictDecoder()
    for line in read_lines(path):
        if not line.raw.strip():
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
    return _as_row(value)


def _as_row(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError("wrong type", f"a row is a JSON object, got {type_name(value)}")
    return value


def type_name(value: Any) -> str:
    """Return what JSON calls the type of a value, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _array_records(path: Path) -> Iterator[Record | Rejected]:
    """Yield the elements of an array. Past a syntax error rows cannot be told apart, so that one is raised."""
    text, decoder = _array_text(path), StrictDecoder()
    at = _skip_blank(text, _skip_blank(text, 0) + 1)
    line, counted, more = 1, 0, text[at : at + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end, problem = decoder.decode(text, at)
            at, more = _next_element(text, end)
        except RowError as error:
            raise LoricaError(
                f"{path}:{line}: {error}. After it the rows of a JSON array cannot be told apart: "
                "repair the file, or store one JSON object per line (.jsonl)."
            ) from None
        yield _array_element(path, line, value, text[counted:end], problem)
    if (rest := _skip_blank(text, at + 1)) < len(text):
        line += text.count("\n", counted, rest)
        raise LoricaError(f"{path}:{line}: text after the end of the JSON array; remove it.")


def _array_text(path: Path) -> str:
    if (size := path.stat().st_size) > MAX_ARRAY_BYTES:
        raise LoricaError(
            f"{path}: a JSON array of {size} bytes, the limit is {MAX_ARRAY_BYTES}; "
            "store one JSON object per line (.jsonl) instead."
        )
    raw = path.read_bytes()
    mark = len(BOM) if raw.startswith(BOM) else 0
    try:
        return decode_utf8(raw[mark:], mark)
    except RowError as error:
        raise LoricaError(f"{path}: {error}.") from None


def _array_element(path: Path, line: int, value: Any, text: str, problem: RowError | None) -> Record | Rejected:
    raw = text.encode("utf-8")
    try:
        if problem:
            raise problem
        if len(raw) > MAX_LINE_BYTES:
            raise RowError("line too long", f"a row of {len(raw)} bytes, the limit is {MAX_LINE_BYTES}")
        return Record(str(path), line, _as_row(value), raw)
    except RowError as error:
        return Rejected.of(str(path), line, raw[:MAX_LINE_BYTES], error)


def _next_element(text: str, end: int) -> tuple[int, bool]:
    """Return where the next element starts, or the closing bracket stands, and whether there is one."""
    at = _skip_blank(text, end)
    if text[at : at + 1] == ",":
        return _skip_blank(text, at + 1), True
    if text[at : at + 1] == "]":
        return at, False
    raise RowError("malformed JSON", "expected ',' or ']' after the row")


def _skip_blank(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    return match.end() if match else at
