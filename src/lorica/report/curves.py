"""What is kept and learned from stage to stage, as curves; and the score matrices behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lorica.report.charts import Series, heat_map, line_chart
from lorica.report.parts import Figure, Section
from lorica.report.records import RunRecord
from lorica.report.replicates import Estimate, MethodRuns, at_end, learned, transfer
from lorica.report.tables import Table, percent
from lorica.scores import ScoreMatrix
from lorica.units import MISSING

Values = Callable[[RunRecord], Sequence[float | None]]

_MATRIX_INTRO = (
    "Rows are stages of training, columns the task that is scored; percent. The outlined diagonal is the score "
    "right after learning a task. Below it is what remains; above it are tasks not yet learned."
)


def curves_section(methods: Sequence[MethodRuns]) -> Section | None:
    """Return held-out abilities, new tasks, and the average over the tasks so far, each along the stream."""
    abilities = dict.fromkeys(name for one in methods for cell in one.cells for name in cell.retention)
    figures = [_retention_figure(methods, ability) for ability in abilities]
    figures += [
        _curve_figure(
            methods, lambda cell: [_known(score) for score in cell.matrix.diagonal], 1, "Learned",
            "the score on each new task right after learning it. Higher is better.",
            "new task, %", "task, in the order of the stream",
        ),
        _curve_figure(
            methods, so_far, 1, "Accuracy so far",
            "after each task, the average over the tasks learned until then.",
            "tasks so far, %", "tasks learned",
        ),
    ]  # fmt: skip
    known = [figure for figure in figures if figure]
    return Section("Learning and keeping", _order_told(methods), known) if known else None


def fading_section(methods: Sequence[MethodRuns]) -> Section | None:
    """Return, per method, the score of each task from when it was learned; the curves that fall are forgetting."""
    scores = [float(x) for one in methods for x in one.mean_matrix(one.orders[0]).scores[1:].ravel()]
    known = [score for score in scores if score == score]
    figures = [figure for one in methods if (figure := _fading_figure(one, known))]
    if not figures or len(methods[0].record.tasks) < 2:
        return None
    intro = (
        "The score of every task from the stage it was learned at. A line that falls is forgetting. Here the colours "
        f"stand for tasks.{_first_order(methods)}"
    )
    return Section("How each task fades", intro, figures)


def matrix_section(methods: Sequence[MethodRuns]) -> Section:
    """Return every score after every task, one matrix per method."""
    figures = [_matrix_figure(one) for one in methods]
    return Section("Every score after every task", _MATRIX_INTRO + _first_order(methods), figures)


def so_far(cell: RunRecord) -> list[float | None]:
    """Return, after each task i, the mean of R[i][j] over j = 1..i; None where one was not measured."""
    scores = cell.matrix.scores
    return [_known(float(scores[i, :i].mean())) for i in range(1, len(cell.tasks) + 1)]


def matrix_table(matrix: ScoreMatrix) -> Table:
    """Return a score matrix as a table."""
    rows = [
        [stage, *(percent(float(x)) for x in row)] for stage, row in zip(matrix.stages(), matrix.scores, strict=True)
    ]
    return Table(["after", *(f"{j} {task}" for j, task in enumerate(matrix.tasks, 1))], rows)


def _retention_figure(methods: Sequence[MethodRuns], ability: str) -> Figure | None:
    starts = [cell.retention[ability][0] for one in methods for cell in one.cells if ability in cell.retention]
    return _curve_figure(
        methods, lambda cell: cell.retention.get(ability, []), 0, "Kept",
        f"{ability}, never trained on in the stream. A line that stays level forgets nothing.",
        f"{ability}, %", "tasks learned (0 = before training)",
        reference=None if not starts or starts[0] is None else (starts[0], "before training"),
    )  # fmt: skip


def _curve_figure(
    methods: Sequence[MethodRuns],
    values: Values,
    first: int,
    title: str,
    what: str,
    y_title: str,
    x_title: str,
    reference: tuple[float, str] | None = None,
) -> Figure | None:
    curves = [one.curve(values) for one in methods]
    series = [_series(one, curve, first) for one, curve in zip(methods, curves, strict=True)]
    if not any(line.measured() for line in series):
        return None
    spread = " Thin bars: one standard deviation over seeds." if any(line.spread for line in series) else ""
    caption = f"{title}: {what}{spread}"
    stages = range(first, first + max(map(len, curves)))
    rows = [
        [one.label, *(MISSING if found is None else found.told() for found in curve)]
        for one, curve in zip(methods, curves, strict=True)
        if curve
    ]
    svg = line_chart(
        series, title=title, description=caption, y_title=y_title, x_title=x_title, reference=reference
    )  # fmt: skip
    return Figure(svg, caption, Table(["percent, after task", *map(str, stages)], rows))


def _series(one: MethodRuns, curve: Sequence[Estimate | None], first: int) -> Series:
    points = [(place, None if found is None else found.mean) for place, found in enumerate(curve, first)]
    spread = [
        (place, max(0.0, found.mean - found.sd), min(100.0, found.mean + found.sd))
        for place, found in enumerate(curve, first)
        if found is not None and found.sd is not None
    ]
    return Series(one.name, one.index, points, spread)


def _fading_figure(one: MethodRuns, axis: Sequence[float]) -> Figure | None:
    matrix = one.mean_matrix(one.orders[0])
    series = [
        Series(
            f"{j} {task}", j - 1, [(i, _known(float(matrix.scores[i, j - 1]))) for i in range(j, len(matrix.tasks) + 1)]
        )
        for j, task in enumerate(matrix.tasks, 1)
    ]
    if not any(len(line.measured()) > 1 for line in series):
        return None
    lost = one.told(transfer, "+")
    caption = f"Backward transfer {lost} points." if lost != MISSING else "Not every score was measured."
    rows = [[line.name, *_from(line, len(matrix.tasks))] for line in series]
    table = Table(["score after task", *map(str, range(1, len(matrix.tasks) + 1))], rows)
    svg = line_chart(
        series, title=f"{one.label}: each task over the stream", description=caption, y_title="score, %",
        x_title="tasks learned", also=axis,
    )  # fmt: skip
    return Figure(svg, caption, table, heading=one.label)


def _from(line: Series, stages: int) -> list[str]:
    known = dict(line.points)
    return [percent(known.get(stage)) for stage in range(1, stages + 1)]


def _matrix_figure(one: MethodRuns) -> Figure:
    matrix = one.mean_matrix(one.orders[0])
    facts = [("learned", one.told(learned)), ("end", one.told(at_end)), ("backward transfer", one.told(transfer, "+"))]
    caption = ", ".join(f"{name} {value}" for name, value in facts if value != MISSING)
    if len(one.of_order(one.orders[0])) > 1:
        caption += f"{'; ' if caption else ''}cells are means over {len(one.of_order(one.orders[0]))} seeds"
    svg = heat_map(matrix, title=f"{one.label}: score matrix", description=caption)
    details = [_runs_table(one, order) for order in one.orders] if len(one.cells) > 1 else []
    return Figure(svg, caption, matrix_table(matrix), one.entry(), details)


def _runs_table(one: MethodRuns, order: str | None) -> tuple[str, Table]:
    """Return the score matrices of all seeds of one order below each other."""
    tables = [(cell, matrix_table(cell.matrix)) for cell in one.of_order(order)]
    rows = [
        [f"seed {MISSING if cell.seed is None else cell.seed}", *row] for cell, table in tables for row in table.rows
    ]
    what = "Each seed" if order is None else f"Each seed, order {order}"
    return what, Table(["run", *tables[0][1].header], rows, left=2)


def _order_told(methods: Sequence[MethodRuns]) -> str:
    """Return the tasks in the order they were learned, for each order."""
    orders = {cell.order: cell.tasks for one in methods for cell in one.cells}
    told = {
        order: "; ".join(f"{j} {task}" for j, task in enumerate(tasks, 1)) for order, tasks in orders.items()
    }  # fmt: skip
    if len(told) == 1:
        return f"The tasks, in the order they were learned: {next(iter(told.values()))}."
    each = " ".join(f"Order {order}: {tasks}." for order, tasks in told.items())
    return f"At each place of the stream, the mean over the orders. {each}"


def _first_order(methods: Sequence[MethodRuns]) -> str:
    orders = list(dict.fromkeys(order for one in methods for order in one.orders))
    return f" Of several orders the first one that a method ran, {orders[0]}, is drawn." if len(orders) > 1 else ""


def _known(score: float) -> float | None:
    return None if score != score else float(score)
