"""Where rows come from: files, folders and Hub datasets, as one stream of records with line numbers."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lorica.data.csv_rows import csv_records
from lorica.data.jsonl import json_records
from lorica.data.record import Record, Rejected, row_json, table_row
from lorica.errors import LoricaError, one_line
from lorica.files import sha256
from lorica.hub import commit_of

Records = Iterator[Record | Rejected]

ROWS_AT_A_TIME = 64
"""Rows of a parquet file that are in memory together: few, for each of them may be of any size."""


def parquet_records(path: Path) -> Records:
    """Yield the rows of a parquet file; their line is the row's number from 1."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_A_TIME):
                for value in batch.to_pylist():
                    number += 1
                    yield table_row(str(path), number, value)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise LoricaError(f"{path}: not a readable parquet file ({one_line(error)}); write it again.") from None


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
            yield table_row(self.name, number, value)

    def sha256(self) -> str:
        """Return the SHA-256 of the rows as JSON lines."""
        digest = hashlib.sha256()
        for value in self.dataset:
            digest.update(row_json(value) + b"\n")
        return digest.hexdigest()


def open_source(path: str | Path, split: str = "train", config_name: str | None = None) -> Source:
    """Find what ``path`` names: a file, a folder of files, or else a dataset on the Hub.

    Args:
        path: a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, a folder with such files (not its
            subfolders), or a Hub name such as ``owner/name``; ``owner/name@revision`` for a branch, tag or commit.
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
    if local.suffix.lower() in READERS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", str(path)):
        raise LoricaError(f"{path}: no such file or folder.{_neighbour(local)}")
    name, _, revision = str(path).partition("@")
    commit = commit_of(name, revision or None, "dataset") or revision or None
    return HubSource(f"{name}@{commit}" if commit else name, _from_hub(name, split, config_name, commit))


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


def _from_hub(name: str, split: str, config_name: str | None, revision: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config_name, split=split, revision=revision)
    except Exception as error:  # the Hub client raises many kinds; all mean that there is no data
        reason = one_line(str(error).strip().split("\n")[0])
        raise LoricaError(
            f"{name}: no such file or folder, and split {split!r} of a Hub dataset of that name "
            f"could not be loaded: {reason} ({type(error).__name__})."
        ) from error


def _file_digest(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise LoricaError(f"{path}: cannot read it: {error.strerror}.") from error
