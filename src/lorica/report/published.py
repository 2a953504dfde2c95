"""Figures that others published, beside ours in the shape of their tables, each marked like for like or not."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, TypeAdapter, ValidationError

from lorica.errors import LoricaError
from lorica.report.departures import BENCHMARKS, Protocol, benchmark_file, departures, read_protocol
from lorica.report.parts import Section
from lorica.report.records import RunRecord, Values, _Part
from lorica.report.replicates import Measure, MethodRuns, at_end, held_out_change, transfer
from lorica.report.tables import Table, percent, points
from lorica.units import MISSING, listed

FILE_NAME = "published.json"
GENERAL, AFTER = "general", "trace"
"""The benchmark of general abilities, and the stream after which its published figures were measured."""

CHANGE = "general_ability_change"

MEASURES: dict[str, tuple[str, Measure]] = {
    "average_accuracy": ("at the end", at_end),
    "backward_transfer": ("backward transfer", transfer),
}


class Row(_Part):
    """One published result.

    Attributes:
        like_for_like: whether it was made under the benchmark's own protocol and constraints, as ``caveat`` explains.
        orders: average at the end by order of the tasks; ``tasks``: score at the end by task.
    """

    method: str
    label: str
    model: str
    metrics: Values = Field(default_factory=dict)
    source: str
    caveat: str = ""
    like_for_like: bool = False
    orders: Values = Field(default_factory=dict)
    tasks: Values = Field(default_factory=dict)


def published_rows(stream: str, folder: Path = BENCHMARKS) -> list[Row]:
    """Return the published results of a benchmark; none where it is not one of ours or has no such file.

    Raises:
        LoricaError: the file is not what it should be.
    """
    found = benchmark_file(stream, FILE_NAME, folder)
    if found is None:
        return []
    try:
        return TypeAdapter(list[Row]).validate_python(json.loads(found.read_text(encoding="utf-8")))
    except (ValueError, ValidationError) as error:
        raise LoricaError(f"{found}: not a list of published results: {str(error).splitlines()[0]}") from None


def published_section(methods: Sequence[MethodRuns], folder: Path = BENCHMARKS) -> Section | None:
    """Return our rows and the published ones of the same model, else of the model with most of our methods.

    All other published rows are folded away.
    """
    rows = published_rows(methods[0].record.stream, folder)
    if not rows:
        return None
    orders = list(dict.fromkeys(order for row in rows for order in row.orders))
    protocol = read_protocol(methods[0].record.stream, folder)
    ours = departures(methods, orders, protocol)
    model = _nearest_model(rows, methods)
    near = [_their_row(row, orders, methods, ours) for row in rows if row.model == model]
    far = [_their_row(row, orders, methods, ours) for row in rows if row.model != model]
    header = ["result", *(f"order {order}" for order in orders), *(name for name, _ in MEASURES.values())]
    header += ["like for like", "source"]
    words = (len(header) - 2, len(header) - 1)
    table = Table(header, [*(_our_row(one, orders, ours) for one in methods), *near], words=words)
    details = [(f"{len(far)} results of other models", Table(header, far, words=words))] if far else []
    if any(row.tasks for row in rows):
        details.append(("Task by task", _task_table(methods, rows, ours)))
    return Section("Beside published figures", _intro(ours, protocol), table=table, details=details)


def abilities_beside_section(methods: Sequence[MethodRuns], folder: Path = BENCHMARKS) -> Section | None:
    """Return general abilities beside those that others published after the same kind of stream, every column."""
    rows = published_rows(GENERAL, folder)
    names = list(dict.fromkeys(name for row in rows for name in row.metrics if name != CHANGE))
    held = {name for one in methods for name in one.record.retention}
    if methods[0].record.stream != AFTER or not held & set(names):
        return None
    body = [
        [
            f"ours: {one.label}",
            *(one.told(_after(name)) for name in names),
            one.told(held_out_change, "+"),
            _change_over(one, names),
            "ours",
        ]
        for one in methods
    ]
    body += [
        [row.label, *(percent(row.metrics.get(name)) for name in names), points(row.metrics.get(CHANGE)),
         f"{row.model}; {row.caveat}", row.source]
        for row in rows
    ]  # fmt: skip
    words = (len(names) + 2, len(names) + 3)
    table = Table(["at the end", *names, "mean change", "not like for like", "source"], body, words=words)
    intro = "Scores of different runners are not interchangeable: compare changes alone."
    return Section("General ability beside published figures", intro, table=table)


def _intro(ours: Sequence[str], protocol: Protocol) -> str:
    told = "Like for like: the same model, all tasks and rows, under the benchmark's protocol and constraints."
    if ours:
        told = f"None of our rows is like for like with a published one: {'; '.join(ours)}."
    return f"{told} {protocol.beside}".strip()


def _our_row(one: MethodRuns, orders: Sequence[str], ours: Sequence[str]) -> list[str]:
    by_order = [_of_order(one, order) for order in orders]
    figures = [one.told(measure, "+" if name == "backward_transfer" else "") for name, (_, measure) in MEASURES.items()]
    label = f"ours: {one.label}" + (f", {one.record.model}" if one.record.model else "")
    return [label, *by_order, *figures, _our_verdict(one, ours), "this run"]


def _our_verdict(one: MethodRuns, ours: Sequence[str]) -> str:
    """Return whether our row plays by the benchmark's rules, asked of it as of the published ones."""
    facts = one.record.facts
    needs = ["keeps rows of past tasks"] if facts and facts.needs_old_data else []
    needs += ["is told which task a row belongs to"] if facts and facts.needs_task_id else []
    reasons = [*needs, *(["see above"] if ours else [])]
    return f"no: {'; '.join(reasons)}" if reasons else "yes"


