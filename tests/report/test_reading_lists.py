"""A file may hold a list of records, as kept results do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorica.errors import LoricaError
from lorica.report import read_records
from tests.report.conftest import run_record


def test_a_list_of_records_is_read_like_files_of_one(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps([run_record(seed=0), run_record(seed=1)]))
    assert [record.seed for record in read_records([kept])] == [0, 1]  # type: ignore[union-attr]


def test_what_is_no_record_in_it_is_refused(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text("[3]")
    with pytest.raises(LoricaError, match=r"kept\.json: a run record is a JSON object, this list holds a int"):
        read_records([kept])
