"""JSON of unknown origin: read within limits, and what is wrong with it told in one line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorica.errors import LoricaError, one_line

MAX_JSON_BYTES = 64 * 2**20
MAX_DEPTH = 64

SEAL = "record_sha256"
"""Field of a record that holds the SHA-256 of all its other fields."""

_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: str | Path, what: str, *, constants: bool = False) -> Any:
    """Return what a JSON file holds.

    Args:
        path: the file.
        what: it is to be, for messages.
        constants: see ``parse_json``.

    Raises:
        LoricaError: it cannot be read, is over 64 MiB, or is not what ``parse_json`` takes.
    """
    try:
        return load_json(Path(path), constants=constants)
    except OSError as error:
        raise LoricaError(f"{path}: cannot read the {what}: {error.strerror}") from error
    except ValueError as error:
        raise LoricaError(f"{path}: not a {what}: {one_line(error)}") from None


def load_json(path: Path, *, constants: bool = False) -> Any:
    """Return what a JSON file holds, for those who have words of their own for what is wrong with it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is over 64 MiB, or not what ``parse_json`` takes.
    """
    with path.open("rb") as file:
        raw = file.read(MAX_JSON_BYTES + 1)  # a device has no size that could be asked for
    if len(raw) > MAX_JSON_BYTES:
        raise ValueError(f"over {MAX_JSON_BYTES:,} bytes")
    return parse_json(raw, constants=constants)


def load_record(path: Path) -> Any:
    """Return what a file holds that was written with a hash of itself, without the hash; see ``sealed``.

    A record of before there was one is taken as it is.

    Raises:
        OSError, ValueError: see ``load_json``; or it was changed.
    """
    record = load_json(path, constants=True)
    if not isinstance(record, dict):
        return record
    if seal_broken(record):
        raise ValueError(f"it was changed since it was written: its {SEAL} is that of other content")
    return {name: value for name, value in record.items() if name != SEAL}


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record that carries a hash of itself: a change of any value shows, another layout is none."""
    bare = {name: value for name, value in record.items() if name != SEAL}
    as_read = json.loads(json.dumps(bare))  # a file's keys are strings, and its sequences lists
    canonical = json.dumps(as_read, sort_keys=True, separators=(",", ":"))
    return bare | {SEAL: hashlib.sha256(canonical.encode()).hexdigest()}


def seal_broken(record: Mapping[str, Any]) -> bool:
    """Tell whether a record carries a hash that is not its own."""
    return SEAL in record and record[SEAL] != sealed(record)[SEAL]


def parse_json(raw: bytes | str, *, constants: bool = False) -> Any:
    """Return the value that a JSON text stands for.

    Args:
        raw: the text, or its UTF-8 bytes; a byte order mark is taken off.
        constants: allow ``NaN``, ``Infinity`` and ``-Infinity``.

    Raises:
        ValueError: not JSON, not UTF-8, nested deeper than 64 levels, or with half a surrogate pair in a string.
    """
    text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw
    try:
        value = json.loads(text, parse_constant=None if constants else _refuse)
    except RecursionError:
        raise too_deep() from None
    if depth(value) > MAX_DEPTH:
        raise too_deep()
    if _HALF_A_PAIR.search(text) and (half := half_pair(value)):
        raise ValueError(f"lone surrogate {half} in a string")
    return value


def too_deep() -> ValueError:
    return ValueError(f"nested too deeply, the limit is {MAX_DEPTH} levels")


def depth(value: Any) -> int:
    """Return how deep a JSON value is nested; beyond ``MAX_DEPTH`` it is not followed further."""
    levels, level = 0, [value]
    while level := [child for parent in level for child in _children(parent)]:
        levels += 1
        if levels > MAX_DEPTH:
            break
    return levels


def half_pair(value: Any) -> str | None:
    """Return the escape of a surrogate that stands alone in one of the strings of a value, if there is one."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):04x}"
    return None


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _refuse(literal: str) -> None:
    raise ValueError(f"{literal} is no JSON number")