def _their_row(row: Row, orders: Sequence[str], methods: Sequence[MethodRuns], ours: Sequence[str]) -> list[str]:
    by_order = [percent(row.orders.get(order)) for order in orders]
    figures = [percent(row.metrics.get("average_accuracy")), points(row.metrics.get("backward_transfer"))]
    return [f"{row.label}, {row.model}", *by_order, *figures, _their_verdict(row, methods, ours), row.source]


def _their_verdict(row: Row, methods: Sequence[MethodRuns], ours: Sequence[str]) -> str:
    notes = [] if (same := _same_model(row, methods)) else ["another model"]
    if same and row.like_for_like and ours:
        notes.append("ours differs, see above")
    notes += [row.caveat] if row.caveat else []
    if row.like_for_like and same and not ours:
        return ": ".join(["yes", *notes])
    return f"no: {'; '.join(notes or ['another protocol'])}"


def _nearest_model(rows: Sequence[Row], methods: Sequence[MethodRuns]) -> str:
    """Return the model of the published rows that is ours, else the one with the most rows of our methods."""
    same = next((row.model for row in rows if _same_model(row, methods)), None)
    known = {one.record.method for one in methods}
    counts = Counter(row.model for row in rows if row.method in known) or Counter(row.model for row in rows)
    return same or counts.most_common(1)[0][0]


def _task_table(methods: Sequence[MethodRuns], rows: Sequence[Row], ours: Sequence[str]) -> Table:
    tasks = methods[0].record.tasks
    body = [
        [f"ours: {one.label}", *(one.told(_score(task)) for task in tasks), _our_verdict(one, ours)] for one in methods
    ]
    body += [
        [f"{row.label}, {row.model}", *(percent(row.tasks.get(task)) for task in tasks),
         _their_verdict(row, methods, ours)]
        for row in rows
        if row.tasks
    ]  # fmt: skip
    return Table(["at the end, percent", *tasks, "like for like"], body, words=(len(tasks) + 1,))


def _of_order(one: MethodRuns, order: str) -> str:
    cells = tuple(one.of_order(order))
    return MethodRuns(one.label, one.name, one.index, cells).told(at_end) if cells else MISSING


def _same_model(row: Row, methods: Sequence[MethodRuns]) -> bool:
    return _plain(row.model) == _plain(methods[0].record.model or "")


def _plain(model: str) -> str:
    """Return a model's name without what its copies write differently: case, dashes, a final ``hf``."""
    return re.sub(r"[^a-z0-9.]", "", model.lower()).removesuffix("hf")


def _change_over(one: MethodRuns, names: Sequence[str]) -> str:
    """Return over which abilities our mean change is, where they are not those of the published ones."""
    held = list(one.record.retention)
    return MISSING if set(held) == set(names) else f"mean change over {listed(held)} alone"


def _after(name: str) -> Measure:
    return lambda cell: (cell.retention.get(name) or [None])[-1]


def _score(task: str) -> Measure:
    def score(cell: RunRecord) -> float | None:
        value = float(cell.matrix.scores[-1, cell.tasks.index(task)])
        return None if value != value else value

    return score
