"""Every row of docs/reliability.md is shown by a test or answered, and the page says which."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.marks import TESTS, marked

ROOT = TESTS.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    return importlib.import_module("reliability_page")


def test_both_scorecards_are_whole(script: Any) -> None:
    cards = script.scorecards()
    assert list(cards["reliability"]) == [f"R{i}" for i in range(1, 35)]
    assert list(cards["security"]) == [f"S{i}" for i in range(1, 21)]


def test_every_row_has_a_test_or_an_answer(script: Any) -> None:
    tests = marked()
    rows = {row: told for card in script.scorecards().values() for row, told in card.items()}
    assert [row for row, told in rows.items() if not tests.get(row) and "answer" not in told] == []
    assert tests.keys() <= rows.keys(), "a mark names no row"


def test_the_page_is_what_the_script_makes_of_it(script: Any) -> None:
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.page(text) == text, "run python scripts/reliability_page.py"


def test_marks_are_found_where_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = importlib.import_module("tests.reliability.marks")
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_a.py").write_text(
        '@pytest.mark.reliability("R1", "S2")\ndef test_one(): ...\n\n@pytest.mark.slow\ndef test_two(): ...\n'
    )
    (folder / "test_b.py").write_text('pytestmark = [pytest.mark.slow, pytest.mark.reliability("R1")]\n')
    monkeypatch.setattr(marks, "TESTS", folder)
    found = marks.marked()
    assert found == {"R1": ["tests/test_a.py::test_one", "tests/test_b.py::(all)"], "S2": ["tests/test_a.py::test_one"]}
