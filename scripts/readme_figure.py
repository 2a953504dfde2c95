"""Draw the figure of the README from the demo's run records.

    lorica demo && python scripts/readme_figure.py lorica-demo --output docs/demo.svg

Two panels from ``*/run.json`` alone: what is left of the held-out ability after each task, and the score on
each task right after learning it. The picture stands alone, light and dark.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

from lorica.report import read_records
from lorica.report.charts import Series, line_chart
from lorica.report.records import RunRecord

GAP = 30


def short(record: RunRecord) -> str:
    """Return a label that fits at the end of a line."""
    return record.label if len(record.label) <= 12 else record.method


def panels(records: list[RunRecord]) -> list[str]:
    """Return the two charts."""
    ability = next(iter(records[0].retention))
    kept = [Series(short(r), i, list(enumerate(r.retention[ability]))) for i, r in enumerate(records)]
    learned = [
        Series(short(r), i, [(j, float(y)) for j, y in enumerate(r.matrix.diagonal, 1)]) for i, r in enumerate(records)
    ]
    return [
        line_chart(
            kept, title="Kept", description="Held-out recall over the stream", x_title="tasks learned",
            y_title=f"kept: {ability}, % (never trained on)",
        ),
        line_chart(
            learned, title="Learned", description="Score right after learning each task", x_title="task",
            y_title="learned: each new task, % (right after it)", least=100,
        ),
    ]  # fmt: skip


def figure(charts: list[str]) -> str:
    """Place the charts side by side in one SVG that brings its own style."""
    style = (files("lorica.report") / "page.css").read_text(encoding="utf-8")
    font = 'svg { font-family: system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; background: var(--paper); }'
    size = charts[0].split('viewBox="', 1)[1].split('"', 1)[0].split()
    width, height = float(size[2]), float(size[3])
    placed = [
        str(chart).replace("<svg ", f'<svg x="{index * (width + GAP):g}" width="{width:g}" height="{height:g}" ', 1)
        for index, chart in enumerate(charts)
    ]
    total = len(charts) * (width + GAP) - GAP
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-16 -8 {total + 32:g} {height + 16:g}"'
    return f"{frame}><style>{style}\n{font}</style>{''.join(placed)}</svg>\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of lorica demo")
    parser.add_argument("--output", type=Path, default=Path("docs/demo.svg"))
    options = parser.parse_args()
    found = read_records([options.folder / "seqft" / "run.json", options.folder / "osft" / "run.json"])
    records = [record for record in found if isinstance(record, RunRecord)]
    options.output.write_text(figure(panels(records)), encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    main()
