"""The choice of a method's learning rate: the same grid for every method, on rows cut from train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorica import processes
from lorica.errors import LoricaError
from lorica.experiments.cell import CellRun
from lorica.experiments.clock import Clock
from lorica.experiments.identity import Cell
from lorica.experiments.setup import Setup
from lorica.record import write_json
from lorica.scores import ScoreMatrix

TOLERANCE = 1.0
"""Points below the best learning accuracy within which ``learning_accuracy`` prefers the smaller rate."""

SWEEP = "sweep.json"


@dataclass(frozen=True)
class Selection:
    """The rate that was chosen, and what the choice was made on.

    Attributes:
        learning_rate: the chosen one.
        by: the criterion.
        candidates: rate, as text, to its figures on the validation rows, percent.
        at_edge: the chosen rate is the smallest or the largest of the grid, so a better one may lie outside.
    """

    learning_rate: float
    by: str
    candidates: dict[str, dict[str, Any]]
    at_edge: bool

    def to_json(self) -> dict[str, Any]:
        """Return what the run record holds of it."""
        return {
            "learning_rates": [float(rate) for rate in self.candidates],
            "selected": self.learning_rate,
            "selected_by": self.by,
            "at_edge_of_grid": self.at_edge,
            "validation": self.candidates,
        }


def select(setup: Setup, method: str, folder: Path, tell: Callable[[str], None], clock: Clock) -> Selection:
    """Run a method with each rate of the grid, first order and first seed, and choose.

    Every rate is trained on the rows left of each task and scored on those cut off, never on test rows.

    Args:
        folder: gets one folder for each rate and ``sweep.json``.
    """
    config = setup.config
    figures = {}
    for rate in setup.grid(method):
        cell = Cell(method, setup.orders[0], config.seeds[0], rate, validates=True)
        run = CellRun(setup, cell, folder / f"lr-{rate:g}", _naming(rate, tell), clock)
        figures[rate] = _figures(run)
    by: str = config.select_by
    if all(one[by] is None for one in figures.values()):
        by = "average_accuracy"  # joint learns all tasks at the end, and none right after it came
    with processes.agreed():
        try:
            chosen = choose_rate({rate: one[by] for rate, one in figures.items()}, by)
        except LoricaError as error:
            raise LoricaError(f"method {method!r}: {error}") from error
    at_edge = len(figures) > 1 and chosen in (min(figures), max(figures))
    result = Selection(chosen, by, {f"{rate:g}": one for rate, one in figures.items()}, at_edge)
    processes.by_first(lambda: write_json(folder / SWEEP, result.to_json()))
    return result


def _naming(rate: float, tell: Callable[[str], None]) -> Callable[[str], None]:
    return lambda line: tell(f"learning rate {rate:g}, {line}")


def _figures(run: CellRun) -> dict[str, Any]:
    progress = run.run()
    run.drop_model()
    matrix = ScoreMatrix(list(progress.tasks), np.array(progress.scores))
    kept = {name: [series[0], series[-1]] for name, series in progress.retention.items()}
    return {
        "average_accuracy": matrix.average_accuracy,
        "learning_accuracy": matrix.learning_accuracy,
        "retention": kept,
        "diverged": progress.diverged or None,
    }


def choose_rate(scores: Mapping[float, float | None], by: str) -> float:
    """Return the rate that a criterion prefers; a rate without a score (training failed) is never chosen.

    ``average_accuracy``: the highest score, of equals the smaller rate. ``learning_accuracy``: the smallest rate
    within one point of the highest.

    Raises:
        LoricaError: no rate has a score.
    """
    known = {rate: score for rate, score in scores.items() if score is not None}
    if not known:
        rates = " ".join(f"{rate:g}" for rate in scores)
        raise LoricaError(f"training failed with every learning rate of {rates}; give lower --learning_rates")
    best = max(known.values())
    slack = TOLERANCE if by == "learning_accuracy" else 0.0
    return min(rate for rate, score in known.items() if score >= best - slack)
