"""Put the comparisons on the test beds into docs/retention.md and draw their pictures, from the kept results alone.

    python scripts/retention_page.py

reads ``docs/results/retention``. ``knowledge.json`` and ``many.json`` (written by ``benchmarks.retention.compare
collect``) hold of each entry of the grid the cells on the bed that settings were chosen on, and the chosen one on the
others; only the others are shown as results. ``text.json`` and ``encoder.json`` are real text: see
``retention_text.py``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from readme_figure import figure
from retention_text import measured_table, validated_table
from speed_page import filled

from lorica.report.pareto import Spot, scatter
from lorica.report.tables import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "retention"
PAGE = ROOT / "docs" / "retention.md"
BEDS = {"knowledge": "retention.svg", "many": "retention-many.svg"}
"""Results of compare.py, each with its picture."""

TEXTS = ("text", "encoder")
"""Results of compare_text.py."""

MEASURES = ("all", "learned", "base", "skills")
NAMES = {
    "replay-1": "replay, 1 % of all old rows",
    "replay-5": "replay, 5 %",
    "replay-20": "replay, 20 %",
    "replay-5-osft": "replay, 5 %, and OSFT, curvature",
}
"""Of entries whose label is that of another one, for only their rows differ."""

Cell = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """What the grid calls an entry: all cells that were tried, and the chosen one on each bed it was measured on."""

    name: str
    tried: Sequence[Cell]
    measured: Sequence[Cell]

    @property
    def label(self) -> str:
        return NAMES.get(self.name, str(self.tried[0]["label"]))

    def values(self, measure: str) -> list[float]:
        return [float(cell[measure]) for cell in self.measured]

    def told(self, measure: str) -> str:
        values = self.values(measure)
        return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def entries(cells: Sequence[Cell]) -> list[Entry]:
    """Return the entries that were measured, the highest mean recall first.

    The bed that settings were chosen on is that of the first cell.
    """
    chosen_on = cells[0]["bed"]
    grouped: dict[str, tuple[list[Cell], list[Cell]]] = {}
    for cell in cells:
        grouped.setdefault(cell["entry"], ([], []))[cell["bed"] != chosen_on].append(cell)
    found = [Entry(name, tried, measured) for name, (tried, measured) in grouped.items() if measured]
    return sorted(found, key=lambda one: -mean(one.values("all")))


def results_table(found: Sequence[Entry]) -> str:
    """Return a row for each entry: mean and standard deviation over the beds."""
    head = ["method", *MEASURES, "seconds", "setting", "rate"]
    rows = [
        [one.label, *map(one.told, MEASURES), f"{mean(one.values('seconds')):.0f}", one.measured[0]["setting"],
         f"{one.measured[0]['rate']:g}"]
        for one in found
    ]  # fmt: skip
    return Table(head, rows, words=(6,)).markdown()


def tried_table(found: Sequence[Entry]) -> str:
    """Return every cell that settings were chosen from."""
    rows = []
    for one in found:
        best = max(one.tried, key=lambda cell: cell["all"])
        for cell in one.tried:
            figures = [f"{cell[measure]:.1f}" for measure in MEASURES]
            rows.append([one.label, cell["setting"], f"{cell['rate']:g}", *figures, "chosen" if cell is best else ""])
    return Table(["method", "setting", "rate", *MEASURES, ""], rows, left=2, words=(7,)).markdown()


def picture(found: Sequence[Entry]) -> str:
    """Return two panels: learning against what is left of everything, and of what the base knew."""
    panels = [
        scatter(
            [Spot(one.name, number, mean(one.values("learned")), mean(one.values(measure)), None, _ends(one, measure))
             for number, one in enumerate(found)],
            title=title, description=f"{title}: a point per method, bars over the beds",
            x_title="learned, %", y_title=title,
        )
        for measure, title in (("all", "all sets at the end, %"), ("base", "the base's own facts at the end, %"))
    ]  # fmt: skip
    return figure([str(panel) for panel in panels])


def _ends(one: Entry, measure: str) -> tuple[float, float]:
    values = one.values(measure)
    return min(values), max(values)


def read(name: str) -> list[Cell]:
    """Return the kept results of a bed; nothing where there are none."""
    file = RESULTS / f"{name}.json"
    cells: list[Cell] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return cells


def files() -> dict[Path, str]:
    """Return every file that is made of the results, with what is to be in it."""
    parts, pictures = {}, {}
    for name, drawn in BEDS.items():
        if cells := read(name):
            found = entries(cells)
            parts |= {name: results_table(found), f"{name}-tried": tried_table(found)}
            pictures[PAGE.parent / drawn] = picture(found)
    for name in TEXTS:
        if cells := read(name):
            parts |= {name: measured_table(cells), f"{name}-tried": validated_table(cells)}
    return {PAGE: filled(PAGE.read_text(encoding="utf-8"), parts)} | pictures


def main() -> None:
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
