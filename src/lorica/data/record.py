"""One row on its way from a file into training: read, refused, or not yet judged."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

from lorica.errors import one_line

MAX_ROW_BYTES = 8 * 2**20
"""A longer row is refused, whatever the file; so much of it is kept for ``rejected.jsonl``."""


class RowError(Exception):
    """Why one row cannot be used. ``kind`` is what is counted, ``detail`` what is particular to the row, in a line."""

    def __init__(self, kind: str, detail: str) -> None:
        self.kind = kind
        self.detail = one_line(detail)
        super().__init__(f"{kind}: {self.detail}")


@dataclass(frozen=True)
class Record:
    """A row that parsed: its columns and where it stands.

    ``line`` counts from 1 as an editor does; in a parquet file or a Hub dataset it is the row's number.
    ``raw`` holds the bytes of the file, kept for ``rejected.jsonl``; None where a row has none of its own.
    """

    path: str
    line: int
    value: dict[str, Any]
    raw: bytes | None = None

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"

    def rejected(self, error: RowError) -> Rejected:
        """Return the row as one that is not used; its original is the file's bytes, or else its JSON."""
        raw = row_json(self.value)[:MAX_ROW_BYTES] if self.raw is None else self.raw
        return Rejected.of(self.path, self.line, raw, error)


def table_row(path: str, number: int, value: dict[str, Any]) -> Record | Rejected:
    """Return a row that has no bytes of its own; refused where its JSON is longer than a line of a file may be."""
    record, size = Record(path, number, value), len(row_json(value))
    if size <= MAX_ROW_BYTES:
        return record
    return record.rejected(RowError("row too long", f"{size} bytes as JSON, the limit is {MAX_ROW_BYTES}"))


def row_json(value: Any) -> bytes:
    """Return a row as JSON, whatever types its values have."""
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", errors="backslashreplace")


@dataclass(frozen=True)
class Rejected:
    """A row that is not used, with the reason. ``str()`` is the line shown to the user."""

    path: str
    line: int
    kind: str
    detail: str
    raw: bytes

    @classmethod
    def of(cls, path: str, line: int, raw: bytes, error: RowError) -> Rejected:
        return cls(path, line, error.kind, error.detail, raw)

    @property
    def reason(self) -> str:
        return f"{self.kind}: {self.detail}"

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"

    def as_json(self) -> dict[str, Any]:
        """Return the entry of ``rejected.jsonl``; bytes that are not UTF-8 go in as ``original_base64``."""
        entry: dict[str, Any] = {"file": self.path, "line": self.line, "reason": self.reason}
        try:
            entry["original"] = self.raw.decode("utf-8")
        except UnicodeDecodeError:
            entry["original_base64"] = base64.b64encode(self.raw).decode("ascii")
        return entry
