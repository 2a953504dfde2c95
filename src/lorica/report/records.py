"""Run records: what one run wrote about itself, read back and validated. The report needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lorica.errors import LoricaError, did_you_mean
from lorica.scores import ScoreMatrix

SCHEMA = 1
FILE_NAMES = ("run.json", "lorica.json")

Values = dict[str, float | None]


class _Part(BaseModel):
    """Unknown fields are left alone: a record holds more than the report shows."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class Cost(_Part):
    """What a run took; every figure is optional."""

    seconds: float | None = None
    seconds_per_step: float | None = None
    peak_rss_bytes: int | None = None
    trainable_parameters: int | None = None
    trained_bytes: int | None = None


class PlanEntry(_Part):
    """How much of one weight is protected: ``k`` directions, a share of min(M, N); ``free`` coordinates train."""

    name: str
    shape: list[int]
    k: int
    free: int
    share: float = Field(ge=0, le=1)
    source: str
    constraint: str


class Leak(_Part):
    """Share of one weight's change in its protected directions, beside that of an unconstrained change.

    ``u`` is the output side, ``v`` the input side. A side that protects nothing is null or 0.
    """

    name: str
    leak_u: float | None = Field(default=None, ge=0)
    leak_v: float | None = Field(default=None, ge=0)
    unconstrained_u: float | None = Field(default=None, ge=0)
    unconstrained_v: float | None = Field(default=None, ge=0)
    relative_change: float | None = None


class LossPoint(_Part):
    """Training loss at one optimizer step; null where it was no number."""

    step: int
    loss: float | None = None
    learning_rate: float | None = None


class Measured(_Part):
    """One evaluation: figures by name, or by set and then name."""

    eval: Values = {}
    retention: dict[str, float | Values | None] = {}


class BeforeAfter(_Part):
    """The same evaluation of the model that came in and of the one that went out."""

    before: Measured = Measured()
    after: Measured = Measured()


class Data(_Part):
    """Counts, hashes and notices of each file, by field; the report shows what it finds."""

    train: dict[str, Any] = {}
    eval: dict[str, Any] | None = None
    retention: dict[str, dict[str, Any]] = {}


class _Record(_Part):
    method: str
    label: str = ""
    seed: int | None = None
    model: str | None = None
    model_parameters: int | None = None
    learning_rate: float | None = None
    cost: Cost = Cost()
    plan: list[PlanEntry] = []
    leakage: list[Leak] = []
    versions: dict[str, Any] = {}
    hardware: dict[str, Any] = {}
    git_revision: str | None = None
    command: str | None = None

    @property
    def title(self) -> str:
        """The label, or the method's name where there is none."""
        return self.label or self.method


class RunRecord(_Record):
    """One method on one stream of tasks (``run.json``)."""

    stream: str
    tasks: list[str]
    scores: list[list[float | None]]
    retention: dict[str, list[float | None]] = {}

    @model_validator(mode="after")
    def _fits(self) -> RunRecord:
        try:
            _ = self.matrix
        except LoricaError as error:
            raise ValueError(str(error)) from None
        for ability, values in self.retention.items():
            if len(values) != len(self.tasks) + 1:
                raise ValueError(f"retention of {ability!r} has {len(values)} values, not {len(self.tasks) + 1}")
        return self

    @property
    def matrix(self) -> ScoreMatrix:
        """The scores, checked. Metrics are always computed from it, so that they cannot disagree with it."""
        return ScoreMatrix.from_json({"tasks": self.tasks, "scores": self.scores})

    def retained(self, stage: int) -> float | None:
        """Mean over the held-out abilities after ``stage`` tasks, percent; None where one is unmeasured."""
        values = [series[stage] for series in self.retention.values()]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None


class TrainRecord(_Record):
    """One update of one model on one data set (``lorica.json``)."""

    method: str = "osft"
    scores: BeforeAfter = BeforeAfter()
    loss_curve: list[LossPoint] = []
    data: Data = Data()


Record = RunRecord | TrainRecord
_KINDS: dict[str, type[RunRecord] | type[TrainRecord]] = {"run": RunRecord, "train": TrainRecord}


def read_record(source: Mapping[str, Any] | Path | str) -> Record:
    """Return one validated record.

    Args:
        source: a record, or the path of a JSON file that holds one.

    Raises:
        LoricaError: not readable, not JSON, an unknown schema or kind, or a missing or wrong field; names
            the file and the field.
    """
    if isinstance(source, Mapping):
        return _validated(dict(source), "run record")
    path = Path(source)
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise LoricaError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise LoricaError(f"{path}: not a JSON file ({error})") from None
    return _validated(data, str(path))


def read_records(sources: Iterable[Mapping[str, Any] | Path | str]) -> list[Record]:
    """Return the records of several sources; a folder stands for the records in it and one level below."""
    records = [read_record(item) for source in sources for item in _expand(source)]
    if not records:
        raise LoricaError("nothing to report: give at least one run record or output folder")
    return records


def _expand(source: Mapping[str, Any] | Path | str) -> list[Mapping[str, Any] | Path]:
    if isinstance(source, Mapping):
        return [source]
    path = Path(source)
    if not path.is_dir():
        return [path]
    folders = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
    found = [next((f / name for name in FILE_NAMES if (f / name).is_file()), None) for f in folders]
    files: list[Mapping[str, Any] | Path] = [file for file in found if file is not None]
    if not files:
        raise LoricaError(f"{path}: no {' or '.join(FILE_NAMES)} in this folder or one level below it")
    return files


def _validated(data: Any, where: str) -> Record:
    if not isinstance(data, dict):
        raise LoricaError(f"{where}: a run record is a JSON object, this is a {type(data).__name__}")
    if data.get("schema") != SCHEMA:
        raise LoricaError(f"{where}: field 'schema' is {data.get('schema')!r}; this version reads {SCHEMA}")
    kind = data.get("kind")
    if kind not in _KINDS:
        hint = did_you_mean(str(kind), _KINDS)
        raise LoricaError(f"{where}: field 'kind' is {kind!r}, not one of {', '.join(_KINDS)}.{hint}")
    try:
        return _KINDS[kind].model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "scores"
        raise LoricaError(f"{where}: field {field!r}: {first['msg']}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
