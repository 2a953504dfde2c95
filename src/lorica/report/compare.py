"""The part of a report that compares methods on one stream of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lorica.report.abilities import abilities_section
from lorica.report.answers import answers
from lorica.report.curves import curves_section, fading_section, matrix_section
from lorica.report.foreseen import Foreseen, foreseen_section
from lorica.report.ledger import (
    costs_section,
    leaks_section,
    methods_section,
    rows_section,
    settings_section,
    sweep_section,
)
from lorica.report.notices import notices
from lorica.report.parts import Card, Fact, Part, plan_section
from lorica.report.published import abilities_beside_section, published_section
from lorica.report.records import RunRecord
from lorica.report.replicates import MethodRuns, at_end, held_out, learned, replicates, transfer
from lorica.report.spectra import spectra_section
from lorica.report.standings import (
    chance_section,
    references,
    standings_section,
    tasks_section,
)
from lorica.report.tables import percent
from lorica.report.tradeoff import trade_section
from lorica.units import MISSING

CARDS = 4
"""More methods than this are told apart in a table, not on cards."""


def comparisons(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Return the runs that may be compared with each other: the same tasks and version of a stream, scored rows and
    model.

    An order of the tasks is known by its name. Where one name, or none, stands for several orders, the runs are kept
    apart as well: their matrices must not be averaged.
    """
    groups: dict[tuple[object, ...], list[RunRecord]] = {}
    named: dict[tuple[object, ...], list[list[str]]] = {}
    for record in records:
        limits = str(sorted(record.limits().items()))
        tested = frozenset((name, _digest(parts)) for name, parts in record.data.items())
        key = (record.stream, record.stream_version, frozenset(record.tasks), record.model, limits, tested)
        variants = named.setdefault((*key, record.order), [])
        if record.tasks not in variants:
            variants.append(record.tasks)
        groups.setdefault((*key, variants.index(record.tasks)), []).append(record)
    return list(groups.values())


def _digest(parts: object) -> object:
    test = parts.get("test") if isinstance(parts, dict) else None
    return test.get("sha256") if isinstance(test, dict) else None


def compare_part(runs: Sequence[RunRecord]) -> Part:
    """Return the whole comparison of runs that share a stream, its tasks and a model."""
    methods = ranked(replicates(runs))
    found = references(methods)
    sections = [
        standings_section(methods),
        chance_section(methods, found),
        curves_section(methods),
        trade_section(methods),
        tasks_section(methods),
        abilities_section(methods),
        published_section(methods),
        abilities_beside_section(methods),
        matrix_section(methods),
        fading_section(methods),
        methods_section(methods),
        sweep_section(methods),
        plan_section([one.entry() for one in methods]),
        spectra_section([one.entry() for one in methods]),
        leaks_section(methods),
        foreseen_section(_foreseen(methods)),
        costs_section(methods),
        rows_section(methods),
        settings_section(methods),
    ]
    record = methods[0].record
    title = f"{record.stream}: {_plural(len(record.tasks), 'task')}, {_plural(len(methods), 'method')}"
    cards = [_card(one) for one in methods] if len(methods) <= CARDS else []
    return Part(title, _lead(methods), cards, sections, answers(methods, found), notices(methods))


def ranked(methods: Sequence[MethodRuns]) -> list[MethodRuns]:
    """Return the methods from the highest average at the end to the lowest, those without one last."""
    ends = {one.index: found.mean if (found := one.estimate(at_end)) else -1.0 for one in methods}
    order = sorted(methods, key=lambda one: -ends[one.index])
    return [replace(one, index=index) for index, one in enumerate(order)]


def _foreseen(methods: Sequence[MethodRuns]) -> list[Foreseen]:
    """Return what was foreseen of every task of every run."""
    return [
        Foreseen(one.entry(), ", ".join(filter(None, (found.task, cell.order, f"seed {cell.seed}"))), found)
        for one in methods
        for cell in one.cells
        for found in cell.predicted_forgetting
    ]


def _lead(methods: Sequence[MethodRuns]) -> str:
    """Return what was run, in a sentence."""
    record = methods[0].record
    cells = sum(len(one.cells) for one in methods)
    orders = {cell.order for one in methods for cell in one.cells}
    seeds = {cell.seed for one in methods for cell in one.cells}
    model = f" from {record.model}" if record.model else ""
    in_orders = f", {len(orders)} orders of the tasks" if len(orders) > 1 else ""
    return (
        f"Each method starts{model} and learns the tasks one after another; after each of them all are scored. "
        f"{_plural(cells, 'run')}: {_plural(len(methods), 'method')}{in_orders}, {_plural(len(seeds), 'seed')}."
    )


def _card(one: MethodRuns) -> Card:
    facts = [
        Fact("learned", one.told(learned), "% on a new task, right after it"),
        Fact("at the end", one.told(at_end), "% on average over all tasks"),
        Fact("backward transfer", one.told(transfer, "+"), "points, earlier tasks by the end"),
    ]
    if (kept := one.told(held_out)) != MISSING:
        before = one.estimate(lambda cell: cell.retained(0))
        facts.append(Fact("held out", kept, f"% at the end; {percent(before.mean if before else None)} % before"))
    return Card(one.entry(), [fact for fact in facts if fact.value != MISSING])


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"
