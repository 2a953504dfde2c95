"""Charts with a row per layer and a column per kind of matrix, as the plan is drawn; one small picture in each cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from markupsafe import Markup

from lorica.report.charts import plan_grid, short_name
from lorica.report.records import PlanEntry
from lorica.report.svg import canvas, colour, line, rect, tag, text
from lorica.scores import shorten

Layer = TypeVar("Layer", bound=PlanEntry)
Painter = Callable[[float, float, float, Layer], Markup]
"""Draws one layer into a cell, from its left edge, its top and its width."""

_GAP = 18


def layer_grid(
    layers: Sequence[Layer], paint: Painter[Layer], *, height: float, title: str, description: str
) -> Markup:
    """Return a grid of small pictures. Of several matrices in one cell, as of experts, the first is drawn."""
    by_name = {one.name: one for one in layers}
    grid, kinds = plan_grid(layers)
    names = 20 + 6.6 * max(len(name) for name in grid)
    heads = [shorten(kind, 34, "…").split(".") for kind in kinds]
    longest, lines = max(len(word) for head in heads for word in head), max(map(len, heads))
    column, row, top = max(84.0, (780 - names) / len(kinds), 6.6 * longest + 14), height + 8, 18 + 16 * lines
    parts = [
        text(names + j * column, top - 14 - 16 * (len(head) - 1 - i), word, class_="tick")
        for j, head in enumerate(heads)
        for i, word in enumerate(head)
    ]
    for i, (name, cells) in enumerate(grid.items()):
        y = top + i * row
        parts.append(text(names - 12, y + height / 2 + 4, name, "end", "tick"))
        for j, kind in enumerate(kinds):
            if kind in cells:
                parts.append(paint(names + j * column, y, column - _GAP, by_name[cells[kind][0].name]))
    return canvas(names + len(kinds) * column, top + len(grid) * row + 2, title, description, parts)


def spectrum(
    x: float, y: float, width: float, height: float, points: Sequence[tuple[float, float]], cut: float | None, note: str
) -> Markup:
    """Return a falling spectrum as an area, in colour up to the cut.

    Args:
        points: position (0 first, 1 last) and height (0 to 1), by position.
        cut: position of the last protected direction; None: nothing is cut off.
    """
    edge = 0.0 if cut is None else cut
    at_edge = _interpolated(points, edge)
    left = [*(p for p in points if p[0] < edge), (edge, at_edge)]
    right = [(edge, at_edge), *(p for p in points if p[0] > edge)]
    parts = [tag("title", note)]
    for area, class_ in ((left, "bar"), (right, "track")):
        if len(area) > 1:
            parts.append(tag("path", d=_area(area, x, y, width, height), class_=class_))
    base = y + height
    parts.append(line(x, base, x + width, base, "axis"))
    if cut is not None:
        parts.append(line(x + cut * width, y, x + cut * width, base, "reference"))
    return tag("g", *parts, class_=colour(0))


def bullet(x: float, y: float, width: float, share: float, random: float, best: float, note: str) -> Markup:
    """Return a bar for a share, with a hollow mark at what is random and a tick at the best there is."""
    inner = max(0.0, width - 30)
    parts = [
        tag("title", note),
        rect(x, y + 5, inner, 8, rx=2, class_="track"),
        rect(x, y + 5, inner * min(share, 1.0), 8, rx=2, class_="bar"),
        line(x + inner * best, y + 1, x + inner * best, y + 17, "outline"),
        tag("circle", cx=x + inner * random, cy=y + 9, r=3.5, class_="hollow"),
        text(x + inner + 7, y + 13, f"{100 * share:.0f}", class_="tick"),
    ]
    return tag("g", *parts, class_=colour(0))


def signed(x: float, y: float, width: float, value: float, most: float, shown: str, note: str) -> Markup:
    """Return a bar from the middle to the right for a positive value, to the left for a negative one."""
    inner = max(0.0, width - 38)
    middle, reach = x + inner / 2, inner / 2 * min(1.0, abs(value) / most if most else 0.0)
    parts = [
        tag("title", note),
        rect(x, y + 5, inner, 8, rx=2, class_="track"),
        rect(middle if value > 0 else middle - reach, y + 5, reach, 8, class_="bar"),
        line(middle, y + 2, middle, y + 16, "axis"),
        text(x + inner + 7, y + 13, shown, class_="tick"),
    ]
    return tag("g", *parts, class_=colour(0 if value > 0 else 1))


def not_measured(x: float, y: float, note: Layer) -> Markup:
    """Return what stands in a cell without a figure."""
    return tag("g", tag("title", f"{short_name(note.name)}: not measured"), text(x, y + 13, "–", class_="tick"))


def _area(points: Sequence[tuple[float, float]], x: float, y: float, width: float, height: float) -> str:
    base = y + height
    top = "".join(f"L{x + px * width:.1f} {base - py * height:.1f}" for px, py in points)
    return f"M{x + points[0][0] * width:.1f} {base:.1f}{top}L{x + points[-1][0] * width:.1f} {base:.1f}Z"


def _interpolated(points: Sequence[tuple[float, float]], at: float) -> float:
    before = max((p for p in points if p[0] <= at), default=points[0])
    after = min((p for p in points if p[0] >= at), default=points[-1])
    gap = after[0] - before[0]
    return before[1] if gap <= 0 else before[1] + (after[1] - before[1]) * (at - before[0]) / gap
