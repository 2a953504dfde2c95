"""Where rows come from: files, folders and Hub datasets, as one stream of records with line numbers."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lorica.data.jsonl import MAX_LINE_BYTES, Line, json_records, read_lines
from lorica.data.record import Record, Rejected, RowError
from lorica.errors import LoricaError

Records = Iterator[Record | Rejected]


def csv_records(path: Path) -> Records:
    """Yield the rows of a comma-separated file with a header line; every value is a string.

    Raises:
        LoricaError: no header, or a column named twice.
    """
    pending: list[Line] = []
    # The limit belongs to the whole process: it is put back.
    old_limit = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        reader = csv.reader(_csv_text(path, pending), strict=True)
        header = _csv_header(path, reader, pending)
        while True:
            pending.clear()
            try:
                cells = next(reader, None)
                problem = None
            except csv.Error as error:
                cells, problem = [], RowError("malformed CSV", str(error))
            if cells is None:
                return
            if cells or problem:
                yield _csv_row(path, header, cells, list(pending), problem)
    finally:
        csv.field_size_limit(old_limit)


def _csv_text(path: Path, pending: list[Line]) -> Iterator[str]:
    """Feed the parser and note which lines it took, as one row may span several."""
    for line in read_lines(path):
        pending.append(line)
        yield line.raw.decode("utf-8", errors="replace") + "\n"


def _csv_header(path: Path, reader: Iterator[list[str]], pending: list[Line]) -> list[str]:
    try:
        header = next((cells for cells in reader if cells), [])
        for line in pending:
            line.text()
    except (csv.Error, RowError) as error:
        raise LoricaError(f"{path}:1: the header line cannot be read: {error}.") from None
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise LoricaError(f"{path}:1: the header names column {twice[0]!r} more than once; rename one of them.")
    return header


def _csv_row(
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
        return Rejected.of(str(path), number, raw[:MAX_LINE_BYTES], error)


def parquet_records(path: Path) -> Records:
    """Yield the rows of a parquet file; their line is the row's number from 1."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Record(str(path), number, value)
    except (pyarrow.ArrowException, OSError) as error:
        raise LoricaError(f"{path}: not a readable parquet file ({error}); write it again.") from None


def _row_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", errors="backslashreplace")


READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": json_records,
    ".json": json_records,
    ".csv": csv_records,
    ".parquet": parquet_records,
}


class Source(Protocol):
    """Where rows come from; can be read again and again."""

    @property
    def name(self) -> str:
        """What messages and records call it."""

    def records(self) -> Records:
        """Yield the rows."""

    def sha256(self) -> str:
        """Return a digest of all that is read."""


@dataclass(frozen=True)
class FileSource:
    """One or more local files, read in the order of their names."""

    name: str
    files: tuple[Path, ...]

    def records(self) -> Records:
        for path in self.files:
            yield from READERS[path.suffix.lower()](path)

    def sha256(self) -> str:
        """Return the SHA-256 of the file's bytes; of several files, that of their names and digests."""
        if len(self.files) == 1:
            return _file_digest(self.files[0])
        listing = "".join(f"{_file_digest(path)}  {path.name}\n" for path in self.files)
        return hashlib.sha256(listing.encode()).hexdigest()


@dataclass(frozen=True)
class HubSource:
    """Rows of a dataset from the Hugging Face Hub: anything that yields them as dictionaries."""

    name: str
    dataset: Iterable[dict[str, Any]]

    def records(self) -> Records:
        for number, value in enumerate(self.dataset, 1):
            yield Record(self.name, number, value)

    def sha256(self) -> str:
        """Return the SHA-256 of the rows as JSON lines."""
        digest = hashlib.sha256()
        for value in self.dataset:
            digest.update(_row_json(value) + b"\n")
        return digest.hexdigest()


def open_source(path: str | Path, split: str = "train", config_name: str | None = None) -> Source:
    """Find what ``path`` names: a file, a folder of files, or else a dataset on the Hub.

    Args:
        path: a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, a folder with such files (not its
            subfolders), or a Hub name such as ``owner/name``.
        split: the split of a Hub dataset.
        config_name: the configuration of a Hub dataset that has several.

    Raises:
        LoricaError: nothing is there, the file type is unknown, or the folder holds no data.
    """
    local = Path(path)
    if local.is_dir():
        return FileSource(str(path), _folder_files(local))
    if local.is_file():
        if local.suffix.lower() not in READERS:
            found = f"file type {local.suffix!r} is not known" if local.suffix else "the file has no type"
            raise LoricaError(f"{path}: {found}; use one of {', '.join(READERS)}.")
        return FileSource(str(path), (local,))
    if local.suffix.lower() in READERS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)):
        raise LoricaError(f"{path}: no such file or folder.{_neighbour(local)}")
    return HubSource(str(path), _from_hub(str(path), split, config_name))


def _folder_files(folder: Path) -> tuple[Path, ...]:
    found = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    files = tuple(path for path in found if path.suffix.lower() in READERS)
    if not files:
        names = ", ".join(path.name for path in found[:5]) or "no files"
        raise LoricaError(f"{folder}: the folder holds no {', '.join(READERS)} file; found: {names}.")
    return files


def _neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {str(path.parent)!r} does not exist either."
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {str(path.parent / near[0])!r}?" if near else ""


def _from_hub(name: str, split: str, config_name: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config_name, split=split)
    except Exception as error:  # the Hub client raises many kinds; all mean that there is no data
        reason = str(error).strip().split("\n")[0]
        raise LoricaError(
            f"{name}: no such file or folder, and split {split!r} of a Hub dataset of that name "
            f"could not be loaded: {reason} ({type(error).__name__})."
        ) from error


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
