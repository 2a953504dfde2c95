"""What limits the figures of a comparison; every output says so."""

from __future__ import annotations

from collections.abc import Sequence

from lorica.report.ledger import file_notices, lost_rows
from lorica.report.records import RunRecord
from lorica.report.replicates import MethodRuns
from lorica.units import listed

ENOUGH = 3
"""So many seeds and no fewer say how much another training run would differ."""

SHOWN = 12
"""Of more files with rows that were cut or left out, the rest is only counted."""

LIMITS = {
    "max_train_rows": "at most {} training rows of each task",
    "max_test_rows": "at most {} scored rows of each task",
    "max_new_tokens": "answers of at most {} tokens, over what the tasks say",
    "max_length": "rows of at most {} tokens, over what the stream says",
}


def notices(methods: Sequence[MethodRuns]) -> list[str]:
    """Return a sentence for each: a subset, limits, few seeds, unequal runs, the grid's edge, rows that were cut."""
    of_runs = [*_runs(methods), *_steps(methods), *_unswept(methods), *_edges(methods)]
    return [*_subset(methods), *_limits(methods), *of_runs, *_rows(methods)]


def limits_told(methods: Sequence[MethodRuns]) -> list[str]:
    """Return the limits under which the runs were made."""
    limits = {(name, value) for one in methods for cell in one.cells for name, value in cell.limits().items()}
    return [LIMITS[name].format(value) for name, value in sorted(limits, key=str)]


def left_out(methods: Sequence[MethodRuns]) -> list[str]:
    """Return the tasks of the stream that the runs left out."""
    return list(dict.fromkeys(task for one in methods for cell in one.cells for task in cell.left_out))


def _subset(methods: Sequence[MethodRuns]) -> list[str]:
    names = left_out(methods)
    return [f"A subset of the stream; left out: {listed(names)}."] if names else []


def _limits(methods: Sequence[MethodRuns]) -> list[str]:
    return [f"{told[0].upper()}{told[1:]}." for told in limits_told(methods)]


def _runs(methods: Sequence[MethodRuns]) -> list[str]:
    fewest, told = min(len(one.seeds) for one in methods), []
    if fewest < ENOUGH:
        seeds = "One seed" if fewest == 1 else f"{fewest} seeds"
        told.append(f"{seeds}: too few to say how much another training run would differ; {ENOUGH} would.")
    for what in ("orders", "seeds"):
        ran = {one.label: [str(value) for value in getattr(one, what)] for one in methods}
        if len({frozenset(values) for values in ran.values()}) > 1:
            each = "; ".join(f"{label}: {', '.join(values)}" for label, values in ran.items())
            told.append(f"Not every method ran the same {what}. {each}.")
    for one in methods:
        unused = len({cell.seed for cell in one.cells}) - len(one.seeds)
        if unused:
            told.append(f"{one.label}: {unused} of its seeds did not run in every order and do not count.")
        elif len(one.cells) < len(one.orders) * len(one.seeds):
            told.append(f"{one.label}: no seed ran in every order; its spread over seeds is also one over orders.")
    return told


def _steps(methods: Sequence[MethodRuns]) -> list[str]:
    """Return a notice where methods took different numbers of steps for the same order."""
    steps: dict[str | None, dict[str, int]] = {}
    for one in methods:
        for cell in one.cells:
            if cell.cost.steps is not None:
                steps.setdefault(cell.order, {})[one.label] = cell.cost.steps
    unequal = [found for found in steps.values() if len(set(found.values())) > 1]
    each = "; ".join(f"{label}: {count}" for label, count in unequal[0].items()) if unequal else ""
    return [f"Not every method took the same number of training steps. {each}."] if unequal else []


def _unswept(methods: Sequence[MethodRuns]) -> list[str]:
    without = [one.label for one in methods if not any(cell.sweep or _rate_was_set(cell) for cell in one.cells)]
    if len(methods) < 2 or not without:
        return []
    whose = "any method" if len(without) == len(methods) else listed(without)
    return [f"These runs chose no learning rate for {whose}; a difference may be one of rates, not of methods."]


def _rate_was_set(cell: RunRecord) -> bool:
    """Tell whether the method's settings bring a rate of their own, chosen before these runs."""
    settings = cell.config.get("settings")
    return isinstance(settings, dict) and settings.get("learning_rate") == cell.learning_rate is not None


def _edges(methods: Sequence[MethodRuns]) -> list[str]:
    labels = [one.label for one in methods if any(cell.sweep and cell.sweep.at_edge_of_grid for cell in one.cells)]
    if not labels:
        return []
    return [f"Learning rate at the edge of the grid, so that a better one may lie outside: {listed(labels)}."]


def _rows(methods: Sequence[MethodRuns]) -> list[str]:
    cells = [cell for one in methods for cell in one.cells]
    lost = lost_rows(cells)
    more = f"; and {len(lost) - SHOWN} more files" if len(lost) > SHOWN else ""
    told = [f"Rows cut or left out: {'; '.join(lost[:SHOWN])}{more}."] if lost else []
    return told + file_notices(cells)
