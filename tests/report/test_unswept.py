"""A comparison says whose learning rate nobody chose."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorica.report import write_report
from tests.report.conftest import run_record

SAID = "These runs chose no learning rate for"


@pytest.mark.parametrize(
    ("settings", "said"),
    [({}, f"{SAID} any method"), ({"learning_rate": 1e-3}, ""), ({"learning_rate": 1e-4}, f"{SAID} any method")],
    ids=["default rate", "rate of the settings", "another rate than the settings'"],
)
def test_a_rate_counts_as_chosen_where_the_settings_bring_it(
    settings: dict[str, float], said: str, tmp_path: Path
) -> None:
    config = {"settings": settings}
    records = [run_record(method, learning_rate=1e-3, config=config) for method in ("osft", "seqft")]
    write_report(records, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert (SAID in text) == bool(said)
    assert said in text
