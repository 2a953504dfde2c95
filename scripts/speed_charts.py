"""The charts of the speed page, from the result files alone. Each is an SVG that stands alone, light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from markupsafe import Markup
from readme_figure import figure
from speed_results import Measurement, Results, Row, of_stream, task_value, thousands, time_ratio

from lorica.report.charts import WIDTH, Series, line_chart
from lorica.report.svg import Scale, axes, canvas, colour, line, marker, rect, spread, stroke, tag, text, whisker

COLOURS = {"lorica fast": 0, "lorica lean": 2, "mini_trainer": 1, "peft osf": 3, "LoRA": 5}
SHORT = {"lorica fast": "Lorica", "lorica lean": "Lorica lean", "mini_trainer": "mini_trainer", "peft osf": "PEFT osf"}
HEIGHT, BAR = 300, 16


def charts(results: Results) -> dict[str, str]:
    """Return every picture of the page, by the name of its file."""
    widths = [list(group) for _, group in groupby(results.steps, key=lambda one: one.settings["width"])]
    axis = [ratio for one in results.steps for _, ratio in _ratios(one)]
    panels: list[str] = [step_chart(group, axis) for group in widths]
    pictures = {f"speed-steps-{i // 2 + 1}.svg": figure(panels[i : i + 2]) for i in range(0, len(panels), 2)}
    pictures["speed-state.svg"] = figure([state_chart(_typical(results)), arithmetic_chart(results)])
    pictures["speed-tasks.svg"] = figure(
        [
            task_chart(results, "seconds", 1.0, "seconds per task"),
            task_chart(results, "resident_bytes", 1e6, "resident memory, MB"),
        ]
    )
    return pictures


def step_chart(group: Sequence[Measurement], axis: Sequence[float]) -> Markup:
    """Return the step time over plain fine-tuning against tokens per step, for one width, 3/4 protected.

    Args:
        group: the measurements of that width.
        axis: ratios that must fit, so that all widths share one axis.
    """
    width, layers = group[0].settings["width"], group[0].settings["layers"]
    places = [math.log2(one.settings["tokens"]) for one in group]
    low, high = (places[0] - 0.5, places[-1] + 0.5) if len(places) == 1 else (places[0], places[-1])
    x = Scale(low, high, 44, WIDTH - 124, [])
    y = Scale.nice([0.8, *axis], HEIGHT - 48, 40, least=0.5)
    title = f"width {width}, {layers} layer{'s' if layers > 1 else ''}"
    parts = axes(x, y, "tokens per step", f"step time, x plain fine-tuning: {title}")
    parts += [
        text(x(place), y.start + 20, thousands(one.settings["tokens"]), "middle", "tick")
        for place, one in zip(places, group, strict=True)
    ]
    parts.append(line(x.start, y(1), x.end, y(1), "reference"))
    curves = {family: points for family in SHORT if (points := _curve(group, family))}
    ends = spread([y(points[-1][1]) for points in curves.values()], 16, y.end, y.start)
    for (family, points), end in zip(curves.items(), ends, strict=True):
        parts += _drawn(family, points, x, y, end)
    described = "Median step time of each method over that of plain fine-tuning; thin bars: quartiles over rounds."
    return canvas(WIDTH, HEIGHT, title, described, parts)


def _ratios(one: Measurement) -> list[tuple[Row, float]]:
    return [(row, time_ratio(one, row)) for family in SHORT if (row := one.row(family))]


def _curve(group: Sequence[Measurement], family: str) -> list[tuple[float, float, float, float]]:
    """Return place, ratio and quartiles of a family in every measurement that has it."""
    return [
        (math.log2(one.settings["tokens"]), time_ratio(one, row), row["ratio"]["low"], row["ratio"]["high"])
        for one in group
        if (row := one.row(family))
    ]


def _drawn(
    family: str, points: Sequence[tuple[float, float, float, float]], x: Scale, y: Scale, end: float
) -> list[Markup]:
    index = COLOURS[family]
    path = "M" + "L".join(f"{x(px):.1f} {y(py):.1f}" for px, py, _, _ in points)
    bars = [whisker(x(px), y(low), x(px), y(high), index) for px, _, low, high in points]
    marks = [marker(index, x(px), y(py), f"{SHORT[family]}: {py:.2f}") for px, py, _, _ in points]
    last = points[-1]
    leader = line(x(last[0]) + 6, y(last[1]), x.end + 14, end, f"leader {colour(index)}")
    name = text(x.end + 18, end + 4, SHORT[family], class_=f"direct {colour(index)}")
    drawn = tag("g", tag("path", d=path, class_=stroke(index)), *bars, *marks, class_=colour(index))
    return [drawn, leader, name]


def state_chart(one: Measurement) -> Markup:
    """Return the training state of every method over that of plain fine-tuning, a bar for each protected share."""
    rows = [row for family in (*SHORT, "LoRA") for share in one.shares if (row := one.row(family, share))]
    bars = {_bar_name(row): (COLOURS[row["family"]], row["state_ratio"]) for row in rows}
    title = f"training state, x plain fine-tuning, width {one.settings['width']}"
    return bar_chart(bars, title, [0, 0.25, 0.5, 0.75, 1], "{:.2f}")


def arithmetic_chart(results: Results) -> Markup:
    """Return the counted training state of the largest model, a bar for each protected share."""
    (counted,) = results.arithmetic
    largest = [row for row in counted.rows if row["model"] == "Llama-3.1-8B"]
    rows = [row for family in SHORT for row in largest if row["family"] == family]
    bars = {_bar_name(row): (COLOURS[row["family"]], row["state_bytes"] / 1e9) for row in rows}
    bars["plain"] = (COLOURS["LoRA"], next(row["state_bytes"] for row in largest if row["family"] == "plain") / 1e9)
    return bar_chart(bars, "training state of Llama-3.1-8B in bfloat16, GB", [0, 25, 50, 75, 100, 125], "{:.0f}")


def bar_chart(bars: dict[str, tuple[int, float]], title: str, ticks: Sequence[float], form: str) -> Markup:
    """Return a bar per name, of a colour and a length, with its length as text."""
    names, top = 132, 28
    height = top + BAR * len(bars) + 32
    x = Scale(0, max(ticks[-1], *(value for _, value in bars.values())), names, WIDTH - 44, ticks)
    parts = [line(x(tick), top - 6, x(tick), height - 28, "grid") for tick in x.ticks]
    parts += [text(x(tick), height - 10, f"{tick:g}", "middle", "tick") for tick in x.ticks]
    parts.append(text(names, 12, title, "start", "axis-title"))
    for place, (name, (index, value)) in enumerate(bars.items()):
        y = top + BAR * place
        bar = rect(x.start, y, x(value) - x.start, BAR - 4, rx=2, class_="bar")
        parts += [
            text(x.start - 8, y + 10, name, "end", "tick"),
            tag("g", bar, class_=colour(index)),
            text(x(value) + 6, y + 10, form.format(value), class_="tick"),
        ]
    return canvas(WIDTH, height, title, "Weights, bases, cores, gradients and optimizer state.", parts)


def _bar_name(row: Row) -> str:
    return SHORT[row["family"]] + f" {row['protected']:g}" if row["family"] in SHORT else row["family"]


def task_chart(results: Results, value: str, unit: float, title: str) -> Markup:
    """Return one figure of every task in a row, a line for each memory mode."""
    series = [
        Series(
            SHORT[f"lorica {one.settings['memory']}"],
            COLOURS[f"lorica {one.settings['memory']}"],
            [(row["task"], task_value(row, value) / unit) for row in of_stream(one, "old")],
        )
        for one in results.tasks
    ]
    top = max(y for one in series for _, y in one.measured())
    described = f"{title} over the tasks of one stream"
    return line_chart(series, title=title, description=described, x_title="task", y_title=title, least=1.05 * top)


def _typical(results: Results) -> Measurement:
    """Return the measurement whose state is drawn: of the widest model with all protected shares."""
    most = max(len(one.shares) for one in results.steps)
    return [one for one in results.steps if len(one.shares) == most][-1]
