"""JSON values as rows: what ``json`` lets through is named, in bounded time and memory.

``json.loads`` takes duplicate keys, ``NaN`` and lone surrogates in silence, and ``datasets`` reports none of them by
line, so rows are read here.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from lorica.data.record import RowError
from lorica.json_file import MAX_DEPTH, depth, half_pair

BOM = b"\xef\xbb\xbf"


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
        self._problem: RowError | None = None  # the first one: a row may hold a million
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def decode(self, text: str, start: int = 0, line: int = 1, column: int = 1) -> tuple[Any, int, RowError | None]:
        """Return the value at ``start``, the position after it, and its problem, if any.

        Args:
            line, column: where ``text`` starts in what messages count in.

        Raises:
            RowError: no JSON value can be read there.
        """
        self._problem = None
        try:
            value, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            place = _place(error, line, column)
            raise RowError("malformed JSON", f"{error.msg} at {place}") from None
        except RecursionError:
            raise _too_deep() from None
        except ValueError as error:
            raise RowError("malformed JSON", str(error)) from None
        if self._problem is None and depth(value) > MAX_DEPTH:
            self._problem = _too_deep()
        if self._problem is None and "\\u" in text[start:end] and (half := half_pair(value)):
            self._problem = RowError("malformed JSON", f"lone surrogate {half} in a string")
        return value, end, self._problem

    def _note(self, kind: str, detail: str) -> None:
        self._problem = self._problem or RowError(kind, detail)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs) and self._problem is None:
            counts = Counter(key for key, _ in pairs)
            self._note("duplicate key", repr(next(key for key, count in counts.items() if count > 1)))
        return value

    def _constant(self, literal: str) -> float:
        self._note("number not allowed", f"{literal} is no JSON number")
        return math.nan

    def _float(self, literal: str) -> float:
        value = float(literal)
        if math.isinf(value):
            self._note("number not allowed", f"{literal[:30]} is too large")
        return value


def _place(error: json.JSONDecodeError, line: int, column: int) -> str:
    at_line = line + error.lineno - 1
    at_column = error.colno + (column - 1 if error.lineno == 1 else 0)
    return f"line {at_line}, column {at_column}" if at_line > 1 else f"column {at_column}"


def _too_deep() -> RowError:
    return RowError("nested too deeply", f"the limit is {MAX_DEPTH} levels")


def as_row(value: Any) -> dict[str, Any]:
    """Return a JSON value that is an object.

    Raises:
        RowError: it is something else.
    """
    if not isinstance(value, dict):
        raise RowError("wrong type", f"a row is a JSON object, got {type_name(value)}")
    return value


def type_name(value: Any) -> str:
    """Return what JSON calls the type of a value, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
