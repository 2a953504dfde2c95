"""What keeping costs in learning: a picture per thing to keep, with intervals and the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lorica.bootstrap import Interval
from lorica.report.differences import known_ends, rows_interval, told_ends
from lorica.report.pareto import Ends, Spot, front, scatter
from lorica.report.parts import Figure, Section
from lorica.report.replicates import Measure, MethodRuns, held_out, learned, transfer
from lorica.report.tables import Table
from lorica.units import listed


def trade_section(methods: Sequence[MethodRuns]) -> Section | None:
    """Return what keeping costs in learning: the pictures and who is on the front."""
    kept = _trade_figure(methods, held_out, "held out, at the end, %", "what is held out", 0.0, _held_out_rows)
    past = _trade_figure(methods, transfer, "backward transfer, points", "earlier tasks", -100.0, lambda one: None)
    figures = [figure for figure in (kept, past) if figure]
    return Section("What keeping costs in learning", figures=figures) if figures else None


def _trade_figure(
    methods: Sequence[MethodRuns],
    kept: Measure,
    y_title: str,
    what: str,
    least: float,
    over_rows: Callable[[MethodRuns], Interval | None],
) -> Figure | None:
    spots, rows = [], []
    for one in methods:
        x, y = one.estimate(learned), one.estimate(kept)
        if x is not None and y is not None:
            sure = y if y.sd is not None else over_rows(one)
            ends = _drawn(known_ends(x), 0.0), _drawn(known_ends(sure), least)
            spots.append(Spot(one.name, one.index, x.mean, y.mean, *ends))
            rows.append([one.label, x.told(), told_ends(x), y.told(), told_ends(sure)])
    if not spots:
        return None
    on_front = [spot.name for spot in front(spots)]
    bars = " Thin bars: 95 % intervals." if any(spot.x_ends or spot.y_ends for spot in spots) else ""
    caption = (
        f"Learning against keeping {what}. Freedom to learn is usually paid for by forgetting; the best corner is top "
        f"right. None beats {listed(on_front)} on both.{bars}"
    )
    svg = scatter(spots, title=f"Learning against keeping {what}", description=caption,
                  x_title="learning accuracy, %", y_title=y_title)  # fmt: skip
    return Figure(svg, caption, Table(["method", "learned", "95 % interval", y_title, "95 % interval"], rows))


def _drawn(ends: Ends, least: float) -> Ends:
    """Return an interval as far as there are scores; a t-interval over few seeds may reach beyond."""
    return None if ends is None else (max(ends[0], least), min(ends[1], 100.0))


def _held_out_rows(one: MethodRuns) -> Interval | None:
    return rows_interval(one, list(one.record.retention))
