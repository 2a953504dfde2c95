"""Runs that repeat each other: one method, several orders of the tasks and several seeds, and how far they agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from lorica.bootstrap import t_interval
from lorica.report.parts import Entry
from lorica.report.records import Cost, RunRecord
from lorica.report.tables import percent
from lorica.scores import ScoreMatrix
from lorica.units import MISSING

SECONDS = ("seconds", "training_seconds", "seconds_per_step")

Measure = Callable[[RunRecord], float | None]


@dataclass(frozen=True)
class Estimate:
    """A figure over several seeds.

    Attributes:
        mean: over seeds, each of them the mean over its orders.
        sd: standard deviation over seeds, n - 1 in the denominator; None for one seed.
        low, high: ends of the 95 % Student t-interval over seeds; None for one seed.
        seeds: how many.
    """

    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 1

    def told(self, sign: str = "") -> str:
        """Return ``71.2 ± 0.4``, or the mean alone where there is one seed; ``sign`` "+" shows that of the mean."""
        mean = f"{round(self.mean, 1) + 0.0:{sign}.1f}"  # no -0.0
        return mean if self.sd is None else f"{mean} ± {self.sd:.1f}"


@dataclass(frozen=True)
class MethodRuns:
    """The runs of one method: its replicates.

    Attributes:
        label: as it is written in tables; no two of a comparison are the same.
        name: a short one for charts.
        index: of its colour and mark.
        cells: the runs, by order and then by seed.
    """

    label: str
    name: str
    index: int
    cells: tuple[RunRecord, ...]

    @property
    def record(self) -> RunRecord:
        """The first run, for what is the same in all of them."""
        return self.cells[0]

    @property
    def orders(self) -> list[str | None]:
        """The orders of the tasks, in which any seed ran."""
        return list(dict.fromkeys(cell.order for cell in self.cells))

    @property
    def seeds(self) -> list[int | None]:
        """The seeds that count: those that ran in every order; all of them where none did."""
        ran = {seed: sum(cell.seed == seed for cell in self.cells) for seed in (cell.seed for cell in self.cells)}
        whole = [seed for seed, count in ran.items() if count == len(self.orders)]
        return whole or list(ran)

    def of_order(self, order: str | None) -> list[RunRecord]:
        """Return the runs of one order, one for each seed."""
        return [cell for cell in self.cells if cell.order == order]

    def by_seed(self, figure: Measure) -> list[float] | None:
        """Return a figure of each seed that counts, its mean over orders; None where a run has no such figure."""
        values = [[figure(cell) for cell in self.cells if cell.seed == seed] for seed in self.seeds]
        known = [[value for value in row if value is not None] for row in values]
        return [fmean(row) for row in known] if list(map(len, known)) == list(map(len, values)) else None

    def estimate(self, figure: Measure) -> Estimate | None:
        """Return the mean of a figure and how sure it is over seeds; None where a run has no such figure."""
        values = self.by_seed(figure)
        if values is None:
            return None
        if len(values) < 2:
            return Estimate(values[0])
        found = t_interval(values)
        return Estimate(found.mean, stdev(values), found.low, found.high, len(values))

    def told(self, figure: Measure, sign: str = "") -> str:
        """Return a figure with its deviation, ready to print."""
        found = self.estimate(figure)
        return found.told(sign) if found else MISSING

    def mean(self, figure: Measure) -> str:
        """Return a figure without its deviation, for what no training has touched yet."""
        found = self.estimate(figure)
        return percent(found.mean) if found else MISSING

    def curve(self, series: Callable[[RunRecord], Sequence[float | None]]) -> list[Estimate | None]:
        """Return the estimate of every place of a series, such as the stages of a stream."""
        length = min(len(series(cell)) for cell in self.cells)
        return [self.estimate(lambda cell, at=place: series(cell)[at]) for place in range(length)]  # type: ignore[misc]

    def mean_matrix(self, order: str | None) -> ScoreMatrix:
        """Return the mean over seeds of the score matrices of one order; a cell that any lacks is not measured."""
        cells = self.of_order(order)
        scores = np.mean([cell.matrix.scores for cell in cells], axis=0)
        return ScoreMatrix(cells[0].tasks, scores)

    def entry(self) -> Entry[RunRecord]:
        """Return the first run under the method's label, with what all of them cost on average."""
        cost = mean_cost([cell.cost for cell in self.cells])
        return Entry(self.record.model_copy(update={"cost": cost}), self.label, self.name, self.index)

    @property
    def carried(self) -> int | None:
        """The most bytes that any run carried from one task to the next; None where no run says."""
        return max((size for cell in self.cells for size in cell.carried_bytes), default=None)

    @property
    def learning_rates(self) -> list[float]:
        """The learning rates of the runs, each once."""
        return sorted({cell.learning_rate for cell in self.cells if cell.learning_rate is not None})


