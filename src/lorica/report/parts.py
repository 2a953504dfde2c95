"""What a report is made of, as data, and the sections that every kind of record shares.

Page and Markdown print the same parts, so that neither can say what the other does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from markupsafe import Markup

from lorica.report.charts import leak_dots, plan_bars, plan_grid, short_name
from lorica.report.records import Cost, Leak, _Record
from lorica.report.tables import Table
from lorica.units import MISSING, count, duration, scientific, size

WORST = 10
"""How many weights the leakage section shows; the worst, by either side."""

PLAIN = "seqft"
"""The method whose step all others are measured against."""

AnyRecord = TypeVar("AnyRecord", bound=_Record)


@dataclass(frozen=True)
class Entry(Generic[AnyRecord]):
    """A record with its label, a short name for charts, and the index of its colour and mark."""

    record: AnyRecord
    label: str
    name: str
    index: int


@dataclass(frozen=True)
class Figure:
    """A chart, what to see in it, the same numbers as a table; ``details``: further tables, by what they hold."""

    svg: Markup
    caption: str
    table: Table
    entry: Entry[Any] | None = None
    details: Sequence[tuple[str, Table]] = ()
    heading: str = ""


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it; of the figures the first ``shown`` are open, the rest folded."""

    heading: str
    intro: str = ""
    figures: Sequence[Figure] = ()
    table: Table | None = None
    code: Sequence[tuple[str, str]] = ()
    wide: bool = False
    shown: int = 6
    details: Sequence[tuple[str, Table]] = ()


@dataclass(frozen=True)
class Fact:
    """One headline figure: what it is, its value, and how to read it."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Card:
    entry: Entry[Any]
    facts: Sequence[Fact]


@dataclass(frozen=True)
class Part:
    """One stream with all its methods, one update or several in order, one judgement, one inspection.

    Attributes:
        sentence: what it is, or all that is to be said of it.
        answers: questions with what was found, before everything else.
        notices: what limits the figures; no output is without them.
    """

    title: str
    sentence: str
    cards: Sequence[Card] = ()
    sections: Sequence[Section | None] = ()
    answers: Sequence[tuple[str, str]] = ()
    notices: Sequence[str] = ()


def plan_section(entries: Sequence[Entry[Any]]) -> Section | None:
    """Return what each method protects, weight by weight."""
    figures = [_plan_figure(entry) for entry in entries if entry.record.plan]
    if not figures:
        return None
    intro = (
        "The protected share k / min(M, N) of every weight matrix, in percent; the rest is free to learn. "
        "A full bar is a matrix that may not change."
    )
    return Section("What was protected", intro, figures, wide=True, shown=3)


def leakage_section(entries: Sequence[Entry[Any]]) -> Section | None:
    """Return how much of the real weight change fell into protected directions."""
    figures = [_leak_figure(entry) for entry in entries if entry.record.leakage]
    if not figures:
        return None
    intro = (
        "The share of each weight's change that lies in its protected directions, measured on the weights "
        "themselves. An unconstrained change of the same shape would have the hollow value."
    )
    return Section("Did the protection hold", intro, figures, wide=True, shown=3)


def cost_section(entries: Sequence[Entry[Any]]) -> Section | None:
    """Return time, memory and trained parameters; figures that no record holds are left out."""
    costs = [e.record.cost for e in entries]
    plain = next((e.record.cost for e in entries if e.record.method == PLAIN), Cost())
    columns = {
        "time": [duration(cost.seconds) for cost in costs],
        "training": [duration(cost.training_seconds) for cost in costs],
        "steps": [str(cost.steps) if cost.steps is not None else MISSING for cost in costs],
        "per step": [duration(cost.seconds_per_step) for cost in costs],
        f"per step, {PLAIN} = 1": [_ratio(cost.seconds_per_step, plain.seconds_per_step) for cost in costs],
        "peak memory": [size(cost.peak_rss_bytes) for cost in costs],
        f"memory, {PLAIN} = 1": [_ratio(cost.peak_rss_bytes, plain.peak_rss_bytes) for cost in costs],
        "trainable parameters": [count(cost.trainable_parameters) for cost in costs],
        "of all": [_share_trained(e.record) for e in entries],
        "trained bytes": [size(cost.trained_bytes) for cost in costs],
    }
    known = {name: cells for name, cells in columns.items() if set(cells) != {MISSING}}
    if not known:
        return None
    rows = [[e.label, *(cells[i] for cells in known.values())] for i, e in enumerate(entries)]
    return Section("What it cost", table=Table(["method", *known], rows))


def rerun_section(entries: Sequence[Entry[Any]]) -> Section | None:
    """Return commands, seeds and versions: what it takes to get these numbers again."""
    records = [entry.record for entry in entries]
    settings: dict[str, list[str]] = {
        "model": [_or_missing(r.model) for r in records],
        "model parameters": [count(r.model_parameters) for r in records],
        "learning rate": [scientific(r.learning_rate) for r in records],
        "seed": [_or_missing(r.seed) for r in records],
        "git revision": [_or_missing(r.git_revision) for r in records],
        "versions": [flat(r.versions) for r in records],
        "hardware": [flat(r.hardware) for r in records],
    }
    rows = [[name, _agreed(cells, entries)] for name, cells in settings.items() if set(cells) != {MISSING}]
    code = [(entry.label, entry.record.command) for entry in entries if entry.record.command]
    if len({command for _, command in code}) == 1:
        code = [("", code[0][1])]
    if not rows and not code:
        return None
    return Section("How to run it again", table=Table(["setting", "value"], rows, left=2), code=code)


def flat(values: Mapping[str, Any]) -> str:
    """Return nested settings on one line: ``torch 2.13.0, cpu.cores 2``."""
    return ", ".join(f"{name} {value}" for name, value in flattened(values)) or MISSING


def flattened(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as pairs of dotted name and text; what is null is left out."""
    pairs = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += flattened(value, f"{prefix}{name}.")
        elif value is not None:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            pairs.append((f"{prefix}{name}", shown))
    return pairs


