"""The spectra with the cut: there where a record holds them, and only there."""

from __future__ import annotations

import copy
from pathlib import Path

from lorica.report import write_report
from tests.report.conftest import run_record


def test_the_cut_is_drawn_at_k(tmp_path: Path) -> None:
    record = copy.deepcopy(run_record())
    for leak in record["leakage"]:
        leak |= {"shape": [8, 4], "k": 2, "spectrum": {"index": [0, 1, 2, 3], "sigma": [4.0, 3.0, 2.0, 1.0]}}
    write_report([record], tmp_path)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "The spectra and the cut" in page
    assert "k = 2 of 4" in page
    assert "| 2 | 4 | 0.5 |" in text, "at the cut half of the largest value is left"


def test_without_spectra_there_is_no_section(tmp_path: Path) -> None:
    write_report([run_record()], tmp_path)
    assert "The spectra" not in (tmp_path / "report.html").read_text()
