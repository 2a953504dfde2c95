"""Terminal tables that compare methods: score matrices side by side, their metrics, their retention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorica.report.tables import Table, percent, points
from lorica.scores import LABEL_WIDTH, METRICS, ScoreMatrix, shorten

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
