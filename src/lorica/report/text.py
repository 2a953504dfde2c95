"""Terminal tables that compare methods: score matrices side by side, their metrics, their retention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorica.report.reading import read_record
from lorica.report.records import RunRecord
from lorica.report.replicates import (
    MethodRuns,
    at_end,
    forgetting,
    held_out_change,
    learned,
    replicates,
    transfer,
)
from lorica.report.tables import Table, percent, points
from lorica.scores import LABEL_WIDTH, METRICS, ScoreMatrix, shorten
from lorica.units import MISSING, listed, scientific, size

Series = Sequence[float | None]
Retention = Mapping[str, Mapping[str, Series]]

SIGNED = ("backward_transfer", "forward_transfer")
_GAP = "  "


def side_by_side(matrices: Mapping[str, ScoreMatrix], retention: Retention | None = None, *, width: int = 100) -> str:
    """Return the score matrices of several methods next to each other.

    Columns are tasks, rows the stages of training; ``*`` marks the score right after learning a task.
    Methods that do not fit into ``width`` go below. Two methods and five tasks fit into 100 columns.

    Args:
        matrices: label to matrix, all of one stream.
        retention: label to held-out ability to its T + 1 scores (None = not measured); printed below with
            the stages as columns.
        width: columns of the terminal.
    """
    if not matrices:
        return ""
    rows = [matrix.table(labels=False).splitlines()[0] for matrix in matrices.values()]
    block = max(LABEL_WIDTH, *map(len, rows))
    fitting = max(1, (width - LABEL_WIDTH + len(_GAP)) // (block + len(_GAP)))
    labels = list(matrices)
    bands = [
        _band({label: matrices[label] for label in labels[start : start + fitting]}, block)
        for start in range(0, len(labels), fitting)
    ]
    if retention and any(retention.values()):
        bands.append(retention_table(retention).text(widest=32))
    return "\n\n".join(bands)


def summary_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the table that ends ``lorica run``: one line per method, and how to read it.

    Args:
        records: the runs, as ``run.json`` holds them; orders and seeds of one method become one line.

    Raises:
        LoricaError: a record has a missing or wrong field.
    """
    runs = [record for record in map(read_record, records) if isinstance(record, RunRecord)]
    if not runs:
        return ""
    methods = replicates(runs)
    return f"{summary_table(methods).text(widest=32)}\n\n{averaged_over(methods)}"


def summary_table(methods: Sequence[MethodRuns]) -> Table:
    """Return what each method learned and kept, and what it takes to use it; what no run tells is left out."""
    columns = {
        "learned": [one.told(learned) for one in methods],
        "at the end": [one.told(at_end) for one in methods],
        "backward transfer": [one.told(transfer, "+") for one in methods],
        "forgetting": [one.told(forgetting) for one in methods],
        "held out, change": [one.told(held_out_change, "+") for one in methods],
        "learning rate": [rates(one) for one in methods],
        "carried": [size(one.carried) for one in methods],
        "old data": [_needed(one, "needs_old_data") for one in methods],
        "task id": [_needed(one, "needs_task_id") for one in methods],
        "runs": [str(len(one.cells)) for one in methods],
    }
    known = {name: cells for name, cells in columns.items() if set(cells) != {MISSING}}
    rows = [[one.label, *(cells[i] for cells in known.values())] for i, one in enumerate(methods)]
    return Table(["method", *known], rows)


def averaged_over(methods: Sequence[MethodRuns]) -> str:
    """Return what the figures of a comparison are means of, for the line below its table."""
    seeds, orders = _range([len(one.seeds) for one in methods]), _range([len(one.orders) for one in methods])
    spread = "" if seeds == "1" else f", mean ± standard deviation over {seeds} seeds"
    inside = "" if orders == "1" else f", each seed the mean of {orders} orders of the tasks"
    return f"Percent and points{spread}{inside}."


def rates(runs: MethodRuns) -> str:
    """Return the learning rates of a method's runs."""
    return listed([scientific(rate) for rate in runs.learning_rates]) or MISSING


def metrics_table(matrices: Mapping[str, ScoreMatrix], retention: Retention | None = None) -> Table:
    """Return the five metrics of every method, and what is left of each held-out ability.

    Metrics and abilities that no method has are left out.
    """
    retention = retention or {}
    abilities = list(dict.fromkeys(name for series in retention.values() for name in series))
    values = {label: matrix.metrics() for label, matrix in matrices.items()}
    names = [name for name in METRICS if any(metrics[name] is not None for metrics in values.values())]
    rows = []
    for label, metrics in values.items():
        cells = [points(metrics[name]) if name in SIGNED else percent(metrics[name]) for name in names]
        kept = [retention.get(label, {}).get(ability, [None]) for ability in abilities]
        rows.append([label, *cells, *(f"{percent(series[0])} to {percent(series[-1])}" for series in kept)])
    return Table(["method", *(name.replace("_", " ") for name in names), *abilities], rows)


def retention_table(retention: Retention) -> Table:
    """Return every held-out ability before training and after each task, one row per ability and method."""
    stages = max(len(values) for series in retention.values() for values in series.values())
    rows = [
        [ability, label, *map(percent, values)]
        for ability in dict.fromkeys(name for series in retention.values() for name in series)
        for label, series in retention.items()
        if (values := series.get(ability))
    ]
    return Table(["held-out, percent", "method", *map(str, range(stages))], rows, left=2)


def _band(matrices: Mapping[str, ScoreMatrix], block: int) -> str:
    first = next(iter(matrices.values()))
    names = [" " * LABEL_WIDTH, *(line[:LABEL_WIDTH] for line in first.table().splitlines())]
    blocks = [[shorten(label, block), *m.table(labels=False).splitlines()] for label, m in matrices.items()]
    return "\n".join(
        (name + _GAP.join(part.ljust(block) for part in parts)).rstrip()
        for name, *parts in zip(names, *blocks, strict=True)
    )


def _needed(runs: MethodRuns, fact: str) -> str:
    facts = runs.record.facts
    return MISSING if facts is None else "needed" if getattr(facts, fact) else "no"


def _range(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return str(most) if least == most else f"{least} to {most}"
