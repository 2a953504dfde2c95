"""Tables of the comparisons on real text, whose settings were chosen on rows cut from train."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from lorica.report.tables import Table
from lorica.units import size

Row = dict[str, Any]
MEASURES = ("all", "learned")


def by_entry(rows: Iterable[Row], what: str) -> list[list[Row]]:
    """Return the rows of one kind, ``tried`` or ``measured``, entry by entry in the order of the file."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        if row["what"] == what:
            grouped.setdefault(row["entry"], []).append(row)
    return list(grouped.values())


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation as text."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def measured_table(rows: Sequence[Row]) -> str:
    """Return a row for each entry, the highest mean at the end first: mean and standard deviation over the seeds."""
    found = sorted(by_entry(rows, "measured"), key=lambda own: -mean(row["all"] for row in own))
    head = ["method", "all at the end", "learned", "carried", "seconds", "setting", "rate", "seeds"]
    told = [
        [own[0]["label"], *(spread([row[measure] for row in own]) for measure in MEASURES), size(own[0]["carried"]),
         f"{mean(row['seconds'] for row in own):.0f}", own[0]["setting"], f"{own[0]['rate']:g}", str(len(own))]
        for own in found
    ]  # fmt: skip
    return Table(head, told, words=(6,)).markdown()


def validated_table(rows: Sequence[Row]) -> str:
    """Return the validation scores that settings and rates were chosen by."""
    labels = {own[0]["entry"]: own[0]["label"] for own in by_entry(rows, "measured")}
    told = []
    for own in by_entry(rows, "tried"):
        best = max((row for row in own if row["all"] is not None), key=lambda row: row["all"])
        for row in own:
            scores = ["-" if row[measure] is None else f"{row[measure]:.1f}" for measure in MEASURES]
            told.append([labels.get(row["entry"], row["entry"]), row["setting"], f"{row['rate']:g}", *scores,
                         "chosen" if row is best else ""])  # fmt: skip
    return Table(["method", "setting", "rate", *MEASURES, ""], told, left=2, words=(5,)).markdown()
