"""The part of a report that shows a model's updates in order: what each learned, what is left of those before."""

from __future__ import annotations

import math

from lorica.report.chain import SCORE, Chain, retained, stem
from lorica.report.charts import Series, heat_map, line_chart
from lorica.report.curves import matrix_table
from lorica.report.foreseen import Foreseen, foreseen_section
from lorica.report.parts import (
    Entry,
    Figure,
    Part,
    Section,
    cost_section,
    leak_of,
    leakage_section,
    plan_section,
    rerun_section,
)
from lorica.report.records import TrainRecord
from lorica.report.tables import Table, percent, points
from lorica.units import MISSING, listed, scientific, size


def chain_part(chain: Chain) -> Part:
    """Return a model's updates in order: what each learned, and what is left of the ones before."""
    entries = [
        Entry(record, f"{place} {name}", f"{place} {name}", place - 1)
        for place, (record, name) in enumerate(zip(chain.updates, chain.names, strict=True), 1)
    ]
    sections = [
        _updates_section(chain),
        _matrix_section(chain),
        _held_out_section(chain),
        plan_section(entries[-1:]),
        leakage_section(entries[-1:]),
        foreseen_section([Foreseen(one, "", found) for one in entries if (found := one.record.predicted_forgetting)]),
        cost_section(entries),
        rerun_section(entries),
    ]
    first = chain.updates[0]
    many = f"{len(chain.updates)} update{'' if len(chain.updates) == 1 else 's'}"
    title = f"{first.parent.model or first.model or 'A model'}: {many} in order"
    lead = "Each update starts from the weights that the one before it wrote, as their hashes show."
    return Part(title, lead, sections=sections, answers=_answers(chain), notices=_notices(chain))


def _answers(chain: Chain) -> list[tuple[str, str]]:
    matrix, told = chain.matrix, []
    if matrix.learning_accuracy is not None:
        told.append(("What was learned?", f"New data, right after its update: {percent(matrix.learning_accuracy)} %."))
    lost = []
    if matrix.backward_transfer is not None:
        lost.append(f"Earlier updates' data by the end: {points(matrix.backward_transfer)} points.")
    for name, series in chain.held_out.items():
        if series[0] is not None and series[-1] is not None:
            lost.append(f"Held out, {name}: from {series[0]:.1f} to {series[-1]:.1f} %.")
    if lost:
        told.append(("What was lost?", " ".join(lost)))
    return told


def _notices(chain: Chain) -> list[str]:
    found = []
    before = chain.updates[0].parent.updates
    if before:
        found.append(f"{before} earlier update{'' if before == 1 else 's'} of this model are not among the records.")
    matrix = chain.matrix
    unknown = [
        f"{name} after update {stage}"
        for j, name in enumerate(matrix.tasks, 1)
        for stage in range(j + 1, len(matrix.tasks) + 1)
        if math.isnan(matrix.scores[stage, j - 1])
    ]
    if unknown:
        found.append(
            f"Not measured: {listed(unknown)}. Give the evaluation files of earlier updates to later ones as "
            "--retention_file to see what is left of them."
        )
    for place, record in chain.rejected:
        points_lost = listed([f"{name} {lost:.1f} points" for name, lost in record.rejected.items()])
        found.append(f"Rejected and set aside, after update {place}: {stem(record)} lost {points_lost}.")
    for place, record in enumerate(chain.updates, 1):
        if record.rejected:
            found.append(f"Update {place} was rejected for what it lost; later ones went on from it all the same.")
    return found


def _updates_section(chain: Chain) -> Section:
    tried = [(place, str(place), record) for place, record in enumerate(chain.updates, 1)]
    tried += [(place, f"after {place}, rejected", record) for place, record in chain.rejected]
    rows = [_update_row(name, record) for _, name, record in sorted(tried, key=lambda one: one[0])]
    header = ["update", "trained on", "method", "learning rate", "new data before", "after",
              "held out, worst change", "largest leakage", "carried on"]  # fmt: skip
    return Section("The updates", table=Table(header, rows, left=3))


def _update_row(place: str, record: TrainRecord) -> list[str]:
    before, after = record.scores.before.eval.get(SCORE), record.scores.after.eval.get(SCORE)
    leak = max(map(leak_of, record.leakage)) if record.leakage else None
    return [
        f"{place} (rejected)" if record.rejected and "rejected" not in place else place,
        stem(record), record.title, scientific(record.learning_rate), percent(before),
        percent(after), points(_worst_change(record)), scientific(leak), size(record.carried_bytes),
    ]  # fmt: skip


def _worst_change(record: TrainRecord) -> float | None:
    before, after = retained(record.scores.before), retained(record.scores.after)
    changes = [after[name] - before[name] for name in before if name in after]
    return min(changes, default=None)


def _matrix_section(chain: Chain) -> Section | None:
    matrix = chain.matrix
    if all(math.isnan(score) for row in matrix.scores for score in row):
        return None
    facts = [("learned", percent(matrix.learning_accuracy)), ("end", percent(matrix.average_accuracy)),
             ("backward transfer", points(matrix.backward_transfer))]  # fmt: skip
    caption = ", ".join(f"{name} {value}" for name, value in facts if value != MISSING) or "Exact match, percent."
    intro = (
        "Rows are updates, columns the evaluation file of each; exact match, percent. A later update tells of an "
        "earlier one only if it was given that one's file; what no update measured stays empty."
    )
    svg = heat_map(matrix, title="Score matrix of the updates", description=caption)
    return Section("Every score after every update", intro, [Figure(svg, caption, matrix_table(matrix))])


def _held_out_section(chain: Chain) -> Section | None:
    if not chain.held_out:
        return None
    series = [
        Series(name, index, list(enumerate(values))) for index, (name, values) in enumerate(chain.held_out.items())
    ]
    caption = "Kept: files that every update scored and none was about. A line that stays level forgets nothing."
    rows = [[name, *map(percent, values)] for name, values in chain.held_out.items()]
    table = Table(["held out, percent", *map(str, range(len(chain.updates) + 1))], rows)
    svg = line_chart(series, title="Held out over the updates", description=caption, y_title="exact match, %",
                     x_title="updates (0 = before)")  # fmt: skip
    return Section("What is held out", figures=[Figure(svg, caption, table)])
