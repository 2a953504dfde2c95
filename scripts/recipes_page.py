"""Write the pages of the recipes' results and the tables of docs/recipes.md, from the kept records alone.

    python scripts/recipes_page.py

reads ``docs/results/recipes/*.json`` (see collect_runs.py), writes a page beside each and puts each one's table
between its marks in ``docs/recipes.md``.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

from lorica.report import read_records, write_report
from lorica.report.compare import comparisons, ranked
from lorica.report.records import RunRecord
from lorica.report.replicates import replicates
from lorica.report.tables import Table
from lorica.report.text import summary_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs" / "results" / "recipes", ROOT / "docs" / "recipes.md"
SAME = "learning rate"
"""A column that says the same in every row, for one rate was given to all."""


def write_page(records: Path) -> None:
    """Write the report of a file of records beside it."""
    with tempfile.TemporaryDirectory() as folder:
        page = write_report(json.loads(records.read_text(encoding="utf-8")), folder)
        shutil.copyfile(page, records.with_suffix(".html"))


def tables(records: Path) -> str:
    """Return a table of methods for each model in a file of records, under the model's name and scores before."""
    runs = [one for one in read_records(json.loads(records.read_text(encoding="utf-8"))) if isinstance(one, RunRecord)]
    return "\n\n".join(_table(group) for group in comparisons(runs))


def _table(group: list[RunRecord]) -> str:
    methods = ranked(replicates(group))
    found = summary_table(methods)
    kept = [j for j, name in enumerate(found.header) if name != SAME]
    table = Table([found.header[j] for j in kept], [[row[j] for j in kept] for row in found.rows])
    seconds = sum(record.cost.seconds or 0.0 for record in group)
    before = {name: score for name, score in zip(group[0].tasks, group[0].scores[0], strict=True) if score is not None}
    untrained = ", ".join(f"{name} {score:.1f}" for name, score in before.items())
    lead = f"{group[0].model}, {len(group)} runs, {seconds / 60:.0f} minutes. Before training: {untrained}."
    return f"{lead}\n\n{table.markdown()}"


def with_table(page: str, name: str, table: str) -> str:
    """Return a page with a table between its marks.

    Raises:
        SystemExit: the page has no marks for it.
    """
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if start not in page or end not in page:
        raise SystemExit(f"{PAGE}: no place for {name}; put the lines {start} and {end} where its table belongs")
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{start}\n{table}\n{end}", page)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for records in sorted(RESULTS.glob("*.json")):
        write_page(records)
        page = with_table(page, records.stem, tables(records))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
