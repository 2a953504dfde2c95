"""``lorica verify``: whether what lies in a folder is as it was written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lorica.artefacts.file import HEADER, Update
from lorica.errors import LoricaError, one_line
from lorica.experiments.results import RUN
from lorica.experiments.stages import last_stage, stages_in
from lorica.files import difference, sha256
from lorica.json_file import SEAL, load_json, seal_broken
from lorica.judging import JUDGEMENTS
from lorica.judging import RECORD as JUDGEMENT
from lorica.lineage import RECORD, REJECTED, weights_sha256
from lorica.training.checkpoints import bases_lost, checkpoints_in
from lorica.training.identity import IDENTITY_FILE
from lorica.training.manifest import MANIFEST, damage


class Finding(NamedTuple):
    """What was found of one checkpoint, model or the like; ``problem`` None: it is as it was written.

    ``unproven`` names the record that tells so and carries no hash of itself; older ones do not.
    """

    what: str
    problem: str | None
    unproven: str | None = None

    def __str__(self) -> str:
        if self.problem is None and self.unproven is not None:
            return f"{self.what}: complete and unchanged, if {self.unproven} is, which carries no hash of itself"
        return f"{self.what}: {self.problem or 'complete and unchanged'}"


def verify(folder: str | Path) -> list[Finding]:
    """Compare everything in a folder, at any depth, with what was noted when it was written.

    Checkpoints and the last stage of each cell of a run are compared with their manifests, models with the files that
    ``lorica.json`` lists, what a finished cell left with ``run.json``, saved updates with their header; and these
    records, ``judge.json`` and ``inspect.json`` with the hash of themselves that they carry.

    Raises:
        LoricaError: there is no such folder, or nothing in it that could be verified.
    """
    path = Path(folder)
    if path.is_file():
        raise LoricaError(f"{folder} is a file; give the folder that it is part of: lorica verify {path.parent}")
    if not path.is_dir():
        raise LoricaError(f"{folder}: no such folder")
    found = [
        one._replace(what=_named(one.what, Path(place).relative_to(path), path))
        for place, _, _ in _walk(path)
        for one in _findings(Path(place))
    ]
    if not found:
        raise LoricaError(
            f"{folder}: holds no checkpoint and no lorica.json or other record; nothing here can be verified"
        )
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


def _findings(folder: Path) -> Iterator[Finding]:
    """Yield what one folder holds, without those below, and what is wrong with it; no name: the folder itself."""
    if _is_listed(folder):
        yield Finding("", damage(folder) or bases_lost(folder))
        return
    for name, (what, problem_of) in _RECORDS.items():
        if (folder / name).exists():
            yield _by_record(folder, name, what, problem_of)
    unended = (folder / IDENTITY_FILE).exists() and not (folder / RECORD).exists()
    if unended and any(folder.glob("model*.safetensors")):
        yield Finding("model", f"it is of an update that did not end: there is no {RECORD}, which is written last")


def _by_record(folder: Path, name: str, what: str, problem_of: Callable[[Path, dict[str, Any]], str | None]) -> Finding:
    """Return what a record tells of its folder, if it is itself as it was written."""
    try:
        record = dict(load_json(folder / name))
    except (OSError, ValueError, TypeError) as error:
        return Finding(what, f"{name} cannot be read: {one_line(error)}")
    if seal_broken(record):
        return Finding(what, f"{name} was changed: its {SEAL} is not that of its content")
    try:
        problem = problem_of(folder, record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{name}: field 'files' cannot be read: {one_line(error)}"
    return Finding(what, problem, None if SEAL in record else name)


def _is_listed(folder: Path) -> bool:
    """Tell whether a folder is one that a manifest makes complete; of a cell's stages only the last counts."""
    if folder in stages_in(folder.parent):
        last = last_stage(folder.parent)
        return last is not None and last.folder == folder
    return (folder / MANIFEST).exists() or folder in checkpoints_in(folder.parent)


def _update_problem(folder: Path, record: dict[str, Any]) -> str | None:
    try:
        Update.load(folder)
    except LoricaError as error:
        return str(error)
    return None


def _model_problem(folder: Path, record: dict[str, Any]) -> str | None:
    place = folder / REJECTED if record.get("rejected") else folder
    if "files" in record:
        return difference(place, record["files"] or {})
    noted, present = record.get("weights_sha256"), weights_sha256(place)
    if noted is None:
        return f"{RECORD} notes no digest of the weights"
    if present is None:
        return f"there are no weights in {place}"
    return None if present == noted else f"the weights are not those that {RECORD} was written for"


def _result_problem(folder: Path, record: dict[str, Any]) -> str | None:
    return difference(folder, record.get("files") or {})


def _judgement_problem(folder: Path, record: dict[str, Any]) -> str | None:
    noted = {Path(path).name: digest for path, digest in record["files"].items()}
    if not (folder / JUDGEMENTS).is_file():
        return f"{JUDGEMENTS} is missing"
    same = sha256(folder / JUDGEMENTS) == noted[JUDGEMENTS]
    return None if same else f"{JUDGEMENTS} was changed: its SHA-256 is not the one it was written with"


def _no_problem(folder: Path, record: dict[str, Any]) -> None:
    """Find nothing: all else in the folder is made of the record, by ``lorica report``."""


_RECORDS: dict[str, tuple[str, Callable[[Path, dict[str, Any]], str | None]]] = {
    HEADER: ("update", _update_problem),
    RECORD: ("model", _model_problem),
    RUN: ("result", _result_problem),
    JUDGEMENT: ("judgement", _judgement_problem),
    "inspect.json": ("inspection", _no_problem),
}
"""What the records are of, and how the rest of their folder is compared with them."""
