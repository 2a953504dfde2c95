"""A stream of tasks as data: what comes when, from which files, and how each method is set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from lorica.errors import LoricaError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Task(_Strict):
    """One task of a stream."""

    name: str
    """Short name, as it heads a column of the score matrix."""

    train_file: str
    """Rows to learn; a path beside the stream's file."""

    test_file: str
    """Rows to score; never trained on."""

    description: str = ""
    """What an engineer would say of it."""


class Ability(_Strict):
    """Something the model can do before the stream begins. It is scored after every task and never trained."""

    name: str
    """Short name."""

    test_file: str
    """Rows to score; a path beside the stream's file."""

    description: str = ""
    """What it is."""


class MethodSettings(_Strict):
    """How one method runs on the stream."""

    method: str
    """A name of ``lorica list``."""

    label: str
    """How tables and pictures call it."""

    learning_rate: float = Field(gt=0)
    """Chosen by a sweep."""

    protection: dict[str, Any] = {}
    """Arguments of ``lorica.plan``."""


class TaskStream(_Strict):
    """A sequence of tasks with everything that a run needs to be repeated."""

    name: str
    """Name of the stream."""

    version: int
    """Raised with every change of rows, prompts or settings."""

    description: str
    """What it shows."""

    tasks: list[Task] = Field(min_length=1)
    """In the order they come."""

    held_out: list[Ability] = []
    """What must not be forgotten."""

    training: dict[str, Any] = {}
    """Fields of TrainingArguments, the same for every method and task."""

    methods: dict[str, MethodSettings] = {}
    """Settings by the name of the output folder."""

    _folder: Path = PrivateAttr(default=Path())

    def path(self, file: str) -> str:
        """Return the path of a file that the stream names."""
        return str(self._folder / file)


def read_stream(path: str | Path) -> TaskStream:
    """Return the stream that a YAML file defines.

    Raises:
        LoricaError: not readable, not YAML, or a field is missing, unknown or of the wrong type.
    """
    file = Path(path)
    try:
        stream = TaskStream.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise LoricaError(f"{path}: cannot read the stream: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise LoricaError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise LoricaError(f"{path}: field {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    stream._folder = file.parent
    return stream
