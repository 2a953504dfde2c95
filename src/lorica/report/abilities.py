"""What is left of the abilities that no task trains: every one of them before and after, never the mean alone."""

from __future__ import annotations

from collections.abc import Sequence

from lorica.report.bars import Level, level_bars
from lorica.report.differences import known_ends, rows_interval, told_ends
from lorica.report.parts import Figure, Section
from lorica.report.records import RunRecord
from lorica.report.replicates import Measure, MethodRuns, held_out_change
from lorica.report.tables import Table, percent
from lorica.units import MISSING


def abilities_section(methods: Sequence[MethodRuns]) -> Section | None:
    """Return a picture per held-out ability and one table with all of them."""
    names = list(dict.fromkeys(name for one in methods for cell in one.cells for name in cell.retention))
    figures = [figure for name in names if (figure := _figure(methods, name))]
    if not figures:
        return None
    intro = (
        "Scores on what no task of the stream trains: a tick marks the score before training, the bar the one at the "
        "end. A mean over abilities can hide that one of them was lost, so every one is shown."
    )
    return Section("What is held out, before and after", intro, figures, table=_table(methods, names))


def ability_before(name: str) -> Measure:
    """Return the measure of an ability before training."""
    return lambda cell: (cell.retention.get(name) or [None])[0]


def ability_after(name: str) -> Measure:
    """Return the measure of an ability at the end."""
    return lambda cell: (cell.retention.get(name) or [None])[-1]


def ability_change(name: str) -> Measure:
    """Return the measure of an ability's change, in points."""

    def change(cell: RunRecord) -> float | None:
        before, after = ability_before(name)(cell), ability_after(name)(cell)
        return None if before is None or after is None else after - before

    return change


def _figure(methods: Sequence[MethodRuns], name: str) -> Figure | None:
    levels, rows = [], []
    for one in methods:
        before, after = one.estimate(ability_before(name)), one.estimate(ability_after(name))
        if after is None:
            continue
        over = None if after.sd is not None else rows_interval(one, [name])
        sure = after if after.sd is not None else over
        levels.append(Level(one.name, one.index, before.mean if before else None, after.mean, known_ends(sure)))
        rows.append([one.label, *_cells(one, name), told_ends(sure)])
    if not levels:
        return None
    floors = [cell.floors[name] for one in methods for cell in one.cells if name in cell.floors]
    caption = f"{name}, percent" + ("; black lines: 95 % intervals." if any(level.ends for level in levels) else ".")
    svg = level_bars(levels, title=f"{name} before and after", description=caption, floor=next(iter(floors), None))
    return Figure(svg, caption, Table(["method", "before", "after", "change", "95 % interval"], rows), heading=name)


def _table(methods: Sequence[MethodRuns], names: Sequence[str]) -> Table:
    first = next((one for one in methods if all(one.estimate(ability_before(name)) for name in names)), methods[0])
    rows = [["before training", *(first.mean(ability_before(name)) for name in names), ""]]
    for one in methods:
        rows.append([one.label, *(one.told(ability_after(name)) for name in names), one.told(held_out_change, "+")])
    floors = [percent(next((c.floors[n] for m in methods for c in m.cells if n in c.floors), None)) for n in names]
    if set(floors) != {MISSING}:
        rows.insert(0, ["always the most frequent answer", *floors, ""])
    return Table(["held out, percent", *names, "mean change, points"], rows)


def _cells(one: MethodRuns, name: str) -> list[str]:
    return [one.mean(ability_before(name)), one.told(ability_after(name)), one.told(ability_change(name), "+")]
