"""What a stream needs to go on after a stop: the model, the method's memory and the scores so far, as one folder.

The folder of a stage is written aside and renamed, and the one before it removed afterwards, so that at every moment
there is one that is whole.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from lorica.errors import LoricaError
from lorica.memory import load_memory, save_memory
from lorica.record import write_json

IDENTITY = "cell.json"
MODEL, MEMORY, PROGRESS = "model", "memory.safetensors", "progress.json"


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
        """Return the scores and costs so far."""
        return _read(self.folder / PROGRESS)

    def drop_model(self) -> None:
        """Remove the model and the memory, once no later stage needs them."""
        shutil.rmtree(self.folder / MODEL, ignore_errors=True)
        (self.folder / MEMORY).unlink(missing_ok=True)


def last_stage(cell: Path) -> Stage | None:
    """Return the newest finished stage of a cell's folder, or None."""
    found = [(int(m[1]), path) for path in cell.glob("stage-*") if (m := re.fullmatch(r"stage-(\d+)", path.name))]
    return Stage(*max(found)) if found else None


def write_stage(cell: Path, number: int, model: Any, memory: Mapping[str, Tensor], progress: dict[str, Any]) -> None:
    """Write a stage, whole or not at all, then remove the one before it.

    Args:
        model: None where the next task starts from the model that came in.

    Raises:
        LoricaError: it cannot be written, such as for want of room; the stage before is then still there.
    """
    aside = cell / ".stage"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        if model is not None:
            model.save_pretrained(aside / MODEL)
        save_memory(memory, aside / MEMORY)
        write_json(aside / PROGRESS, progress)
        aside.rename(cell / f"stage-{number}")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise LoricaError(f"{cell}: cannot write what the run would go on from: {error}") from error
    for path in cell.glob("stage-*"):
        if path.name != f"stage-{number}":
            shutil.rmtree(path)


def claim(cell: Path, identity: Mapping[str, Any]) -> None:
    """Make a cell's folder, or make sure that it was made by the same run.

    All that the folder was begun with must be the same. What a later version of Lorica writes down besides is not
    held against it. A folder in which nothing is finished belongs to whoever comes next.

    Raises:
        LoricaError: the folder belongs to another run; names the first setting that differs.
    """
    now = json.loads(json.dumps(identity, default=str))
    file = cell / IDENTITY
    if not file.exists() and cell.is_dir() and any(cell.iterdir()):
        raise LoricaError(f"{cell} is not empty and not of lorica run; name another --output_dir")
    if last_stage(cell) is None:
        cell.mkdir(parents=True, exist_ok=True)
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
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoricaError(f"{file}: cannot read it: {error}; remove {file.parent} to begin that part anew") from error
    return data
