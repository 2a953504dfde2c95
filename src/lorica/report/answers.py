"""The summary of a comparison: the questions a reader has, each answered in a sentence or two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorica.report.differences import Gap
from lorica.report.records import RunRecord
from lorica.report.replicates import (
    Measure,
    MethodRuns,
    at_end,
    held_out_change,
    learned,
    told_apart,
    transfer,
)
from lorica.report.standings import Reference
from lorica.report.tables import percent
from lorica.units import listed

MOST = 4
"""Up to so many methods are all told; of more the first three and the last."""


def answers(methods: Sequence[MethodRuns], found: Sequence[Reference]) -> list[tuple[str, str]]:
    """Return what was learned, what was lost, where it ends, and which differences are more than chance."""
    told = [
        ("What was learned?", _learned(methods)),
        ("What was lost?", _lost(methods)),
        ("Where does it end?", _end(methods)),
        ("Are the differences more than chance?", " ".join(_chance(one, methods) for one in found)),
    ]
    return [(question, " ".join(answer.split())) for question, answer in told if answer.strip()]


def _learned(methods: Sequence[MethodRuns]) -> str:
    ranked = _ranked(methods, learned, "%")
    return f"A new task, right after learning it, mean over tasks: {ranked}." if ranked else _unscored(methods)


def _lost(methods: Sequence[MethodRuns]) -> str:
    past, kept = _ranked(methods, transfer, "points", "+"), _ranked(methods, held_out_change, "points", "+")
    names = listed(list(dict.fromkeys(name for one in methods for name in one.record.retention)))
    first = f"Earlier tasks by the end of the stream: {past}." if past else ""
    return f"{first} {f'What is held out ({names}): {kept}.' if kept else ''}"


def _end(methods: Sequence[MethodRuns]) -> str:
    ranked = _ranked(methods, at_end, "%")
    before = next((found for one in methods if (found := one.estimate(_before))), None)
    start = f"; before training {percent(before.mean)} %" if before else ""
    return f"All tasks after the last one: {ranked}{start}." if ranked else ""


def _chance(reference: Reference, methods: Sequence[MethodRuns]) -> str:
    known = [(one, reference.gaps[one.index]) for one in methods if one.index in reference.gaps]
    known = [(one, each) for one, each in known if each.mean is not None]
    if not known:
        return ""
    if len(known) == 1:
        return _one_gap(reference.runs, *known[0])
    above = [one.label for one, each in known if each.beyond_chance and (each.mean or 0) > 0]
    below = [one.label for one, each in known if each.beyond_chance and (each.mean or 0) < 0]
    level = [one.label for one, each in known if not each.beyond_chance]
    sides = {"above it": above, "below it": below, "not told apart from it": level}
    told = ". ".join(f"{where[0].upper()}{where[1:]}: {'; '.join(labels)}" for where, labels in sides.items() if labels)
    alone = "" if all(each.seeds for _, each in known) else " Over test rows alone where there is one seed."
    return f"Against {reference.runs.label}. {told}.{alone}"


def _one_gap(reference: MethodRuns, one: MethodRuns, found: Gap) -> str:
    where = "above" if (found.mean or 0) >= 0 else "below"
    sure = "more than chance" if found.seeds else "more than chance over test rows alone"
    verdict = sure if found.beyond_chance else "which may be chance"
    return f"{one.label} ends {where} {reference.label} by {found.told()} points (95 % intervals), {verdict}."


def _ranked(methods: Sequence[MethodRuns], figure: Measure, unit: str, sign: str = "") -> str:
    """Return the methods from the highest figure to the lowest; those without it are left out."""
    known = [(found, one) for one in methods if (found := one.estimate(figure))]
    ranked = sorted(known, key=lambda pair: -pair[0].mean)
    told = [f"{told_apart(one)} {found.told(sign)} {unit}" for found, one in ranked]
    return "; ".join(told if len(told) <= MOST else [*told[:3], f"... last {told[-1]}"])


def _unscored(methods: Sequence[MethodRuns]) -> str:
    labels = [one.label for one in methods if one.estimate(at_end) is None]
    return f"{listed(labels)} {'has' if len(labels) == 1 else 'have'} no complete score." if labels else ""


def _before(cell: RunRecord) -> float | None:
    scores = cell.matrix.scores[0]
    return None if np.isnan(scores).any() else float(scores.mean())
