"""What stands behind the scores: what each method keeps, how its learning rate was chosen, rows, costs, settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from lorica.report.parts import Section, cost_section, flat, flattened, leakage_section
from lorica.report.records import Candidate, RunRecord, Sweep
from lorica.report.replicates import MethodRuns
from lorica.report.tables import Table, percent
from lorica.report.text import rates
from lorica.units import MISSING, count, listed, scientific, size

COUNTED = ("rejected", "left_out", "duplicates", "shortened", "truncated", "dropped")
"""Fields of a file's account that say what became of rows that were not used as they are."""


def methods_section(methods: Sequence[MethodRuns]) -> Section | None:
    """Return what each method carries from task to task, in words and bytes, and what it cannot do without."""
    if not any(one.record.facts or one.carried is not None for one in methods):
        return None
    rows = [[one.label, *_method_cells(one)] for one in methods]
    intro = (
        "What a method carries from one task to the next, as measured: bytes after the first task and after the last. "
        "A method that needs old data or is told which task a row belongs to plays by other rules than one that does "
        "not."
    )
    header = ["method", "carries", "after the first task", "after the last", "old data", "task id"]
    return Section("The methods", intro, table=Table(header, rows, left=2))


def sweep_section(methods: Sequence[MethodRuns]) -> Section | None:
    """Return each method's grid of learning rates with what it was chosen by, on rows cut from train."""
    sweeps = {one.label: one.record.sweep for one in methods if one.record.sweep is not None}
    if not sweeps:
        return None
    tried = sorted({float(rate) for sweep in sweeps.values() for rate in sweep.validation})
    rows = [[label, *(_tried(sweep, rate) for rate in tried), *_chosen(sweep)] for label, sweep in sweeps.items()]
    chosen_by = listed(sorted({sweep.selected_by.replace("_", " ") for sweep in sweeps.values()}))
    edges = [label for label, sweep in sweeps.items() if sweep.at_edge_of_grid]
    intro = (
        f"The same grid for every method, on rows cut from the training rows, first order and seed: {chosen_by}, "
        "percent; * marks the chosen rate."
    )
    if edges:
        intro += f" At the edge of the grid, so that a better rate may lie outside: {listed(edges)}."
    table = Table(["method", *map(scientific, tried), "chosen", "edge of grid"], rows)
    return Section("How the learning rates were chosen", intro, table=table, details=[_sweep_details(sweeps)])


def rows_section(methods: Sequence[MethodRuns]) -> Section | None:
    """Return how many rows were trained on and scored, of which file, and what became of the others."""
    data = methods[0].record.data
    rows = []
    for name, parts in data.items():
        for part, told in parts.items() if isinstance(parts, dict) else ():
            if isinstance(told, dict):
                sha = str(told.get("sha256") or MISSING)[:12]
                used = told.get("kept", told.get("rows"))
                rows.append([name, part, MISSING if used is None else str(used), _lost_rows(told) or "none", sha])
    if not rows:
        return None
    return Section("The rows", table=Table(["task", "part", "rows", "cut or left out", "sha256"], rows, left=2))


def lost_rows(cells: Iterable[RunRecord]) -> list[str]:
    """Return, for every file of which rows were cut, left out or rejected, how many; each once."""
    told: dict[str, None] = {}
    for cell in cells:
        for name, parts in cell.data.items():
            for part, counts in parts.items() if isinstance(parts, dict) else ():
                if isinstance(counts, dict) and (lost := _lost_rows(counts)):
                    told[f"{name}, {part}: {lost}"] = None
    return list(told)


def file_notices(cells: Iterable[RunRecord]) -> list[str]:
    """Return what the readers said of the files, each once."""
    files = [
        counts
        for cell in cells
        for parts in cell.data.values()
        if isinstance(parts, dict)
        for counts in parts.values()
        if isinstance(counts, dict)
    ]
    notices = [notice for counts in files for notice in counts.get("notices") or []]
    return list(dict.fromkeys(map(str, notices)))


def costs_section(methods: Sequence[MethodRuns]) -> Section | None:
    """Return time, memory and trained parameters, the mean of each method's runs; of memory the most."""
    section = cost_section([one.entry() for one in methods])
    if section is None or all(len(one.cells) == 1 for one in methods):
        return section
    return replace(section, intro="Means over the runs of a method; of memory the most. Time includes scoring.")


