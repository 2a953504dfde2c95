"""Reports rebuilt from run records: terminal tables, one HTML page, Markdown. Never imports torch."""

from __future__ import annotations

from lorica.report.page import write_report
from lorica.report.reading import read_record, read_records
from lorica.report.text import metrics_table, retention_table, side_by_side, summary_text

__all__ = [
    "metrics_table",
    "read_record",
    "read_records",
    "retention_table",
    "side_by_side",
    "summary_text",
    "write_report",
]
