"""The part of a report that compares methods on one stream of tasks."""

from __future__ import annotations

from collections.abc import Sequence

from lorica.report.charts import Series, heat_map, line_chart, scatter
from lorica.report.parts import (
    Card,
    Entry,
    Fact,
    Figure,
    Part,
    Section,
    cost_section,
    leakage_section,
    named,
    plan_section,
    rerun_section,
)
from lorica.report.records import RunRecord
from lorica.report.tables import MISSING, Table, listed, percent, points
from lorica.report.text import metrics_table, retention_table

Run = Entry[RunRecord]


def compare_part(runs: Sequence[RunRecord]) -> Part:
    """Return the whole comparison of runs that share one stream and its tasks."""
    entries = named(runs)
    tasks = entries[0].record.tasks
    order = "; ".join(f"{j} {task}" for j, task in enumerate(tasks, 1))
    sections = [
        Section("Learning and keeping", f"The tasks, in the order they were learned: {order}.",
                [*_retention_figures(entries), *_learning_figures(entries)]),
        Section("Every score after every task", _MATRIX_INTRO, [_matrix_figure(entry) for entry in entries]),
        _trade_section(entries),
        plan_section(entries),
        leakage_section(entries),
        cost_section(entries),
        rerun_section(entries),
    ]  # fmt: skip
    title = f"{entries[0].record.stream}: {_plural(len(tasks), 'task')}, {_plural(len(entries), 'method')}"
    return Part(title, _sentence(entries), [_card(entry) for entry in entries], sections)


_MATRIX_INTRO = (
    "Rows are stages of training, columns the task that is scored; percent. The outlined diagonal is the score "
    "right after learning a task. Below it is what remains; above it are tasks not yet learned."
)


def _sentence(entries: Sequence[Run]) -> str:
    if len(entries) > 4:  # a sentence of more clauses is not read: the two that end best and worst
        ranked = sorted(entries, key=lambda entry: entry.record.matrix.average_accuracy or 0.0)
        best, worst = ranked[-1], ranked[0]
        return f"Best at the end: {_clause(best)}. Worst: {_clause(worst)}."
    return "; ".join(_clause(entry) for entry in entries) + "."


def _clause(entry: Run) -> str:
    matrix, words = entry.record.matrix, []
    if matrix.learning_accuracy is not None:
        words.append(f"learned each new task to {percent(matrix.learning_accuracy)} % on average")
    if (change := matrix.backward_transfer) is not None:
        verb = "lost" if change < 0 else "gained"
        words.append(f"{verb} {abs(change):.1f} points of it by the end of the stream")
    before, after = entry.record.retained(0), entry.record.retained(-1)
    if before is not None and after is not None:
        words.append(f"took what is held out from {before:.1f} to {after:.1f} %")
    return f"{entry.label} {listed(words) or 'has no complete score'}"


def _card(entry: Run) -> Card:
    matrix, record = entry.record.matrix, entry.record
    facts = [
        Fact("learned", percent(matrix.learning_accuracy), "% on a new task, right after it"),
        Fact("at the end", percent(matrix.average_accuracy), "% on average over all tasks"),
        Fact("backward transfer", points(matrix.backward_transfer), "points, earlier tasks by the end"),
    ]
    if (kept := record.retained(-1)) is not None:
        facts.append(Fact("held out", percent(kept), f"% at the end; {percent(record.retained(0))} % before"))
    return Card(entry, [fact for fact in facts if fact.value != MISSING])


def _retention_figures(entries: Sequence[Run]) -> list[Figure]:
    abilities = dict.fromkeys(name for entry in entries for name in entry.record.retention)
    figures = [_retention_figure(entries, ability) for ability in abilities]
    return [figure for figure in figures if figure]


def _retention_figure(entries: Sequence[Run], ability: str) -> Figure | None:
    curves = {entry.label: {ability: entry.record.retention.get(ability, [])} for entry in entries}
    series = [Series(entry.name, entry.index, list(enumerate(curves[entry.label][ability]))) for entry in entries]
    start = next((line.points[0][1] for line in series if line.points), None)
    if not any(line.measured() for line in series):
        return None
    caption = f"Kept: {ability}, never trained on in the stream. A line that stays level forgets nothing."
    svg = line_chart(
        series, title=f"Retention of {ability}", description=caption, y_title=f"{ability}, %",
        x_title="tasks learned (0 = before training)",
        reference=None if start is None else (start, "before training"),
    )  # fmt: skip
    return Figure(svg, caption, retention_table(curves))


def _learning_figures(entries: Sequence[Run]) -> list[Figure]:
    diagonals = [list(map(_known, entry.record.matrix.diagonal)) for entry in entries]
    series = [
        Series(entry.name, entry.index, list(enumerate(diagonal, 1)))
        for entry, diagonal in zip(entries, diagonals, strict=True)
    ]
    if not any(line.measured() for line in series):
        return []
    caption = "Learned: the score on each new task right after learning it. Higher is better."
    rows = [[entry.label, *map(percent, diagonal)] for entry, diagonal in zip(entries, diagonals, strict=True)]
    table = Table(["right after learning", *map(str, range(1, len(diagonals[0]) + 1))], rows)
    svg = line_chart(
        series, title="Learning", description=caption, y_title="new task, %",
        x_title="task, in the order of the stream",
    )  # fmt: skip
    return [Figure(svg, caption, table)]


def _matrix_figure(entry: Run) -> Figure:
    matrix = entry.record.matrix
    facts = [("learned", percent(matrix.learning_accuracy)), ("end", percent(matrix.average_accuracy)),
             ("backward transfer", points(matrix.backward_transfer))]  # fmt: skip
    caption = ", ".join(f"{name} {value}" for name, value in facts if value != MISSING)
    rows = [
        [stage, *(percent(float(x)) for x in row)] for stage, row in zip(matrix.stages(), matrix.scores, strict=True)
    ]
    table = Table(["after", *(f"{j} {task}" for j, task in enumerate(matrix.tasks, 1))], rows)
    svg = heat_map(matrix, title=f"{entry.label}: score matrix", description=caption)
    return Figure(svg, caption, table, entry)


def _trade_section(entries: Sequence[Run]) -> Section:
    held_out = all(entry.record.retained(-1) is not None for entry in entries)
    what = "held out, at the end, %" if held_out else "backward transfer, points"
    series = [
        Series(entry.name, entry.index, [(entry.record.matrix.learning_accuracy or 0.0, y)])
        for entry in entries
        if (y := entry.record.retained(-1) if held_out else entry.record.matrix.backward_transfer) is not None
        and entry.record.matrix.learning_accuracy is not None
    ]
    table = metrics_table(
        {entry.label: entry.record.matrix for entry in entries},
        {entry.label: entry.record.retention for entry in entries},
    )
    caption = "Each method once. Freedom to learn is usually paid for by forgetting; the best corner is top right."
    figures = []
    if series:
        svg = scatter(series, title="Learning against retention", description=caption,
                      x_title="learning accuracy, %", y_title=what)  # fmt: skip
        figures = [Figure(svg, caption, table)]
    return Section("What keeping costs in learning", figures=figures, table=None if figures else table)


def _known(score: float) -> float | None:
    return None if score != score else float(score)


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
