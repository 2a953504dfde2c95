"""``lorica verify``: whether what lies in a folder is as it was written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lorica.artefacts.file import HEADER, Update
from lorica.errors import LoricaError
from lorica.experiments.results import RUN
from lorica.experiments.stages import last_stage, stages_in
from lorica.files import difference
from lorica.json_file import load_json
from lorica.lineage import RECORD, REJECTED, weights_sha256
from lorica.training.checkpoints import bases_lost, checkpoints_in
from lorica.training.identity import IDENTITY_FILE
from lorica.training.manifest import MANIFEST, damage


class Finding(NamedTuple):
    """What was found of one checkpoint, model or the like; ``problem`` None: it is as it was written."""

    what: str
    problem: str | None

    def __str__(self) -> str:
        return f"{self.what}: {self.problem or 'complete and unchanged'}"


def verify(folder: str | Path) -> list[Finding]:
    """Compare everything in a folder, at any depth, with what was noted when it was written.

    Checkpoints and the last stage of each cell of a run are compared with their manifests, models with the files that
    ``lorica.json`` lists, what a finished cell left with ``run.json``, saved updates with their header.

    Raises:
        LoricaError: there is no such folder, or nothing in it that could be verified.
    """
    path = Path(folder)
    if not path.is_dir():
        raise LoricaError(f"{folder}: no such folder")
    found = [
        Finding(_named(what, Path(place).relative_to(path), path), problem)
        for place, _, _ in _walk(path)
        for what, problem in _findings(Path(place))
    ]
    if not found:
        raise LoricaError(f"{folder}: holds no checkpoint and no lorica.json; nothing here can be verified")
    return found


def _walk(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Go through a folder and those below, in order of their names; not into what has a manifest of its own."""
    for place, folders, files in os.walk(path):
        folders[:] = [] if MANIFEST in files else sorted(name for name in folders if not name.startswith("."))
        yield place, folders, files


def _named(what: str, place: Path, top: Path) -> str:
    if what:
        return what if place == Path() else f"{place.as_posix()}: {what}"
    return place.as_posix() if place != Path() else top.resolve().name


def _findings(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Yield what one folder holds, without those below, and what is wrong with it; no name: the folder itself."""
    if _is_listed(folder):
        yield "", damage(folder) or bases_lost(folder)
        return
    if (folder / HEADER).exists():
        yield "update", _update_problem(folder)
    if (folder / RECORD).exists():
        yield "model", _model_problem(folder)
    elif (folder / IDENTITY_FILE).exists() and any(folder.glob("model*.safetensors")):
        yield "model", f"it is of an update that did not end: there is no {RECORD}, which is written last"
    if (folder / RUN).exists():
        yield "result", _record_problem(folder, RUN)


def _is_listed(folder: Path) -> bool:
    """Tell whether a folder is one that a manifest makes complete; of a cell's stages only the last counts."""
    if folder in stages_in(folder.parent):
        last = last_stage(folder.parent)
        return last is not None and last.folder == folder
    return (folder / MANIFEST).exists() or folder in checkpoints_in(folder.parent)


def _update_problem(folder: Path) -> str | None:
    try:
        Update.load(folder)
    except LoricaError as error:
        return str(error)
    return None


def _model_problem(folder: Path) -> str | None:
    record = _record(folder / RECORD)
    if isinstance(record, str):
        return record
    place = folder / REJECTED if record.get("rejected") else folder
    if "files" in record:
        return _record_problem(folder, RECORD, place)
    noted, present = record.get("weights_sha256"), weights_sha256(place)
    if noted is None:
        return f"{RECORD} notes no digest of the weights"
    if present is None:
        return f"there are no weights in {place}"
    return None if present == noted else f"the weights are not those that {RECORD} was written for"


def _record_problem(folder: Path, name: str, place: Path | None = None) -> str | None:
    """Return how files differ from those that a record lists."""
    record = _record(folder / name)
    if isinstance(record, str):
        return record
    try:
        return difference(place or folder, record.get("files") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{name}: field 'files' cannot be read: {error}"


def _record(file: Path) -> dict[str, Any] | str:
    """Return a record, or why there is none."""
    try:
        return dict(load_json(file))
    except (OSError, ValueError, TypeError) as error:
        return f"{file.name} cannot be read: {error}"
