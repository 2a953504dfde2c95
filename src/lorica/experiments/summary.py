"""What is printed when a run has ended, and where its report is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorica.experiments.results import RUN
from lorica.report import summary_text, write_report


def conclusion(records: Sequence[dict[str, Any]], output_dir: Path) -> str:
    """Write the report of all runs below a folder and return the lines that end the command.

    Args:
        records: the runs of this command, for the table.
        output_dir: its ``run.json`` files, also those of earlier commands, go into the report.
    """
    page = write_report(sorted(output_dir.rglob(RUN)), output_dir)
    return f"\n{summary_text(records)}\n\nreport: {page}"
