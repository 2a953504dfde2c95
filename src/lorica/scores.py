"""The score matrix of a task stream and the standard continual-learning metrics on it (numpy only)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lorica.errors import LoricaError

FloatArray = npt.NDArray[np.float64]

METRICS = (
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "learning_accuracy",
)
LABEL_WIDTH = 16
"""Columns of the row names in a terminal table."""


@dataclass(frozen=True, eq=False)
class ScoreMatrix:
    """Scores R[i][j] on task j after stage i, for T tasks learned one after another.

    Row 0 is the model before training, row i the model after task i, so the score right after learning
    task j is R[j][j] (tasks counted from 1). All metrics are in percentage points; one that needs a cell
    that was not measured, or that is not defined for a single task, is None.

    Attributes:
        tasks: the T task names, in the order they were learned.
        scores: (T + 1) x T, percent from 0 to 100; NaN (or None) = not measured. Copied and made
            read-only: neither the matrix nor any metric changes what was given.

    Raises:
        LoricaError: no task, another shape, or a score outside 0 to 100.
    """

    tasks: Sequence[str]
    scores: FloatArray

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", list(self.tasks))
        object.__setattr__(self, "scores", _checked(self.tasks, self.scores))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ScoreMatrix):
            return NotImplemented
        return self.tasks == other.tasks and np.array_equal(self.scores, other.scores, equal_nan=True)

    @property
    def diagonal(self) -> FloatArray:
        """R[j][j] for j = 1..T: the score on each task right after learning it."""
        return self.scores[1:].diagonal()

    @property
    def average_accuracy(self) -> float | None:
        """AA (TRACE: OP) = mean of row T, every task weighted equally."""
        return _mean(self.scores[-1])

    @property
    def backward_transfer(self) -> float | None:
        """BWT = sum over j < T of (R[T][j] - R[j][j]), divided by T - 1; negative means forgetting."""
        return _mean((self.scores[-1] - self.diagonal)[:-1])

    @property
    def forgetting(self) -> float | None:
        """F = mean over j < T of (max over j <= i < T of R[i][j], minus R[T][j])."""
        best = [self.scores[j:-1, j - 1].max() for j in range(1, len(self.tasks))]
        return _mean(np.array(best) - self.scores[-1, :-1])

    @property
    def forward_transfer(self) -> float | None:
        """FWT = mean over j = 2..T of (R[j-1][j] - R[0][j]): what earlier tasks gave a task not yet seen."""
        return _mean((self.scores[:-1].diagonal() - self.scores[0])[1:])

    @property
    def learning_accuracy(self) -> float | None:
        """LA = mean of the diagonal R[j][j]."""
        return _mean(self.diagonal)

    def metrics(self) -> dict[str, float | None]:
        """Return the five metrics by name, in the order of ``METRICS``."""
        return {name: getattr(self, name) for name in METRICS}

    def to_json(self) -> dict[str, Any]:
        """Return ``{"tasks": [...], "scores": [[...]]}`` ready for ``json.dumps``; not measured is None."""
        rows = [[None if np.isnan(score) else float(score) for score in row] for row in self.scores]
        return {"tasks": list(self.tasks), "scores": rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, where: str = "score matrix") -> ScoreMatrix:
        """Read what ``to_json`` wrote; other keys are left alone, so a whole run record may be given.

        Args:
            data: a mapping with ``tasks`` and ``scores``.
            where: what to name in an error, such as the file.

        Raises:
            LoricaError: a field is missing, or the values are no score matrix.
        """
        for field in ("tasks", "scores"):
            if not isinstance(data.get(field), list):
                raise LoricaError(f"{where}: field {field!r} is missing or not a list")
        if not all(isinstance(task, str) for task in data["tasks"]):
            raise LoricaError(f"{where}: field 'tasks' holds something that is not a name")
        try:
            return cls(data["tasks"], data["scores"])
        except LoricaError as error:
            raise LoricaError(f"{where}: {error}") from None

    def stages(self) -> list[str]:
        """Return the row names: ``0 before``, then number and name of each task."""
        return ["0 before", *(f"{i} {name}" for i, name in enumerate(self.tasks, 1))]

    def table(self, *, labels: bool = True) -> str:
        """Return the matrix as aligned text, one decimal, ``*`` on the diagonal, ``-`` where not measured.

        Columns carry task numbers and rows the names, so that long names do not make it wide. All lines
        are equally long.

        Args:
            labels: False leaves out the row names, to print several matrices next to each other.
        """
        lines = ["".join(f"{j:>6} " for j in range(1, len(self.tasks) + 1))]
        for i, row in enumerate(self.scores):
            lines.append("".join(_cell(score, i == j) for j, score in enumerate(row, 1)))
        if labels:
            names = [shorten(name, LABEL_WIDTH).ljust(LABEL_WIDTH) for name in ["", *self.stages()]]
            lines = [name + line for name, line in zip(names, lines, strict=True)]
        return "\n".join(lines)


def shorten(text: str, width: int, mark: str = "..") -> str:
    """Return ``text`` on one printable line of at most ``width`` characters, ``mark`` where it was cut."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return line if len(line) <= width else line[: width - len(mark)] + mark


def _checked(tasks: Sequence[str], scores: Any) -> FloatArray:
    try:
        copy = np.array(scores, dtype=np.float64)
    except (TypeError, ValueError):
        raise LoricaError("scores hold something that is not a number, or rows of unequal length") from None
    if not tasks:
        raise LoricaError("scores need at least one task")
    t = len(tasks)
    if copy.shape != (t + 1, t):
        raise LoricaError(
            f"scores have shape {_by(copy.shape)}, but {t} tasks need {t + 1} x {t}: "
            "one row before training, then one after each task"
        )
    wrong = np.argwhere((copy < 0) | (copy > 100))
    if len(wrong):
        i, j = wrong[0]
        raise LoricaError(f"scores[{i}][{j}] is {copy[i, j]:g}; scores are percent, from 0 to 100")
    copy.setflags(write=False)
    return copy


def _mean(values: FloatArray) -> float | None:
    return None if values.size == 0 or np.isnan(values).any() else float(values.mean())


def _cell(score: float, marked: bool) -> str:
    return f"{'-' if np.isnan(score) else f'{score:.1f}':>6}{'*' if marked else ' '}"


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)