def replicates(records: Sequence[RunRecord]) -> list[MethodRuns]:
    """Return the methods of a comparison, in the order they come, each with its runs.

    A method is told by its name and label. Where the same order and seed comes twice, the second one becomes a
    method of its own with a number: two results of one thing are never averaged as if they were independent.
    """
    groups: dict[tuple[str, str, int], list[RunRecord]] = {}
    for record in records:
        same, number = (record.name or record.method, record.title), 1
        while _holds(groups.get((*same, number), []), record):
            number += 1
        groups.setdefault((*same, number), []).append(record)
    labels = _labels(list(groups))
    names = _names(groups, labels)
    return [
        MethodRuns(label, name, index, tuple(sorted(cells, key=_place)))
        for index, (label, name, cells) in enumerate(zip(labels, names, groups.values(), strict=True))
    ]


def mean_cost(costs: Sequence[Cost]) -> Cost:
    """Return the mean of each figure over runs, of memory the most; None where a run lacks it."""
    columns = {name: [getattr(cost, name) for cost in costs] for name in Cost.model_fields}
    whole = {name: values for name, values in columns.items() if None not in values}
    means: dict[str, Any] = {
        name: max(values) if name == "peak_rss_bytes" else fmean(values) if name in SECONDS else round(fmean(values))
        for name, values in whole.items()
    }
    return Cost(**means)


def told_apart(runs: MethodRuns) -> str:
    """Return the label with what the method needs that others do without."""
    facts = runs.record.facts
    needed = {"old data": facts and facts.needs_old_data, "task id": facts and facts.needs_task_id}
    needs = [word for word, is_needed in needed.items() if is_needed]
    return f"{runs.label} ({', '.join(needs)})" if needs else runs.label


def learned(cell: RunRecord) -> float | None:
    """Return the learning accuracy of a run: each task right after learning it."""
    return cell.matrix.learning_accuracy


def at_end(cell: RunRecord) -> float | None:
    """Return the average accuracy of a run: all tasks after the last one."""
    return cell.matrix.average_accuracy


def transfer(cell: RunRecord) -> float | None:
    """Return the backward transfer of a run."""
    return cell.matrix.backward_transfer


def forgetting(cell: RunRecord) -> float | None:
    """Return the forgetting of a run."""
    return cell.matrix.forgetting


def forward_transfer(cell: RunRecord) -> float | None:
    """Return the forward transfer of a run."""
    return cell.matrix.forward_transfer


def held_out(cell: RunRecord) -> float | None:
    """Return the mean over held-out abilities at the end of a run."""
    return cell.retained(-1)


def held_out_change(cell: RunRecord) -> float | None:
    """Return the mean over held-out abilities of after minus before, in points."""
    before, after = cell.retained(0), cell.retained(-1)
    return None if before is None or after is None else after - before


def _holds(cells: Sequence[RunRecord], record: RunRecord) -> bool:
    return any((cell.order, cell.seed) == (record.order, record.seed) for cell in cells)


def _place(cell: RunRecord) -> tuple[int, str, int]:
    order = cell.order or ""
    return len(order), order, -1 if cell.seed is None else cell.seed  # 9 before 10


def _labels(groups: Sequence[tuple[str, str, int]]) -> list[str]:
    """Return labels that differ: the name of the settings is added where needed, then a number."""
    same = Counter(label for _, label in {(name, label) for name, label, _ in groups})
    shown = [label if same[label] == 1 else f"{label}, {name}" for name, label, _ in groups]
    return [text if number == 1 else f"{text} ({number})" for text, (*_, number) in zip(shown, groups, strict=True)]


def _names(groups: dict[tuple[str, str, int], list[RunRecord]], labels: Sequence[str]) -> list[str]:
    """Return the names of the settings, or the methods', for charts; the labels where those do not differ."""
    short = [name for name, *_ in groups]
    return [name if short.count(name) == 1 else label for name, label in zip(short, labels, strict=True)]
