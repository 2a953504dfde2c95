"""What a stream needs to go on after a stop: the model, the method's memory and the scores so far, as one folder.

The folder of a stage is written aside, brought to the disk and renamed, and the one before it removed afterwards, so
that at every moment there is one that is whole.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorica import processes
from lorica.errors import LoricaError
from lorica.files import LEFTOVER, CannotWrite, free_bytes, make_folder, remove_folder, sync_folder, writing
from lorica.json_file import load_json
from lorica.memory import load_memory, save_memory, size_of
from lorica.record import write_json
from lorica.training.manifest import add_to_manifest, damage, listed_in, write_manifest
from lorica.training.output import stored_bytes, write_model
from lorica.training.sharded_state import whole_weights
from lorica.training.trust import distrusted
from lorica.units import size

IDENTITY = "cell.json"
MODEL, MEMORY, PROGRESS = "model", "memory.safetensors", "progress.json"

SCORED = "scored.json"
"""The progress once the stage is scored; a stage is written before, so that what was trained is safe.

It counts once the stage's manifest lists it.
"""


@dataclass(frozen=True)
class Stage:
    """A finished stage on disk.

    Attributes:
        number: how many tasks have been learned.
        folder: holds the model's folder, the method's memory and the progress.
    """

    number: int
    folder: Path

    @property
    def model(self) -> str | None:
        """The folder of the model as the stage left it; None where it is the one that came in."""
        return str(self.folder / MODEL) if (self.folder / MODEL).is_dir() else None

    def memory(self) -> dict[str, Tensor]:
        """Return the method's ``state_dict``."""
        return load_memory(self.folder / MEMORY)

    def progress(self) -> dict[str, Any]:
        """Return the scores and costs so far, those of this stage only if all of them were measured."""
        return _read(self.folder / (SCORED if SCORED in listed_in(self.folder) else PROGRESS))

    def drop_model(self) -> None:
        """Remove the model and the memory, once no later stage needs them."""
        if not any((self.folder / name).exists() for name in (MODEL, MEMORY)):
            return
        with contextlib.suppress(CannotWrite):  # all is measured and recorded; what stays is only in the way
            write_manifest(self.folder, without=(MODEL, MEMORY))
            shutil.rmtree(self.folder / MODEL, ignore_errors=True)
            (self.folder / MEMORY).unlink(missing_ok=True)


def stages_in(cell: Path) -> list[Path]:
    """Return the folders of a cell's stages, oldest first."""
    named = (path for path in cell.glob("stage-*") if re.fullmatch(r"stage-\d+", path.name))
    return sorted(named, key=_number)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("stage-"))


def last_stage(cell: Path) -> Stage | None:
    """Return the newest finished stage of a cell's folder, or None.

    Raises:
        LoricaError: something in it cannot be this run's own; see ``distrusted``.
    """
    found = stages_in(cell)
    if found and (wrong := distrusted(found[-1])):
        raise LoricaError(f"{cell}: {wrong}; remove {found[-1]} to begin that part anew")
    return Stage(_number(found[-1]), found[-1]) if found else None


def write_stage(cell: Path, number: int, model: Any, memory: Mapping[str, Tensor], progress: dict[str, Any]) -> None:
    """Write a stage, whole or not at all, then remove the one before it; of several processes the first does.

    Args:
        model: in parts or whole; None where the next task starts from the model that came in.

    Raises:
        CannotWrite: there is no room for it; the stage before is then still there.
    """
    weights = None if model is None else whole_weights(model)
    processes.by_first(lambda: _write_stage(cell, number, model, weights, memory, progress))


def _write_stage(
    cell: Path, number: int, model: Any, weights: Mapping[str, Tensor] | None, memory: Mapping[str, Tensor],
    progress: dict[str, Any],
) -> None:  # fmt: skip
    aside, place = cell / ".stage", cell / f"stage-{number}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with writing(
            place, f"cannot write {place}", lambda: size_of(memory) + (0 if model is None else stored_bytes(model))
        ):
            make_folder(aside)
            if model is not None:
                write_model(model, aside / MODEL, weights)
            save_memory(memory, aside / MEMORY)
            write_json(aside / PROGRESS, progress)
            write_manifest(aside)
            aside.rename(place)
            sync_folder(cell)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for path in stages_in(cell):
        if path != place:
            remove_folder(path)


def write_scores(cell: Path, number: int, progress: dict[str, Any]) -> None:
    """Add to a stage what was measured of it; of several processes the first does.

    Raises:
        CannotWrite: there is no room for it.
    """
    stage = cell / f"stage-{number}"

    def write() -> None:
        write_json(stage / SCORED, progress)
        add_to_manifest(stage, SCORED)

    processes.by_first(write)


def check_room(output_dir: Path, model: Path, kept: int) -> None:
    """Refuse a run that the disk has not the room for; what the output folder takes already counts as free.

    Args:
        output_dir: where two stages of one cell are at once.
        model: folder of the model that comes in; of a name on the hub nothing is known yet.
        kept: how many models are kept besides.

    Raises:
        LoricaError: with what is needed and what is free.
    """
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    taken = sum(file.stat().st_size for file in output_dir.rglob("*") if file.is_file())
    needed, free = (2 + kept) * weights, free_bytes(output_dir) + taken
    if needed > free:
        raise LoricaError(
            f"--output_dir {output_dir}: the run needs {size(needed)} of disk, {2 + kept} models at once, and "
            f"{size(free) if free else 'nothing'} is free there; make room, or name a folder on another disk"
        )


def claim(cell: Path, identity: Mapping[str, Any]) -> None:
    """Make a cell's folder, or make sure that it was made by the same run and that its last stage is whole.

    All that the folder was begun with must be the same. What a later version of Lorica writes down besides is not
    held against it. A folder in which nothing is finished belongs to whoever comes next.

    Raises:
        LoricaError: the folder belongs to another run; names the first setting that differs. Or its last stage is
            damaged.
    """
    now = json.loads(json.dumps(identity, default=str))
    file = cell / IDENTITY
    if not file.exists() and cell.is_dir() and any(not LEFTOVER.fullmatch(path.name) for path in cell.iterdir()):
        raise LoricaError(f"{cell} is not empty and not of lorica run; name another --output_dir")
    stage = last_stage(cell)
    if stage is None:
        make_folder(cell)
        write_json(file, now)
        return
    before = _read(file)
    for name in sorted(before):
        if before[name] != now.get(name):
            what, one, other = _difference(name, before[name], now.get(name))
            raise LoricaError(
                f"{cell} was begun with {what} {_short(one)}, and it is now {_short(other)}; "
                "give what it was begun with, or another --output_dir"
            )
    if wrong := damage(stage.folder):
        raise LoricaError(f"{stage.folder}: {wrong}; remove {stage.folder} to go on from what was before it")


def _difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """Return the first part in which two values differ, with its name."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in (*before, *now) if before.get(key) != now.get(key))
        return _difference(f"{name}.{key}", before.get(key), now.get(key))
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        place = next(place for place, value in enumerate(before) if value != now[place])
        return _difference(f"{name}.{place + 1}", before[place], now[place])
    return name, before, now


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _read(file: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = load_json(file, constants=True)
    except (OSError, ValueError) as error:
        raise LoricaError(f"{file}: cannot read it: {error}; remove {file.parent} to begin that part anew") from error
    return data
