"""Forgetting as it was predicted, beside what was measured: a point per task and run, and what the plans protect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from markupsafe import Markup

from lorica.report.charts import WIDTH
from lorica.report.parts import Entry, Figure, Section
from lorica.report.records import EnergyShares, PredictedForgetting
from lorica.report.svg import Scale, axes, canvas, line, marker, text
from lorica.report.tables import Table, percent
from lorica.scores import shorten
from lorica.units import MISSING, scientific

_LEFT, _RIGHT, _TOP, _ROW = 64.0, WIDTH - 20.0, 44.0, 20.0
_SIDES = ("inputs", "outputs")


@dataclass(frozen=True)
class Foreseen:
    """What was foreseen and measured of one training: whose it was, and which one of those."""

    entry: Entry[Any]
    where: str
    found: PredictedForgetting

    @property
    def point(self) -> tuple[float, float] | None:
        """Predicted and measured, where both can be drawn on a logarithmic axis."""
        x, y = self.found.predicted, self.found.measured
        return (x, y) if x is not None and y is not None and min(x, y) > 0 else None


def foreseen_section(trainings: Sequence[Foreseen]) -> Section | None:
    """Return how far predictions were expected to move and did, and how much of the curvature was protected."""
    if not trainings:
        return None
    intro = (
        "How far a training moves what the model predicts on text of its own, in nats per token. Predicted: half of "
        "tr(B D A D'), summed over the weights, from the change D of each and the curvature measured before, A "
        "of its inputs and B of its output gradients. Measured: mean Kullback-Leibler divergence on other such text. "
        "The last table: how much of the energy of A and B was protected, beside as many random directions and the "
        "best ones, and what a change of one size was expected to cost, compared with no protection; in percent."
    )
    drawn = [one for one in trainings if one.point]
    figures = [_figure(trainings, drawn)] if len(drawn) > 1 else []
    details = [] if figures else [("By kind of layer", table) for table in [_kinds(trainings)] if table.rows]
    table = _shares(trainings) if figures else _alone(trainings)
    return Section("Forgetting, predicted and measured", intro, figures, table, details=details)


def log_scatter(trainings: Sequence[Foreseen], *, title: str, description: str) -> Markup:
    """Return a point per training, both axes logarithmic and the same, with the line on which both figures agree."""
    points = [(one, *one.point) for one in trainings if one.point]
    bottom = _TOP + _RIGHT - _LEFT
    x = _logarithmic([value for _, *pair in points for value in pair], _LEFT, _RIGHT)
    y = Scale(x.low, x.high, bottom, _TOP, x.ticks)
    parts = [*axes(x, y, "predicted, nats per token", "measured, nats per token", lambda tick: f"{10**tick:g}")]
    parts += [line(x(tick), y.start, x(tick), y.end, "grid") for tick in x.ticks]
    parts += [line(x.start, y.start, x.end, y.end, "reference")]
    parts += [text(x.end - 50, y.end + 18, "as predicted", "end", "note")]
    for one, predicted, measured in points:
        told = f"{one.entry.name}, {one.where}: predicted {scientific(predicted)}, measured {scientific(measured)}"
        parts.append(marker(one.entry.index, x(math.log10(predicted)), y(math.log10(measured)), told))
    names = {one.entry.index: one.entry.name for one, *_ in points}
    for row, (index, name) in enumerate(names.items()):
        at = bottom + 62 + _ROW * row
        parts += [marker(index, _LEFT + 6, at), text(_LEFT + 20, at + 4, shorten(name, 40, "…"), class_="tick")]
    return canvas(WIDTH, bottom + 56 + _ROW * len(names), title, description, parts)


def _logarithmic(values: Sequence[float], start: float, end: float) -> Scale:
    """Return a scale of decimal logarithms that ends on ticks: powers of ten, or where these are few 1, 2 and 5."""
    low, high = math.log10(min(values)), math.log10(max(values))
    fine = [math.log10(factor) for factor in (1, 2, 5)] if high - low < 2 else [0.0]
    ticks = [power + part for power in range(math.floor(low) - 1, math.ceil(high) + 2) for part in fine]
    first = max(tick for tick in ticks if tick <= low + 1e-9)
    last = min(tick for tick in ticks if tick >= high - 1e-9 and tick > first)
    shown = [tick for tick in ticks if first <= tick <= last]
    return Scale(first, last, start, end, shown[:: -(-len(shown) // 8)])


def _figure(trainings: Sequence[Foreseen], drawn: Sequence[Foreseen]) -> Figure:
    ratios = [_ratio(one.found) for one in drawn]
    known = [ratio for ratio in ratios if ratio is not None]
    caption = (
        f"{len(drawn)} trainings, each a point; on the dashed line both agree. Measured over predicted: "
        f"{min(known):.2g} to {max(known):.2g}, median {median(known):.2g}."
    )
    if len(drawn) < len(trainings):
        caption += f" {len(trainings) - len(drawn)} that did not move, or were not measured, are not drawn."
    header = ["method", "trainings", "predicted, mean", "measured, mean", "measured / predicted, median"]
    rows = [[entry.label, str(len(own)), *_figures([one.found for one in own])] for entry, own in _by_entry(trainings)]
    every = [[one.entry.label, one.where, *_figures([one.found])] for one in trainings]
    details = [("Every training", Table(["method", "training", *header[2:]], every, left=2))]
    title = "Forgetting, predicted and measured"
    svg = log_scatter(drawn, title=title, description=caption)
    return Figure(svg, caption, Table(header, rows), details=details)


def _figures(found: Sequence[PredictedForgetting]) -> list[str]:
    ratios = [ratio for one in found if (ratio := _ratio(one)) is not None]
    columns = [[one.predicted for one in found], [one.measured for one in found]]
    means = [_mean([value for value in column if value is not None]) for column in columns]
    return [*map(scientific, means), f"{median(ratios):.2f}" if ratios else MISSING]


def _ratio(one: PredictedForgetting) -> float | None:
    return one.measured / one.predicted if one.measured is not None and one.predicted else None


def _by_entry(trainings: Sequence[Foreseen]) -> list[tuple[Entry[Any], list[Foreseen]]]:
    entries = {one.entry.index: one.entry for one in trainings}
    return [(entry, [one for one in trainings if one.entry.index == index]) for index, entry in entries.items()]


def _shares(trainings: Sequence[Foreseen]) -> Table:
    rows = [[entry.label, *_share_cells([one.found for one in own])] for entry, own in _by_entry(trainings)]
    return Table(["energy protected, percent", *_share_header()], rows)


def _share_header() -> list[str]:
    return [
        *(f"{side}{which}" for side in _SIDES for which in ("", ", random", ", best")),
        "expected forgetting",
    ]


def _share_cells(found: Sequence[PredictedForgetting]) -> list[str]:
    cells: list[str] = []
    for side in _SIDES:
        shares = [share for one in found if (share := getattr(one.shares, side)) is not None]
        cells += [_percent([getattr(share, name) for share in shares]) for name in EnergyShares.model_fields]
    return [*cells, _percent([one.shares.expected for one in found if one.shares.expected is not None])]


def _alone(trainings: Sequence[Foreseen]) -> Table:
    """Return figures and shares in one table, where there is no picture."""
    header = ["training", "predicted", "measured", "measured / predicted", *_share_header()]
    rows = [[one.entry.label, *_figures([one.found]), *_share_cells([one.found])] for one in trainings]
    return Table(header, rows)


def _kinds(trainings: Sequence[Foreseen]) -> Table:
    rows = [[name, scientific(value)] for one in trainings for name, value in one.found.by_kind.items()]
    return Table(["layers", "predicted, nats per token"], rows)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _percent(shares: Sequence[float]) -> str:
    mean = _mean(shares)
    return percent(None if mean is None else 100 * mean)
