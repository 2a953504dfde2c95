"""The report's charts. Each takes plain numbers and returns one inline SVG with a title and a description."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lorica.report.records import Leak, PlanEntry
from lorica.report.svg import (
    COLOURS,
    Scale,
    axes,
    canvas,
    colour,
    line,
    marker,
    rect,
    spread,
    stroke,
    tag,
    text,
    whisker,
)
from lorica.scores import ScoreMatrix, shorten
from lorica.units import scientific

WIDTH = 460
WIDE = 8
"""Up to so many tasks the cells of a score matrix are wide enough for a decimal."""

_FLOOR = 1e-9  # leakage below float32's rounding of a sum is drawn at the edge


@dataclass(frozen=True)
class Series:
    """One line: a short name to write at its end, its colour index, points (y None = a gap), and their intervals."""

    name: str
    index: int
    points: Sequence[tuple[float, float | None]]
    spread: Sequence[tuple[float, float, float]] = ()

    def measured(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in self.points if y is not None]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    description: str,
    x_title: str,
    y_title: str,
    least: float = 10,
    reference: tuple[float, str] | None = None,
    also: Sequence[float] = (),
) -> Markup:
    """Return lines with their names at the end, x in whole numbers.

    Args:
        series: at least one with a measured point.
        least: smallest range of the y axis, in its unit.
        reference: a y value to compare with, drawn dashed, and its name.
        also: further y values that must fit, so that several charts share one axis.
    """
    known = [point for one in series for point in one.measured()]
    drawn = [one for one in series if one.measured()]
    room = 34 if len(drawn) > COLOURS else 20
    height, right = max(290, 100 + 16 * len(drawn)), WIDTH - room - 8 * max(len(_name(one.name)) for one in drawn)
    x = Scale.nice([px for px, _ in known], 44, right, whole=True)
    values = [py for _, py in known] + ([reference[0]] if reference else []) + list(also)
    values += [end for one in drawn for _, *ends in one.spread for end in ends]
    y = Scale.nice(values, height - 48, 40, least=least)
    parts = axes(x, y, x_title, y_title)
    if reference:
        at = y(reference[0])
        parts += [line(x.start, at, x.end, at, "reference"), text(x.end, at - 6, reference[1], "end", "note")]
    ends = spread([y(one.measured()[-1][1]) for one in drawn], 16, y.end, y.start)
    for one, end in zip(drawn, ends, strict=True):
        parts += [_line(one, x, y), *_end_label(one, x, y, end, marked=len(drawn) > COLOURS)]
    return canvas(WIDTH, height, title, description, parts)


def heat_map(matrix: ScoreMatrix, *, title: str, description: str) -> Markup:
    """Return the score matrix as cells, one fixed colour scale from 0 to 100, the diagonal outlined.

    Many tasks are written without decimals, for their cells are narrow.
    """
    tasks, names = len(matrix.tasks), 132
    wide = tasks <= WIDE
    cell, row = max(40 if wide else 31, min(66, (WIDTH - names) / tasks)), 32 if wide else 28
    top = 42
    parts = [text(names + cell * tasks / 2, 14, "scored on task", "middle", "axis-title")]
    for j in range(tasks):
        parts.append(text(names + cell * (j + 0.5), top - 8, j + 1, "middle", "tick"))
    for i, name in enumerate(matrix.stages()):
        y = top + i * row + (6 if i else 0)  # a gap sets the row before training apart
        parts.append(text(names - 10, y + row / 2 + 5, shorten(name, 16, "…"), "end", "tick"))
        for j, score in enumerate(matrix.scores[i]):
            parts.append(_cell(names + j * cell, y, cell, row, float(score), 1 if wide else 0))
    for j in range(tasks):
        x, y = names + j * cell + 1, top + (j + 1) * row + 7
        parts.append(rect(x, y, cell - 2, row - 2, rx=4, class_="outline"))
    width = names + tasks * cell + 2
    return canvas(width, top + (tasks + 1) * row + 10, title, description, parts)


def plan_bars(plan: Sequence[PlanEntry], index: int, *, title: str, description: str) -> Markup:
    """Return the protected share of every weight: a row per layer, a column per kind of matrix."""
    layers, kinds = plan_grid(plan)
    names = 20 + 6.6 * max(len(name) for name in layers)
    column, row, top = max(64.0, (620 - names) / len(kinds)), 22, 34
    parts = [text(names + j * column, 20, shorten(kind, 12, "…"), class_="tick") for j, kind in enumerate(kinds)]
    for i, (layer, cells) in enumerate(layers.items()):
        y = top + i * row
        parts.append(text(names - 12, y + 11, layer, "end", "tick"))
        for j, kind in enumerate(kinds):
            if kind in cells:
                parts.append(_bar(names + j * column, y, column - 14, cells[kind], index))
    return canvas(names + len(kinds) * column, top + len(layers) * row + 2, title, description, parts)


def leak_dots(leaks: Sequence[Leak], index: int, *, title: str, description: str) -> Markup:
    """Return, per weight, the measured leakage beside the unconstrained value, on a logarithmic axis."""
    names, row, top = 190, 24, 34
    height = top + row * len(leaks) + 46
    powers = list(range(round(math.log10(_FLOOR)), 1))
    x = Scale(powers[0], 0, names, 620, powers[::3])
    parts = [
        text(names, 14, "share of the change in protected directions (log scale)", class_="axis-title"),
        *(line(x(p), top - 8, x(p), height - 42, "grid") for p in x.ticks),
        *(text(x(p), height - 24, "1" if p == 0 else f"1e{p}", "middle", "tick") for p in x.ticks),
        text(x(x.low), height - 8, "or less", "middle", "tick"),
    ]
    for i, leak in enumerate(leaks):
        y = top + row * (i + 0.5)
        parts.append(text(names - 16, y + 4, shorten(short_name(leak.name), 27, "…"), "end", "tick"))
        parts += _leak_row(leak, x, y, index)
    return canvas(640, height, title, description, parts)


def short_name(name: str) -> str:
    """Return a weight's name without what all of them share: ``layers.0.self_attn.q_proj``."""
    return re.sub(r"^(model\.|transformer\.|base_model\.)+", "", name)


