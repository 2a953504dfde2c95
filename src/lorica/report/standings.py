"""Where the methods end: the main table, differences and chance, single tasks beside their floors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorica.report.differences import Gap, gap, rows_interval, told_ends
from lorica.report.parts import PLAIN, Section
from lorica.report.records import RunRecord
from lorica.report.replicates import (
    Measure,
    MethodRuns,
    at_end,
    forgetting,
    forward_transfer,
    held_out_change,
    learned,
    transfer,
)
from lorica.report.tables import Table, percent
from lorica.report.text import averaged_over
from lorica.units import MISSING

_CHANCE_INTRO = (
    "How far each method's average at the end lies above the reference, in points, with 95 % intervals: first the "
    "paired bootstrap over the same test rows, which leaves out that another training run would differ; then, where "
    "at least two seeds are shared, the t-interval over seeds. A difference counts only if zero lies outside of all; "
    "nothing corrects for how many are looked at."
)


AT_FLOOR = "!"
"""Marks a score that always giving the most frequent answer would reach."""


@dataclass(frozen=True)
class Reference:
    """A method that others are compared with, and how far each of them ends above it, by its index."""

    runs: MethodRuns
    gaps: dict[int, Gap]


def references(methods: Sequence[MethodRuns]) -> list[Reference]:
    """Return the best method that needs no old data and no task id, and plain sequential fine-tuning if it ran."""
    found = [one for one in (best(methods), _plain(methods)) if one is not None]
    once = list(dict.fromkeys(one.index for one in found))
    return [
        Reference(one, {other.index: gap(other, one) for other in methods if other.index != one.index})
        for one in (next(x for x in methods if x.index == index) for index in once)
    ]


def best(methods: Sequence[MethodRuns]) -> MethodRuns | None:
    """Return the method with the highest average at the end among those that need no old data and no task id."""
    free = [one for one in methods if not _needy(one)]
    ranked = [(found.mean, one) for one in free or methods if (found := one.estimate(at_end))]
    return max(ranked, key=lambda pair: pair[0])[1] if ranked else None


def standings_section(methods: Sequence[MethodRuns]) -> Section:
    """Return the main table: what was learned, what is left at the end, what was lost."""
    columns: dict[str, list[str]] = {
        "learned": [one.told(learned) for one in methods],
        "at the end": [one.told(at_end) for one in methods],
        "95 % interval": [_interval_told(one) for one in methods],
        "backward transfer": [one.told(transfer, "+") for one in methods],
        "forgetting": [one.told(forgetting) for one in methods],
        "forward transfer": [one.told(forward_transfer, "+") for one in methods],
        "held out, change": [one.told(held_out_change, "+") for one in methods],
        "runs": [str(len(one.cells)) for one in methods],
    }
    known = {name: cells for name, cells in columns.items() if set(cells) != {MISSING}}
    rows = [[one.label, *(cells[i] for cells in known.values())] for i, one in enumerate(methods)]
    intro = (
        f"{averaged_over(methods)} Learned: each task right after learning it. At the end: all tasks after the last. "
        "Backward transfer: change of earlier tasks by then; forgetting: fall from the best they had been. Intervals: "
        "over seeds where there are several, else over test rows."
    )
    return Section("The figures", intro, table=Table(["method", *known], rows))


def chance_section(methods: Sequence[MethodRuns], found: Sequence[Reference]) -> Section | None:
    """Return every difference from the references with its intervals, and whether it is more than chance."""
    known = [one for one in found if any(each.mean is not None for each in one.gaps.values())]
    if not known:
        return None
    header, rows = ["method"], [[one.label] for one in methods]
    for reference in known:
        header += [f"above {reference.runs.label}", "more than chance"]
        for row, one in zip(rows, methods, strict=True):
            row += _gap_cells(reference.gaps.get(one.index))
    return Section("Which differences are more than chance", _CHANCE_INTRO, table=Table(header, rows))


def tasks_section(methods: Sequence[MethodRuns]) -> Section:
    """Return each task at the end, beside its majority floor and its score before training; other metrics below."""
    first = methods[0].record
    tasks = (
        sorted(first.tasks) if len({tuple(cell.tasks) for one in methods for cell in one.cells}) > 1 else first.tasks
    )
    floors = [percent(_floor(methods, task)) for task in tasks]
    metrics = [first.metric_names.get(task, MISSING) for task in tasks]
    rows = [["metric", *metrics]] if len(set(metrics)) > 1 else []
    rows += [["always the most frequent answer", *floors]] if set(floors) != {MISSING} else []
    rows.append(["before training", *(methods[0].mean(_task(task, 0)) for task in tasks)])
    rows += [[one.label, *(_task_told(methods, one, task) for task in tasks)] for one in methods]
    intro = f"Metric: {metrics[0]}. " if set(metrics) != {MISSING} and len(set(metrics)) == 1 else ""
    if any(_at_floor(methods, one, task) for one in methods for task in tasks):
        intro += f"{AT_FLOOR} marks a score no better than always giving the most frequent answer."
    table = Table(["at the end, percent", *tasks], rows)
    return Section("Each task at the end", intro, table=table, details=_beside(methods, tasks))


def _interval_told(one: MethodRuns) -> str:
    found = one.estimate(at_end)
    if found is None:
        return MISSING
    if found.sd is not None:
        return f"{told_ends(found)}, seeds"
    over = rows_interval(one, sorted(one.record.tasks))
    return f"{told_ends(over)}, rows" if over else MISSING


def _gap_cells(found: Gap | None) -> list[str]:
    if found is None:
        return ["the reference", ""]
    return [found.told(), MISSING if found.mean is None else found.verdict]


def _beside(methods: Sequence[MethodRuns], tasks: Sequence[str]) -> list[tuple[str, Table]]:
    names = dict.fromkeys(name for one in methods for cell in one.cells for name in cell.beside)
    return [(f"the same by {name}", _beside_table(methods, tasks, name)) for name in names]


def _beside_table(methods: Sequence[MethodRuns], tasks: Sequence[str], metric: str) -> Table:
    cells = [cell for one in methods for cell in one.cells]
    scored = [
        task for task in (*tasks, *methods[0].record.retention) if any(task in c.beside.get(metric, {}) for c in cells)
    ]
    rows = [[one.label, *(one.told(_other(metric, task)) for task in scored)] for one in methods]
    return Table([f"{metric}, at the end", *scored], rows)


def _other(metric: str, task: str) -> Measure:
    def score(cell: RunRecord) -> float | None:
        values = cell.beside.get(metric, {}).get(task, [])
        return values[-1] if len(values) == len(cell.scores) else None

    return score


def _task(task: str, stage: int) -> Measure:
    def score(cell: RunRecord) -> float | None:
        value = float(cell.matrix.scores[stage, cell.tasks.index(task)])
        return None if value != value else value

    return score


def _floor(methods: Sequence[MethodRuns], task: str) -> float | None:
    return next((cell.floors[task] for one in methods for cell in one.cells if task in cell.floors), None)


def _task_told(methods: Sequence[MethodRuns], one: MethodRuns, task: str) -> str:
    told = one.told(_task(task, -1))
    return f"{told} {AT_FLOOR}" if _at_floor(methods, one, task) else told


def _at_floor(methods: Sequence[MethodRuns], one: MethodRuns, task: str) -> bool:
    floor, found = _floor(methods, task), one.estimate(_task(task, -1))
    return floor is not None and found is not None and found.mean <= floor


def _needy(one: MethodRuns) -> bool:
    facts = one.record.facts
    return facts is not None and (facts.needs_old_data or facts.needs_task_id)


def _plain(methods: Sequence[MethodRuns]) -> MethodRuns | None:
    return next((one for one in methods if one.record.method == PLAIN), None)
