"""Put the demo's comparison of all methods into the README and docs/comparison.md, from the kept records alone.

    python scripts/comparison_page.py

reads ``docs/results/demo-comparison.json`` (see collect_runs.py and benchmarks/recipes/demo-comparison.yaml), draws
``docs/comparison.svg``, writes the page ``docs/results/demo-comparison.html`` and puts the tables between their marks.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from readme_figure import figure

from lorica.report import read_records, write_report
from lorica.report.compare import ranked
from lorica.report.records import MethodFacts, RunRecord
from lorica.report.replicates import MethodRuns, at_end, held_out_change, learned, replicates, transfer
from lorica.report.tables import Table
from lorica.report.tradeoff import trade_section

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "results" / "demo-comparison.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "comparison.md")


def methods() -> list[MethodRuns]:
    """Return the methods of the kept records, the best average at the end first."""
    return ranked(replicates([record for record in read_records([KEPT]) if isinstance(record, RunRecord)]))


def results_table(found: list[MethodRuns]) -> str:
    """Return one line for each method: what it learned, kept and carried."""
    head = ["method", "learned", "at the end", "backward transfer", "atlas, change", "rate", "carried", "needs"]
    return Table(head, [_row(one) for one in found]).markdown()


def _row(one: MethodRuns) -> list[str]:
    figures = [one.estimate(measure) for measure in (learned, at_end, transfer, held_out_change)]
    record, facts = one.record, one.record.facts or MethodFacts()
    needs = [what for what, needed in (("old rows", facts.needs_old_data), ("task id", facts.needs_task_id)) if needed]
    told = ["-" if figure is None else figure.told() for figure in figures]
    return [one.label, *told, f"{record.learning_rate:g}", _size(max(record.carried_bytes)), ", ".join(needs)]


def _size(count: int) -> str:
    return "0" if not count else f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def sweep_table(found: list[MethodRuns]) -> str:
    """Return what every rate of every grid gave on the rows cut from train: average at the end, and learned."""
    rows = []
    for one in found:
        sweep = one.record.sweep
        if sweep is None:
            continue
        for rate, figures in sweep.validation.items():
            ends = [f"{first - last:.1f}" for first, last in figures.retention.values() if None not in (first, last)]
            chosen = "chosen" if float(rate) == sweep.selected else ""
            rows.append([one.label, rate, _percent(figures.average_accuracy), _percent(figures.learning_accuracy),
                         ", ".join(ends), chosen])  # fmt: skip
    return Table(["method", "rate", "at the end", "learned", "points of the atlas lost", ""], rows).markdown()


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def with_table(page: str, mark: str, table: str) -> str:
    """Return a page with the table between the marks of that name."""
    pattern = re.compile(rf"(<!-- {mark}: scripts/comparison_page\.py -->\n).*?(\n<!-- end -->)", re.S)
    return pattern.sub(lambda found: found[1] + table + found[2], page)


def main() -> None:
    found = methods()
    section = trade_section(found)
    assert section is not None
    (ROOT / "docs" / "comparison.svg").write_text(figure([str(one.svg) for one in section.figures]), encoding="utf-8")
    tables = {"comparison": results_table(found), "sweep": sweep_table(found)}
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        for mark, table in tables.items():
            page = with_table(page, mark, table)
        path.write_text(page, encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(write_report([KEPT], folder), KEPT.with_suffix(".html"))


if __name__ == "__main__":
    main()
