"""The folder of one saved update: ``lorica-update.json`` says what it is, the files beside it hold the changes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from safetensors.torch import save_file
from torch import Tensor

from lorica.artefacts.bits import fingerprint
from lorica.artefacts.change import Change
from lorica.constrain.checkpoint import FolderWeights, Weights
from lorica.errors import LoricaError
from lorica.files import sha256
from lorica.json_file import load_record
from lorica.record import write_record

HEADER = "lorica-update.json"

Prints = dict[str, str]
"""The fingerprint of each tensor of a model, by key."""

Progress = Callable[[str, int, int], None]

_FULL = 2**30
"""Bytes of packed changes that are held in memory before they are written to a file."""


class TensorState(BaseModel):
    """One tensor of the model: what it is, and its fingerprints before and after the update."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str
    shape: list[int]
    before: str
    after: str

    @property
    def changed(self) -> bool:
        return self.before != self.after


class Header(BaseModel):
    """What a saved update says about itself.

    Attributes:
        family: the model's architecture.
        tensors: every tensor of the model, also those that did not change.
        files: SHA-256 of each file of changes, by name.
        plan: the entries of the plan that the update was made by, as recorded; None where none is.
        made: method, data and versions of the run that made the update, and of the export, for the reader.
    """

    model_config = ConfigDict(extra="forbid")

    kind: Literal["lorica update"] = "lorica update"
    schema_version: Literal[1] = 1
    family: str
    tensors: dict[str, TensorState]
    files: dict[str, str]
    plan: list[dict[str, Any]] | None
    made: dict[str, Any]

    @field_validator("files")
    @classmethod
    def _beside_the_header(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            if re.fullmatch(r"update-\d{5}\.safetensors", name) is None:
                raise ValueError(f"{name!r} is no file of an update")
        return files

    def prints(self, side: Literal["before", "after"]) -> Prints:
        """Return the fingerprints of the model before or after the update."""
        return {key: getattr(state, side) for key, state in self.tensors.items()}

    def changed(self) -> list[str]:
        """Return the keys of the tensors that the update changes."""
        return [key for key, state in self.tensors.items() if state.changed]


class Update:
    """A saved update, opened for reading; the change of a tensor is read when it is asked for."""

    def __init__(self, path: Path, header: Header, weights: FolderWeights) -> None:
        self.path, self.header, self._weights = path, header, weights
        self._parts: dict[str, list[str]] = {}
        for name in weights.keys():
            key, _, part = name.rpartition("/")
            self._parts.setdefault(key, []).append(part)
        missing = sorted(set(header.changed()) ^ self._parts.keys())
        if missing:
            raise LoricaError(f"{path}: damaged: {HEADER} and the files beside it disagree about {missing[0]}")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open a saved update.

        Raises:
            LoricaError: no update, or one whose files are not those that were written.
        """
        folder = Path(path)
        header = _header(folder)
        for name, digest in header.files.items():
            try:
                found = sha256(folder / name)
            except OSError as error:
                raise LoricaError(f"{folder / name}: cannot read it: {error.strerror}") from error
            if found != digest:
                raise LoricaError(
                    f"{folder / name}: damaged: its SHA-256 begins {found[:12]}, the one that was written "
                    f"{digest[:12]}; copy or export the update anew"
                )
        beside = sorted({file.name for file in folder.glob("*.safetensors")} - header.files.keys())
        if beside:
            raise LoricaError(f"{folder / beside[0]}: not part of the update in this folder")
        return cls(folder, header, FolderWeights(folder))

    def apply(self, key: str, before: Tensor) -> Tensor:
        """Return a tensor after the update, from what it was before.

        Raises:
            LoricaError: it does not come out bit for bit as it was.
        """
        return self._exact(key, before, "after")

    def remove(self, key: str, after: Tensor) -> Tensor:
        """Return a tensor before the update, from what it was after; errors as in ``apply``."""
        return self._exact(key, after, "before")

    def _exact(self, key: str, tensor: Tensor, goal: Literal["before", "after"]) -> Tensor:
        state = self.header.tensors[key]
        if not state.changed:
            return tensor
        try:
            parts = {part: self._weights.tensor(f"{key}/{part}") for part in self._parts[key]}
            change = Change.from_tensors(parts, tensor)
        except (LoricaError, KeyError, ValueError) as error:
            raise LoricaError(f"{self.path}: {key}: {error}") from error
        result = change.after(tensor) if goal == "after" else change.before(tensor)
        if fingerprint(result) != getattr(state, goal):
            raise LoricaError(f"{self.path}: damaged: {key} does not come out as it was when the update was exported")
        return result

    def __str__(self) -> str:
        return str(self.path)


def _header(folder: Path) -> Header:
    path = folder / HEADER
    if not path.is_file():
        made_by_train = (folder / "lorica.json").exists() or (folder / "config.json").exists()
        hint = "; it is a model: make an update of it with lorica export-update" if made_by_train else ""
        raise LoricaError(f"{folder}: no saved update (it has no {HEADER}){hint}")
    try:
        return Header.model_validate(load_record(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise LoricaError(f"{path}: damaged: {where}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise LoricaError(f"{path}: damaged: {error}") from error


def write_changes(folder: Path, changes: Iterable[tuple[str, Change]]) -> dict[str, str]:
    """Write changes into files of about 1 GiB and return the SHA-256 of each, by name."""
    files: dict[str, str] = {}
    for number, tensors in enumerate(_batches(changes), start=1):
        path = folder / f"update-{number:05}.safetensors"
        save_file(tensors, path)
        files[path.name] = sha256(path)
    return files


def _batches(changes: Iterable[tuple[str, Change]]) -> Iterator[dict[str, Tensor]]:
    held: dict[str, Tensor] = {}
    for key, change in changes:
        held |= {f"{key}/{part}": tensor for part, tensor in change.to_tensors().items()}
        if sum(tensor.nbytes for tensor in held.values()) >= _FULL:
            yield held
            held = {}
    if held:
        yield held


def write_header(folder: Path, header: Header) -> None:
    """Write what the update says about itself."""
    write_record(folder / HEADER, header.model_dump(mode="json"))


def fingerprints(weights: Weights, progress: Progress | None = None) -> Prints:
    """Return the fingerprint of each tensor, read one at a time."""
    keys = list(weights.keys())
    found = {}
    for done, key in enumerate(keys, start=1):
        found[key] = fingerprint(weights.tensor(key))
        if progress:
            progress(key, done, len(keys))
    return found


def digest(prints: Mapping[str, str]) -> str:
    """Return one SHA-256 for a whole model: of all keys and fingerprints, however its files are cut."""
    lines = "".join(f"{key} {prints[key]}\n" for key in sorted(prints))
    return hashlib.sha256(lines.encode()).hexdigest()
