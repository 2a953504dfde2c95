"""Records read back from files and folders, and validated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorica.errors import LoricaError, did_you_mean, one_line
from lorica.json_file import read_json
from lorica.report.inspection_record import InspectionRecord
from lorica.report.records import SCHEMA, JudgeRecord, RunRecord, TrainRecord

FILE_NAMES = ("run.json", "lorica.json", "judge.json", "inspect.json")
SWEEP = "sweep"
"""The folder of the runs that a learning rate was chosen on; they are no results."""

Record = RunRecord | TrainRecord | JudgeRecord | InspectionRecord
Item = Record | Mapping[str, Any] | Path
_KINDS: dict[str, type[Record]] = {
    "run": RunRecord,
    "train": TrainRecord,
    "judge": JudgeRecord,
    "inspect": InspectionRecord,
}


def read_record(source: Mapping[str, Any] | Path | str) -> Record:
    """Return one validated record.

    Args:
        source: a record, or the path of a JSON file that holds one.

    Raises:
        LoricaError: not readable, not JSON, an unknown schema or kind, or a missing or wrong field; names
            the file and the field.
    """
    if isinstance(source, Mapping):
        return _validated(_finite(source), "run record")
    return _validated(read_json(source, "run record"), str(source))


def read_records(sources: Iterable[Mapping[str, Any] | Path | str]) -> list[Record]:
    """Return the records of several sources, each file once.

    A folder stands for the records anywhere in it, but for those below a folder ``sweep``; a file may also hold a
    list of records.
    """
    items = _once(item for source in sources for item in _expand(source))
    records = [item if isinstance(item, Record) else read_record(item) for item in items]
    if not records:
        raise LoricaError("nothing to report: give at least one run record or output folder")
    return records


def _once(items: Iterable[Item]) -> Iterator[Item]:
    seen: set[Path] = set()
    for item in items:
        if isinstance(item, Path):
            if item.resolve() in seen:
                continue
            seen.add(item.resolve())
        yield item


def _expand(source: Mapping[str, Any] | Path | str) -> Sequence[Item]:
    if isinstance(source, Mapping):
        return [source]
    path = Path(source)
    if not path.is_dir():
        data = read_json(path, "run record")
        if data == []:
            raise LoricaError(f"{path}: an empty list; there is no run record in it")
        return [_item(one, path, number) for number, one in enumerate(data)] if isinstance(data, list) else [path]
    below = (file for name in FILE_NAMES for file in path.rglob(name))
    files = sorted(file for file in below if file.is_file() and SWEEP not in file.relative_to(path).parts)
    if not files:
        raise LoricaError(f"{path}: no {', '.join(FILE_NAMES[:-1])} or {FILE_NAMES[-1]} in this folder or below it")
    return files


def _item(data: Any, path: Path, number: int) -> Record:
    if not isinstance(data, dict):
        raise LoricaError(f"{path}: a run record is a JSON object, this list holds a {type(data).__name__}")
    return _validated(data, f"{path}[{number}]")


def _validated(data: Any, where: str) -> Record:
    if not isinstance(data, dict):
        raise LoricaError(f"{where}: a run record is a JSON object, this is a {type(data).__name__}")
    schema, kind = data.get("schema"), data.get("kind")
    if schema != SCHEMA:
        told = one_line(repr(schema), 60)
        raise LoricaError(f"{where}: field 'schema' is {told}; this version reads {SCHEMA}")
    if not isinstance(kind, str) or kind not in _KINDS:
        hint, told = did_you_mean(str(kind), _KINDS), one_line(repr(kind), 60)
        raise LoricaError(f"{where}: field 'kind' is {told}, not one of {', '.join(_KINDS)}.{hint}")
    try:
        return _KINDS[kind].model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = one_line(".".join(str(part) for part in first["loc"]) or "scores")
        raise LoricaError(f"{where}: field {field!r}: {one_line(first['msg'])}") from None


def _finite(value: Any) -> Any:
    """Return a record from memory as it would be read back: what is no number is null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
