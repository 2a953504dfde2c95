"""Write the pages of the recipes' results and the tables of docs/recipes.md, from the kept records alone.

    python scripts/recipes_page.py

reads ``docs/results/recipes/*.json`` (see collect_runs.py), writes a page beside each and puts each one's table
between its marks in ``docs/recipes.md``.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from lorica.report import read_records, write_report
from lorica.report.compare import comparisons, ranked
from lorica.report.records import RunRecord
from lorica.report.replicates import replicates
from lorica.report.tables import Table, percent
from lorica.report.text import summary_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs" / "results" / "recipes", ROOT / "docs" / "recipes.md"
SAME = "learning rate"
"""A column that says the same in every row, for one rate was given to all."""


def write_page(kept: Path) -> None:
    """Write the report of a file of records beside it."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(write_report([kept], folder), kept.with_suffix(".html"))


def tables(kept: Path) -> str:
    """Return a table of methods for each model in a file of records, with what it scored before training."""
    runs = [record for record in read_records([kept]) if isinstance(record, RunRecord)]
    return "\n\n".join(_table(group) for group in comparisons(runs))


def _table(group: list[RunRecord]) -> str:
    found = summary_table(ranked(replicates(group)))
    kept = [column for column, name in enumerate(found.header) if name != SAME]
    table = Table([found.header[j] for j in kept], [[row[j] for j in kept] for row in found.rows])
    minutes = sum(record.cost.seconds or 0.0 for record in group) / 60
    before = zip(group[0].tasks, group[0].scores[0], strict=True)
    untrained = ", ".join(f"{task} {percent(score)}" for task, score in before)
    return (
        f"{len(group)} runs of {group[0].model}, {minutes:.0f} minutes. Before training: {untrained}."
        f"\n\n{table.markdown()}"
    )


def with_table(page: str, mark: str, table: str) -> str:
    """Return a page with a table between the marks of that name."""
    pattern = re.compile(rf"(<!-- {re.escape(mark)}: scripts/recipes_page\.py -->\n).*?(\n<!-- end -->)", re.S)
    if not pattern.search(page):
        raise SystemExit(f"{PAGE.name} has no marks for the table of {mark}")
    return pattern.sub(lambda found: found[1] + table + found[2], page)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for kept in sorted(RESULTS.glob("*.json")):
        write_page(kept)
        page = with_table(page, kept.stem, tables(kept))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