def leaks_section(methods: Sequence[MethodRuns]) -> Section | None:
    """Return the leakage of each method's first run, and the largest of any task, order and seed of all its runs."""
    section = leakage_section([one.entry() for one in methods])
    worst = [[one.label, scientific(found)] for one in methods if (found := _worst(one)) is not None]
    if not worst:
        return section
    table = Table(["largest leakage of any task and run", "share of a weight's change"], worst)
    return replace(section, table=table) if section else Section("Did the protection hold", table=table)


def settings_section(methods: Sequence[MethodRuns]) -> Section | None:
    """Return commands, seeds, options and versions: what it takes to get these numbers again."""
    settings = {
        "model": [_each(cell.model for cell in one.cells) for one in methods],
        "model parameters": [count(one.record.model_parameters) for one in methods],
        "stream version": [_each(cell.stream_version for cell in one.cells) for one in methods],
        "orders": [_each(one.orders) for one in methods],
        "seeds": [_each(one.seeds) for one in methods],
        "learning rate": [rates(one) for one in methods],
        "options": [_option(one, "settings", "options") for one in methods],
        "training": [_option(one, "training") for one in methods],
        "its own training": [_option(one, "settings", "training") for one in methods],
        "limits": [flat(one.record.limits()) for one in methods],
        "git revision": [_each(cell.git_revision for cell in one.cells) for one in methods],
        "versions": [_each(flat(cell.versions) for cell in one.cells) for one in methods],
        "hardware": [_each(flat(cell.hardware) for cell in one.cells) for one in methods],
    }
    rows = [[name, _agreed(cells, methods)] for name, cells in settings.items() if set(cells) != {MISSING}]
    commands = dict.fromkeys(cell.command for one in methods for cell in one.cells if cell.command)
    if not rows and not commands:
        return None
    code = [("", command) for command in commands]
    return Section("How to run it again", table=Table(["setting", "value"], rows, left=2), code=code)


def _method_cells(one: MethodRuns) -> list[str]:
    facts = one.record.facts
    first = max((cell.carried_bytes[0] for cell in one.cells if cell.carried_bytes), default=None)
    last = max((cell.carried_bytes[-1] for cell in one.cells if cell.carried_bytes), default=None)
    if facts is None:
        return [MISSING, size(first), size(last), MISSING, MISSING]
    needs = ["needed" if needed else "no" for needed in (facts.needs_old_data, facts.needs_task_id)]
    return [facts.stores or MISSING, size(first), size(last), *needs]


def _tried(sweep: Sweep, rate: float) -> str:
    found = _candidate(sweep, rate)
    if found is None:
        return MISSING
    return percent(getattr(found, sweep.selected_by, None)) + (" *" if rate == sweep.selected else "")


def _candidate(sweep: Sweep, rate: float) -> Candidate | None:
    return next((found for text, found in sweep.validation.items() if float(text) == rate), None)


def _chosen(sweep: Sweep) -> list[str]:
    return [scientific(sweep.selected), "yes" if sweep.at_edge_of_grid else "no"]


def _sweep_details(sweeps: dict[str, Sweep]) -> tuple[str, Table]:
    rows = [
        [label, scientific(float(rate)), percent(one.learning_accuracy), percent(one.average_accuracy),
         ", ".join(f"{name} {percent(kept[0])} to {percent(kept[-1])}" for name, kept in one.retention.items() if kept)]
        for label, sweep in sweeps.items()
        for rate, one in sorted(sweep.validation.items(), key=lambda pair: float(pair[0]))
    ]  # fmt: skip
    header = ["method", "learning rate", "learned", "at the end", "held out, before and at the end"]
    return "Every rate with all its figures", Table(header, rows)


def _lost_rows(told: dict[str, Any]) -> str:
    return ", ".join(f"{told[name]} {name.replace('_', ' ')}" for name in COUNTED if told.get(name))


def _worst(one: MethodRuns) -> float | None:
    return max((leak for cell in one.cells for leak in cell.worst_leakage if leak is not None), default=None)


def _option(one: MethodRuns, *path: str) -> str:
    return _each(_inner(cell.config, path) for cell in one.cells)


def _inner(config: dict[str, Any], path: Sequence[str]) -> str:
    value: Any = config
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return ", ".join(f"{name} {text}" for name, text in flattened(value)) if isinstance(value, dict) else ""


def _each(values: Iterable[object]) -> str:
    """Return the different values, each once."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value not in (None, ""))) or MISSING


def _agreed(cells: Sequence[str], methods: Sequence[MethodRuns]) -> str:
    if len(set(cells)) == 1:
        return cells[0]
    return "; ".join(f"{one.name}: {cell}" for one, cell in zip(methods, cells, strict=True) if cell != MISSING)
