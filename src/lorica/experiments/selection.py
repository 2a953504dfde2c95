"""The choice of a method's learning rate: the same grid for every method, on rows cut from train."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorica.experiments.cell import Cell, CellRun
from lorica.experiments.clock import Clock
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
        run = CellRun(setup, cell, folder / f"lr-{rate:g}", tell, clock)
        figures[rate] = _figures(run)
    chosen = choose_rate({rate: one.get(config.select_by) for rate, one in figures.items()}, config.select_by)
    edges = (min(figures), max(figures))
    result = Selection(
        chosen, config.select_by, {f"{rate:g}": one for rate, one in figures.items()},
        at_edge=len(figures) > 1 and chosen in edges,
    )  # fmt: skip
    write_json(folder / SWEEP, result.to_json())
    return result


def _figures(run: CellRun) -> dict[str, Any]:
    progress = run.run()
    run.drop_model()
    matrix = ScoreMatrix(list(progress.tasks), np.array(progress.scores))
    kept = {name: [series[0], series[-1]] for name, series in progress.retention.items()}
    return {
        "average_accuracy": matrix.average_accuracy,
        "learning_accuracy": matrix.learning_accuracy,
        "retention": kept,
    }


def choose_rate(scores: Mapping[float, float | None], by: str) -> float:
    """Return the rate that a criterion prefers; a rate without a score (training failed) is never chosen first.

    ``average_accuracy``: the highest score, of equals the smaller rate. ``learning_accuracy``: the smallest rate
    within one point of the highest.
    """
    known = {rate: -math.inf if score is None else score for rate, score in scores.items()}
    best = max(known.values())
    slack = TOLERANCE if by == "learning_accuracy" else 0.0
    return min(rate for rate, score in known.items() if score >= best - slack)
