"""What a cell has measured so far, as data that goes to disk after each stage and comes back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from lorica.record import peak_memory

Series = dict[str, list[float]]


@dataclass
class Cost:
    """What the training took: seconds of everything, seconds of training, optimizer steps, bytes."""

    seconds: float = 0.0
    training_seconds: float = 0.0
    steps: int = 0
    peak_rss_bytes: int | None = None
    trainable_parameters: int = 0

    def saw_memory(self) -> None:
        """Take down the largest resident size of the process so far."""
        self.peak_rss_bytes = max(self.peak_rss_bytes or 0, peak_memory() or 0) or None

    def to_json(self) -> dict[str, Any]:
        """Return the fields and what follows from them."""
        return asdict(self) | {"seconds_per_step": self.training_seconds / max(self.steps, 1)}


@dataclass
class Progress:
    """The scores of a cell, stage by stage, and what came with them.

    Attributes:
        tasks, retention: score after each stage, percent, by task and by held-out ability; NaN: not measured.
        beside: the same of other metrics, by metric and then by task.
        rows, answers: score of each row at the last stage it was measured, and what was answered, by task or
            ability.
        carried_bytes: size of what the method carried on from each task.
        worst_leakage: largest leakage of each task's training; None for methods without an audit.
        forgetting: what was foreseen and measured of each task's training; with its name, where that was asked for.
        leakage, plan: records of the last task's audit and plan.
        waiting_steps: steps of tasks that a method which learns later has not taken yet.
        parameters: number of the model's parameters.
        new_parameters: patterns of those that came in without weights and so train with every method.
        diverged: why no score follows; empty unless training failed.
        notices: what the trainings told, with their task and step.
    """

    tasks: Series
    retention: Series
    beside: dict[str, Series] = field(default_factory=dict)
    rows: Series = field(default_factory=dict)
    answers: dict[str, list[str]] = field(default_factory=dict)
    carried_bytes: list[int] = field(default_factory=list)
    worst_leakage: list[float | None] = field(default_factory=list)
    forgetting: list[dict[str, Any]] = field(default_factory=list)
    leakage: list[dict[str, Any]] = field(default_factory=list)
    plan: list[dict[str, Any]] = field(default_factory=list)
    waiting_steps: int = 0
    parameters: int = 0
    new_parameters: list[str] = field(default_factory=list)
    diverged: str = ""
    notices: list[dict[str, Any]] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)

    @classmethod
    def empty(cls, tasks: Sequence[str], abilities: Sequence[str]) -> Self:
        """Return the progress of a cell that has measured nothing."""
        return cls({name: [] for name in tasks}, {name: [] for name in abilities})

    @property
    def stages_done(self) -> int:
        """How many tasks are learned and scored."""
        return min(len(series) for series in (*self.tasks.values(), *self.retention.values())) - 1

    @property
    def scores(self) -> list[list[float]]:
        """The (T+1) x T matrix."""
        return [list(row) for row in zip(*self.tasks.values(), strict=True)]

    def set(self, stage: int, name: str, score: float, beside: Mapping[str, float] | None = None) -> None:
        """Take down a score; stages come in order."""
        series = self._series(name)
        assert len(series) == stage, f"{name}: stage {stage} after {len(series)} stages"
        series.append(score)
        for metric, value in (beside or {}).items():
            held = self.beside.setdefault(metric, {}).setdefault(name, [])
            held += [math.nan] * (stage - len(held))
            held.append(value)

    def repeat(self, stage: int, name: str) -> None:
        """Take down once more what the stage before scored."""
        again = {metric: held[name][-1] for metric, held in self.beside.items() if name in held}
        self.set(stage, name, self._series(name)[-1], again)

    def give_up(self, reason: str, stages: int) -> None:
        """Take down that nothing is measured any more, up to this number of tasks."""
        self.diverged = reason
        for series in (*self.tasks.values(), *self.retention.values()):
            series += [math.nan] * (stages + 1 - len(series))

    def at(self, stage: int, name: str) -> str:
        """Return a score as text, ``-`` where it was not measured."""
        score = self._series(name)[stage]
        return "    -" if math.isnan(score) else f"{score:5.1f}"

    def _series(self, name: str) -> list[float]:
        return self.tasks[name] if name in self.tasks else self.retention[name]

    def to_json(self) -> dict[str, Any]:
        """Return plain data; not measured becomes null when it is written."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the progress that ``to_json`` gave."""
        known = {key: data[key] for key in cls.__dataclass_fields__ if key != "cost" and key in data}
        for name in ("tasks", "retention", "rows"):
            known[name] = {key: _measured(values) for key, values in known[name].items()}
        known["beside"] = {m: {key: _measured(v) for key, v in held.items()} for m, held in known["beside"].items()}
        return cls(**known, cost=Cost(**data["cost"]))


def _measured(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