def _line(one: Series, x: Scale, y: Scale) -> Markup:
    path, pen = "", "M"
    for px, py in one.points:
        if py is not None:
            path += f"{pen}{x(px):.1f} {y(py):.1f}"
        pen = "M" if py is None else "L"
    marks = one.measured() if len(one.points) <= 20 else []
    dots = [marker(one.index, x(px), y(py), f"{one.name}: {py:.1f} at {px:g}") for px, py in marks]
    bars = [whisker(x(px), y(low), x(px), y(high), one.index) for px, low, high in one.spread]
    return tag("g", tag("path", d=path, class_=stroke(one.index)), *bars, *dots, class_=colour(one.index))


def _end_label(one: Series, x: Scale, y: Scale, at: float, *, marked: bool) -> list[Markup]:
    """Return a line's name at its end, with a thin line to it where it had to move, and its mark if asked for."""
    last, value = one.measured()[-1]
    start, moved = x(last), abs(at - y(value)) > 6
    parts = [line(start + 6, y(value), x.end + 14, at, f"leader {colour(one.index)}")] if moved else []
    left = x.end + 16 if marked or moved else start + 10
    parts += [marker(one.index, left + 5, at)] if marked else []
    return [*parts, text(left + (13 if marked else 0), at + 4, _name(one.name), class_=f"direct {colour(one.index)}")]


def _name(name: str, width: int = 16) -> str:
    return shorten(name, width, "…")


def _cell(x: float, y: float, width: float, height: float, score: float, digits: int) -> Markup:
    missing = math.isnan(score)
    box = rect(
        x + 1, y + 1, width - 2, height - 2, rx=4,
        class_="cell missing" if missing else "cell", fill_opacity=0.0 if missing else round(score / 100, 3),
    )  # fmt: skip
    return box + text(x + width / 2, y + height / 2 + 5, "–" if missing else f"{score:.{digits}f}", "middle", "number")


def plan_grid(plan: Sequence[PlanEntry]) -> tuple[dict[str, dict[str, list[PlanEntry]]], list[str]]:
    layers: dict[str, dict[str, list[PlanEntry]]] = {}
    split = [re.match(r"(?:(.*?)\.)??(?:\w+\.)?(\d+)\.(.+)$", entry.name) for entry in plan]
    stacks = {match[1] for match in split if match}
    for entry, match in zip(plan, split, strict=True):
        layer = "other" if not match else f"layer {match[2]}"
        if match and match[1] and len(stacks) > 1:
            layer = f"{match[1]} {match[2]}"
        rest = [part for part in (match[3] if match else entry.name).split(".") if not part.isdigit()]
        layers.setdefault(layer, {}).setdefault(".".join(rest[-2:]), []).append(entry)
    kinds = list(dict.fromkeys(kind for cells in layers.values() for kind in cells))
    last = [kind.split(".")[-1] for kind in kinds]
    short = {kind: end if last.count(end) == 1 else kind for kind, end in zip(kinds, last, strict=True)}
    return {layer: {short[kind]: entries for kind, entries in cells.items()} for layer, cells in layers.items()}, list(
        short.values()
    )


def _bar(x: float, y: float, width: float, entries: Sequence[PlanEntry], index: int) -> Markup:
    share = sum(entry.share for entry in entries) / len(entries)
    first = entries[0]
    shape = " x ".join(str(n) for n in first.shape)
    note = f"{short_name(first.name)}, {shape}: {100 * share:.0f} % protected, k = {first.k}"
    if len(entries) > 1:
        note = f"{len(entries)} matrices such as {note}"
    inner = max(0.0, width - 34)
    return tag(
        "g",
        tag("title", note),
        rect(x, y + 3, inner, 8, rx=2, class_="track"),
        rect(x, y + 3, inner * share, 8, rx=2, class_="bar"),
        text(x + inner + 5, y + 11, f"{100 * share:.0f}", class_="tick"),
        class_=colour(index),
    )


def _leak_row(leak: Leak, x: Scale, y: float, index: int) -> list[Markup]:
    sides: Mapping[str, tuple[float | None, float | None]] = {
        "output": (leak.leak_u, leak.unconstrained_u),
        "input": (leak.leak_v, leak.unconstrained_v),
    }
    parts = [line(x.start, y, x.end, y, "grid")]
    for side, (value, free) in sides.items():
        at = y - 3 if side == "output" else y + 3
        if value is None or not free:
            continue
        note = f"{leak.name}, {side} side: {scientific(value)}, unconstrained {scientific(free)}"
        parts.append(tag("circle", tag("title", note), cx=x(_log(free)), cy=at, r=4, class_="hollow"))
        parts.append(tag("circle", tag("title", note), cx=x(_log(value)), cy=at, r=4, class_=f"mark {colour(index)}"))
    return parts


def _log(value: float) -> float:
    return math.log10(max(value, _FLOOR))
