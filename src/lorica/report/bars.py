"""Bar charts: scores before and after by method, and outcomes that add up to a hundred."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lorica.report.charts import WIDTH
from lorica.report.svg import Scale, canvas, colour, line, rect, tag, text
from lorica.report.tables import points
from lorica.scores import shorten

ROW = 26


@dataclass(frozen=True)
class Level:
    """One bar: whose it is, where it started and where it ended, percent, and the interval of the end."""

    name: str
    index: int
    before: float | None
    after: float
    ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Outcome:
    """One stacked bar: whose it is, its parts in percent, the interval of each where known, and whether it is ours."""

    name: str
    parts: tuple[float, float, float]
    ends: tuple[tuple[float, float] | None, ...] = (None, None, None)
    ours: bool = True


def level_bars(levels: Sequence[Level], *, title: str, description: str, floor: float | None = None) -> Markup:
    """Return a bar per method from 0 to its score after, with a tick at its score before.

    Args:
        floor: score of always giving the most frequent answer, drawn dashed through all bars.
    """
    names = 16 + 8 * max(len(_name(one.name)) for one in levels)
    top, height = 26, 26 + ROW * len(levels) + 30
    x = Scale(0, 100, names, WIDTH - 92, [0, 25, 50, 75, 100])
    parts = [line(x(tick), top - 6, x(tick), height - 26, "grid") for tick in x.ticks]
    parts += [text(x(tick), height - 8, f"{tick:g}", "middle", "tick") for tick in x.ticks]
    if floor is not None:
        parts.append(line(x(floor), top - 6, x(floor), height - 26, "reference"))
        parts.append(text(x(floor), 14, f"majority floor {floor:.1f}", "middle", "note"))
    for row, one in enumerate(levels):
        parts += _level(one, x, top + row * ROW)
    return canvas(WIDTH, height, title, description, parts)


def stacked_bars(outcomes: Sequence[Outcome], labels: Sequence[str], *, title: str, description: str) -> Markup:
    """Return a bar per comparison, its parts side by side; what others published is drawn paler."""
    names = 24 + 6.8 * max(len(shorten(one.name, 44, "…")) for one in outcomes)
    top, row, width = 34, 34, 760
    x = Scale(0, 100, names, width - 12, [0, 25, 50, 75, 100])
    parts = [
        text((x(0), x(50), x(100))[i], 18, label, ("start", "middle", "end")[i], "axis-title")
        for i, label in enumerate(labels)
    ]
    for at, one in enumerate(outcomes):
        parts += _outcome(one, labels, x, top + at * row)
    return canvas(width, top + len(outcomes) * row + 4, title, description, parts)


def _level(one: Level, x: Scale, y: float) -> list[Markup]:
    change = "" if one.before is None else f" ({points(one.after - one.before)})"
    note = f"{one.name}: {'' if one.before is None else f'{one.before:.1f} before, '}{one.after:.1f} after"
    parts = [
        text(x.start - 10, y + 14, _name(one.name), "end", f"direct {colour(one.index)}"),
        rect(x.start, y + 4, x(one.after) - x.start, 12, tag("title", note), rx=2, class_=f"bar {colour(one.index)}"),
        text(x.end + 8, y + 14, f"{one.after:.1f}{change}", class_="tick"),
    ]
    if one.before is not None:
        parts.append(line(x(one.before), y, x(one.before), y + 20, "outline"))
    if one.ends:
        parts.append(line(x(max(0, one.ends[0])), y + 10, x(min(100, one.ends[1])), y + 10, "interval"))
    return parts


def _outcome(one: Outcome, labels: Sequence[str], x: Scale, y: float) -> list[Markup]:
    parts = [text(x.start - 12, y + 16, shorten(one.name, 44, "…"), "end", "tick")]
    total, start = sum(one.parts) or 1.0, 0.0
    for kind, (share, ends) in enumerate(zip(one.parts, one.ends, strict=True)):
        left, right = x(100 * start / total), x(100 * (start + share) / total)
        told = f"{labels[kind]} {share:.1f} %" + (f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else "")
        class_ = f"part{kind}" if one.ours else f"part{kind} pale"
        parts.append(rect(left, y, max(0.0, right - left - 1), 22, tag("title", told), rx=2, class_=class_))
        if right - left > 26:
            parts.append(
                text((left + right) / 2, y + 16, f"{share:.0f}", "middle", f"on{kind}" if one.ours else "number")
            )
        start += share
    won, _, lost = one.ends
    parts += [line(x(low), y + 20, x(high), y + 20, "interval") for low, high in ([won] if won else [])]
    parts += [line(x(100 - high), y + 20, x(100 - low), y + 20, "interval") for low, high in ([lost] if lost else [])]
    return parts


def _name(name: str) -> str:
    return shorten(name, 18, "…")
