"""Inline SVG from small functions: an element, a scale, a pair of axes. Colours are CSS variables of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

COLOURS = 8
MARKERS = 4


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """Return an element; children and attributes are escaped, ``_`` in a name stands for ``-``."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"' for key, value in attributes.items()
    )
    return Markup(f"<{name}{written}>{''.join(escape(child) for child in children)}</{name}>")


def canvas(width: float, height: float, title: str, description: str, parts: Iterable[Markup]) -> Markup:
    """Return an ``<svg>`` that scales with its column, but not so far that its text becomes unreadable."""
    style = f"min-width:{0.78 * width:.0f}px;max-width:{1.3 * width:.0f}px"
    inner = [tag("title", title), tag("desc", description), *parts]
    return tag("svg", *inner, viewBox=f"0 0 {width:g} {height:g}", role="img", style=style)


def text(x: float, y: float, content: object, anchor: str = "start", class_: str = "") -> Markup:
    """Return a text whose anchor (start, middle, end) is at x and whose baseline is at y."""
    return tag("text", content, x=x, y=y, text_anchor=anchor, class_=class_)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rect(x: float, y: float, width: float, height: float, *children: object, **more: object) -> Markup:
    return tag("rect", *children, x=x, y=y, width=width, height=height, **more)


def colour(index: int) -> str:
    """Return the class that sets the colour ``var(--c)`` of method ``index``."""
    return f"m{index % COLOURS}"


def marker(index: int, x: float, y: float, note: str = "", r: float = 4.5) -> Markup:
    """Return the mark of method ``index``: shape and colour, so that neither alone has to be told apart.

    The shapes move on by one whenever the colours start again, so that the first 32 marks all differ.
    """
    children = [tag("title", note)] if note else []
    shapes = [
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z",
        f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}Z",
        f"M{x:.1f} {y - 1.2 * r:.1f}l{1.2 * r:.1f} {2.1 * r:.1f}h{-2.4 * r:.1f}Z",
        f"M{x:.1f} {y - 1.3 * r:.1f}l{1.3 * r:.1f} {1.3 * r:.1f}l{-1.3 * r:.1f} {1.3 * r:.1f}"
        f"l{-1.3 * r:.1f} {-1.3 * r:.1f}Z",
    ]
    return tag("path", *children, d=shapes[(index + index // COLOURS) % MARKERS], class_=f"mark {colour(index)}")


def stroke(index: int) -> str:
    """Return the class of a line: dashed once the colours have started again."""
    return "line" if index // COLOURS % 2 == 0 else "line dashed"


def whisker(x1: float, y1: float, x2: float, y2: float, index: int) -> Markup:
    """Return an interval as a thin line in the colour of method ``index``."""
    return line(x1, y1, x2, y2, f"whisker {colour(index)}")


@dataclass(frozen=True)
class Scale:
    """A linear map from data to pixels, with its ticks."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    @classmethod
    def nice(cls, values: Sequence[float], start: float, end: float, *, least: float = 1, whole: bool = False) -> Scale:
        """Return a scale that ends on ticks of 1, 2 or 5 times a power of ten.

        Args:
            values: what has to fit.
            start: pixel of the low end.
            end: pixel of the high end.
            least: a smaller range is widened downwards, so that noise does not fill the chart.
            whole: ticks at integers only, and the scale ends at the data.
        """
        low, high = min(values), max(values)
        least = max(least, 1e-6 * max(-low, high))  # of numbers so large that adding ``least`` would not change them
        low = max(min(low, high - least), 0 if low >= 0 else -math.inf)
        high = max(high, low + least)
        step = _step((high - low) / 5, whole)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if whole:
            first, last = math.ceil(low / step), math.floor(high / step)
        ticks = [round(i * step, 10) for i in range(first, last + 1)]
        return cls(low, high, start, end, ticks) if whole else cls(ticks[0], ticks[-1], start, end, ticks)


def axes(x: Scale, y: Scale, x_title: str, y_title: str, told: Callable[[float], str] = "{:g}".format) -> list[Markup]:
    """Return thin horizontal grid lines, tick labels as ``told`` writes them, and a title at each axis."""
    grid = [line(x.start, y(tick), x.end, y(tick), "grid") for tick in y.ticks]
    y_labels = [text(x.start - 10, y(tick) + 4, told(tick), "end", "tick") for tick in y.ticks]
    x_labels = [text(x(tick), y.start + 20, told(tick), "middle", "tick") for tick in x.ticks]
    base = line(x.start, y.start, x.end, y.start, "axis")
    titles = [
        text(x.start - 10, y.end - 14, y_title, "start", "axis-title"),
        text((x.start + x.end) / 2, y.start + 40, x_title, "middle", "axis-title"),
    ]
    return [*grid, base, *y_labels, *x_labels, *titles]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return positions near the wanted ones, at least ``gap`` apart, as far as low to high has room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    for before, i in zip([None, *order], order, strict=False):
        placed[i] = max(placed[i], low if before is None else placed[before] + gap)
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def _step(rough: float, whole: bool) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if rough <= power * factor * (1 + 1e-9))
    return max(step, 1.0) if whole else step


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
