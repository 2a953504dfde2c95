"""The chart of what two things cost each other: a point per method with its intervals, and the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lorica.report.charts import WIDTH
from lorica.report.svg import Scale, axes, canvas, colour, line, marker, tag, text, whisker
from lorica.scores import shorten

_LETTER, _LINE, _MARK = 7.8, 15.0, 9.0

Box = tuple[float, float, float, float]
Ends = tuple[float, float] | None


@dataclass(frozen=True)
class Spot:
    """One method: a short name, the index of its mark, where it lies, and the intervals of both figures."""

    name: str
    index: int
    x: float
    y: float
    x_ends: Ends = None
    y_ends: Ends = None


def scatter(spots: Sequence[Spot], *, title: str, description: str, x_title: str, y_title: str) -> Markup:
    """Return one named point per method, and the front: the methods that none beats on both axes."""
    height = 340 + 9 * max(0, len(spots) - 6)
    x = Scale.nice([v for one in spots for v in (one.x, *(one.x_ends or ()))], 48, WIDTH - 30, least=10)
    y = Scale.nice([v for one in spots for v in (one.y, *(one.y_ends or ()))], height - 48, 44, least=10)
    parts = [*axes(x, y, x_title, y_title), text(x.end, 22, "better: up and right", "end", "note")]
    parts += [line(x(tick), y.start, x(tick), y.end, "grid") for tick in x.ticks]
    best = front(spots)
    if len(best) > 1:
        path = "M" + "L".join(f"{x(one.x):.1f} {y(one.y):.1f}" for one in best)
        parts.append(tag("path", d=path, class_="reference"))
    for one in spots:
        parts += [whisker(x(low), y(one.y), x(high), y(one.y), one.index) for low, high in _known(one.x_ends)]
        parts += [whisker(x(one.x), y(low), x(one.x), y(high), one.index) for low, high in _known(one.y_ends)]
    marks = [(x(one.x), y(one.y)) for one in spots]
    parts += [
        marker(one.index, *at, f"{one.name}: {one.x:.1f}, {one.y:.1f}", r=6)
        for one, at in zip(spots, marks, strict=True)
    ]
    frame = (x.start, y.end - 6, float(WIDTH), y.start - 4)
    parts += _labels(spots, marks, frame)
    return canvas(WIDTH, height, title, description, parts)


def front(spots: Sequence[Spot]) -> list[Spot]:
    """Return the Pareto front from left to right: those that no other is at least equal to on both axes."""
    best = [one for one in spots if not any(_beats(other, one) for other in spots)]
    return sorted(best, key=lambda one: (one.x, -one.y))


def _beats(a: Spot, b: Spot) -> bool:
    return (a.x, a.y) != (b.x, b.y) and a.x >= b.x and a.y >= b.y


def _known(ends: Ends) -> list[tuple[float, float]]:
    return [ends] if ends else []


def _labels(spots: Sequence[Spot], marks: Sequence[tuple[float, float]], frame: Box) -> list[Markup]:
    """Return the names, each beside its mark where there is room, else further off with a line to it."""
    taken: list[Box] = [(x - _MARK, y - _MARK, x + _MARK, y + _MARK) for x, y in marks]
    parts = []
    for one, (x, y) in zip(spots, marks, strict=True):
        name = shorten(one.name, 24, "…")
        box, far = _place(x, y, _LETTER * len(name), taken, frame)
        taken.append(box)
        if far:
            near_x = min(max(x, box[0]), box[2])
            near_y = min(max(y, box[1]), box[3])
            parts.append(line(x, y, near_x, near_y, f"leader {colour(one.index)}"))
        parts.append(text(box[0], box[3] - 3, name, class_=f"direct {colour(one.index)}"))
    return parts


def _place(x: float, y: float, width: float, taken: Sequence[Box], frame: Box) -> tuple[Box, bool]:
    """Return the first free place for a name, and whether it is far off; of none that is free, the one beside it."""
    for step in range(24):
        up = step * 8.0
        lefts = [x + 11, x - 11 - width, x - width / 2] if step else [x + 11, x - 11 - width]
        for left in lefts:
            for top in dict.fromkeys((y - _LINE / 2 - up, y - _LINE / 2 + up)):
                box = (left, top, left + width, top + _LINE)
                if _inside(box, frame) and not any(_overlap(box, other) for other in taken):
                    return box, step > 1
    left = min(x + 11, frame[2] - width)
    return (left, y - _LINE / 2, left + width, y + _LINE / 2), False


def _inside(box: Box, frame: Box) -> bool:
    return frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