def leak_of(leak: Leak) -> float:
    """Return the larger leakage of the sides that protect something; 0 where neither does."""
    sides = [(leak.leak_u, leak.unconstrained_u), (leak.leak_v, leak.unconstrained_v)]
    return max((value for value, free in sides if value is not None and free), default=0.0)


def _plan_figure(entry: Entry[Any]) -> Figure:
    plan = entry.record.plan
    layers, kinds = plan_grid(plan)
    rows = [[layer, *(_shares(cells.get(kind, [])) for kind in kinds)] for layer, cells in layers.items()]
    weights, free = sum(_product(one.shape) for one in plan), sum(one.free for one in plan)
    sources = ", ".join(sorted({one.source for one in plan}))
    constraints = ", ".join(sorted({one.constraint for one in plan}))
    caption = (
        f"Protected directions from: {sources}; constraint: {constraints}. {count(free)} of {count(weights)} "
        f"coordinates are free ({100 * free / weights:.1f} %) in {len(plan)} matrices."
    )
    svg = plan_bars(plan, entry.index, title=f"{entry.label}: protected share per matrix", description=caption)
    return Figure(svg, caption, Table(["protected, percent", *kinds], rows), entry)


def _leak_figure(entry: Entry[Any]) -> Figure:
    leaks = sorted(entry.record.leakage, key=leak_of, reverse=True)
    shown = leaks[:WORST]
    which = f"the {len(shown)} worst of {len(leaks)}" if len(leaks) > len(shown) else f"all {len(leaks)}"
    caption = (
        f"Filled: measured; hollow: unconstrained. Upper dot output side, lower dot input side; {which} "
        f"matrices. Largest measured: {scientific(leak_of(leaks[0]))}."
    )
    rows = [
        [short_name(leak.name), *_pair(leak.leak_u, leak.unconstrained_u),
         *_pair(leak.leak_v, leak.unconstrained_v), scientific(leak.relative_change)]
        for leak in shown
    ]  # fmt: skip
    header = ["matrix", "output side", "unconstrained", "input side", "unconstrained", "relative change"]
    svg = leak_dots(shown, entry.index, title=f"{entry.label}: leakage per matrix", description=caption)
    return Figure(svg, caption, Table(header, rows), entry)


def _pair(value: float | None, free: float | None) -> tuple[str, str]:
    return (scientific(value), scientific(free)) if free else (MISSING, MISSING)


def _ratio(value: float | None, plain: float | None) -> str:
    return f"{value / plain:.2f}" if value is not None and plain else MISSING


def _shares(cells: Sequence[Any]) -> str:
    return f"{100 * sum(one.share for one in cells) / len(cells):.0f}" if cells else MISSING


def _share_trained(record: _Record) -> str:
    trained, total = record.cost.trainable_parameters, record.model_parameters
    return f"{100 * trained / total:.1f} %" if trained is not None and total else MISSING


def _agreed(cells: Sequence[str], entries: Sequence[Entry[Any]]) -> str:
    if len(set(cells)) == 1:
        return cells[0]
    return "; ".join(f"{entry.name}: {cell}" for entry, cell in zip(entries, cells, strict=True))


def _or_missing(value: object) -> str:
    return MISSING if value is None else str(value)


def _product(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total
