"""Updates that go on from each other, found by the hashes of their weights, and their score matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath

from lorica.report.records import Measured, TrainRecord
from lorica.scores import ScoreMatrix

SCORE = "exact_match"


@dataclass(frozen=True)
class Chain:
    """A model's updates.

    Attributes:
        updates: those that were kept, each from the model that the one before left.
        rejected: those that were set aside, by the place of the update they started from, 0 for the first model.
    """

    updates: tuple[TrainRecord, ...]
    rejected: tuple[tuple[int, TrainRecord], ...] = ()

    @cached_property
    def names(self) -> list[str]:
        """What each update was about: the stem of its file, with a number where that comes again."""
        stems = [stem(record) for record in self.updates]
        return [
            stem if stems.count(stem) == 1 else f"{stem} ({stems[: i + 1].count(stem)})" for i, stem in enumerate(stems)
        ]

    @cached_property
    def matrix(self) -> ScoreMatrix:
        """R[i][j]: exact match on update j's evaluation file after update i; not measured where no update says.

        A file is known by its hash: the evaluation file of an update may be a retention file of another. What a model
        scored is read from the update that made it, else from the one that started from it.
        """
        files = [_hash(record.data.eval) for record in self.updates]
        measured = [_measured(self.updates, stage) for stage in range(len(files) + 1)]
        scores = [[_number(row.get(file)) if file else math.nan for file in files] for row in measured]
        return ScoreMatrix(self.names, scores)  # type: ignore[arg-type]

    @cached_property
    def held_out(self) -> dict[str, list[float | None]]:
        """Scores after each update of the retention files that every update scored and none was about."""
        known = [{_hash(file): name for name, file in record.data.retention.items()} for record in self.updates]
        own = {_hash(record.data.eval) for record in self.updates} | {None}
        shared = [file for file in known[0] if file not in own and all(file in each for each in known)]
        measured = [_measured(self.updates, stage) for stage in range(len(self.updates) + 1)]
        series = {known[0][file]: [row.get(file or "") for row in measured] for file in shared}
        return {name: values for name, values in series.items() if any(value is not None for value in values)}


def chains(records: Sequence[TrainRecord]) -> tuple[list[Chain], list[TrainRecord]]:
    """Return the chains of at least two linked updates, and the updates that are in none.

    Update b goes on from a if the weights it started from are those that a wrote. Of several that go on from the
    same one, the longest line of kept updates is the chain; rejected ones beside it belong to it.
    """
    left, linked = list(records), []
    for record in records:
        if not any(one is record for one in left) or _maker(record, records):
            continue
        line = _longest(record, records)
        places = {one.weights_sha256: place for place, one in enumerate(line, 1)}
        start = line[0].parent.weights_sha256 if line else None
        places |= {start: 0} if start else {}
        aside = tuple(
            (places[one.parent.weights_sha256], one)
            for one in left
            if one.rejected and one.parent.weights_sha256 in places and not any(one is kept for kept in line)
        )
        if len(line) + len(aside) > 1 and line:
            linked.append(Chain(tuple(line), aside))
            used = [*line, *(one for _, one in aside)]
            left = [one for one in left if not any(one is other for other in used)]
    return linked, left


def _measured(updates: Sequence[TrainRecord], stage: int) -> dict[str, float | None]:
    """Return the scores of the model after ``stage`` updates by the hash of the file."""
    found: dict[str, float | None] = {}
    if stage < len(updates):
        found |= _by_file(updates[stage], updates[stage].scores.before)
    if stage:
        found |= _by_file(updates[stage - 1], updates[stage - 1].scores.after)
    return found


def _by_file(record: TrainRecord, measured: Measured) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, value in retained(measured).items():
        if file := _hash(record.data.retention.get(name)):
            found[file] = value
    if (file := _hash(record.data.eval)) and measured.eval.get(SCORE) is not None:
        found[file] = measured.eval[SCORE]
    return found


def retained(measured: Measured) -> dict[str, float]:
    """Return the scores of the retention files that were measured, by name."""
    known = {name: one.get(SCORE) for name, one in measured.retention.items() if isinstance(one, dict)}
    return {name: value for name, value in known.items() if value is not None}


def _maker(record: TrainRecord, records: Sequence[TrainRecord]) -> TrainRecord | None:
    """Return the update that wrote the weights which another one started from."""
    start = record.parent.weights_sha256
    return next((one for one in records if start and one.weights_sha256 == start and one is not record), None)


def _longest(record: TrainRecord, records: Sequence[TrainRecord]) -> list[TrainRecord]:
    """Return the longest line of updates that starts with one; rejected ones only where others went on from them."""
    after = [one for one in records if one is not record and _maker(one, [record])]
    lines = [_longest(one, [other for other in records if other is not record]) for one in after]
    rest = max(lines, key=len, default=[])
    return [record, *rest] if rest or not record.rejected else []


def _hash(file: object) -> str | None:
    found = file.get("sha256") if isinstance(file, dict) else None
    return str(found) if found else None


def stem(record: TrainRecord) -> str:
    """Return what an update was about: the stem of its training file."""
    path = record.data.train.get("path")
    return PurePath(str(path)).stem if path else record.title


def _number(value: float | None) -> float:
    return math.nan if value is None else value
