"""Forgetting as predicted beside what was measured: points, diagonal, tables; nothing where no record holds any."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.report import write_report
from lorica.report.foreseen import Foreseen, log_scatter
from lorica.report.parts import Entry
from lorica.report.records import PredictedForgetting, TrainRecord
from tests.report.conftest import TASKS, run_record, train_record

HEADING = "Forgetting, predicted and measured"


def told(task: str, predicted: float | None, measured: float | None, **changes: Any) -> dict[str, Any]:
    shares = {
        "inputs": {"protected": 0.9, "random": 0.5, "best": 0.95},
        "outputs": {"protected": 0.6, "random": 0.5, "best": 0.8},
        "expected": 0.04,
    }
    found = {"task": task, "predicted": predicted, "measured": measured, "tokens": 8192, "shares": shares}
    return found | {"by_kind": {"mlp.up_proj": 0.001, "self_attn.q_proj": 0.002}} | changes


def pages(records: list[dict[str, Any]], folder: Path) -> tuple[str, str]:
    write_report(records, folder)
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    return page, text[text.index(f"## {HEADING}") :] if HEADING in text else ""


def test_every_task_and_seed_is_a_point(tmp_path: Path) -> None:
    records = [
        run_record(seed=seed, predicted_forgetting=[told(task, 0.01 * (1 + seed), 0.02) for task in TASKS])
        for seed in (0, 1)
    ]
    page, text = pages(records, tmp_path)
    assert len(re.findall(r"<title>osft, [a-z ]+, seed \d: predicted", page)) == 2 * len(TASKS)
    assert "10 trainings, each a point; on the dashed line both agree. Measured over predicted: 1 to 2" in text
    assert "| OSFT (activation, 1/2 protected) | 10 | 0.015 | 0.02 | 1.50 |" in text
    assert "| OSFT (activation, 1/2 protected) | colours, seed 1 | 0.02 | 0.02 | 1.00 |" in text


def test_shares_are_means_in_percent(tmp_path: Path) -> None:
    other = {"inputs": {"protected": 0.7, "random": 0.5, "best": 0.85}, "outputs": None, "expected": 0.02}
    found = [told(TASKS[0], 0.1, 0.1), told(TASKS[1], 0.1, 0.1, shares=other)]
    _, text = pages([run_record(predicted_forgetting=found)], tmp_path)
    assert "| OSFT (activation, 1/2 protected) | 80.0 | 50.0 | 90.0 | 60.0 | 50.0 | 80.0 | 3.0 |" in text


def test_one_update_has_a_table_and_no_picture(tmp_path: Path) -> None:
    page, text = pages([train_record(predicted_forgetting=told("", 0.004, 0.005))], tmp_path)
    assert "| 0.0040 | 0.0050 | 1.25 |" in text or "| 4.0e-03 | 5.0e-03 | 1.25 |" in text
    assert "mlp.up\\_proj" in text
    assert "as predicted" not in page


@pytest.mark.parametrize(
    "found", [told("a", None, 0.1), told("a", 0.0, 0.0), told("a", 0.1, -1e-9), told("a", 0.1, None)]
)
def test_what_cannot_be_drawn_is_counted(found: dict[str, Any], tmp_path: Path) -> None:
    drawn = [told(task, 0.01, 0.02) for task in TASKS[:3]]
    page, text = pages([run_record(predicted_forgetting=[*drawn, found])], tmp_path)
    assert "3 trainings, each a point" in text
    assert "1 that did not move, or were not measured, are not drawn." in text
    assert len(re.findall(r"<title>osft, [a-z ]+, seed \d: predicted", page)) == 3
    pages([run_record(predicted_forgetting=[found])], tmp_path / "alone")


def test_records_without_it_have_no_such_section(tmp_path: Path) -> None:
    assert pages([run_record(), train_record()], tmp_path)[1] == ""


positive = st.floats(1e-12, 1e6)


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=6))
def test_points_lie_on_their_side_of_the_diagonal_and_inside(pairs: list[tuple[float, float]]) -> None:
    entry = Entry(TrainRecord.model_validate(train_record()), "OSFT", "osft", 0)
    found = [Foreseen(entry, str(i), PredictedForgetting(predicted=x, measured=y)) for i, (x, y) in enumerate(pairs)]
    svg = str(log_scatter(found, title="t", description="d"))
    numbers = r'x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)" class="reference"'
    left, bottom, right, top = map(float, re.findall(numbers, svg)[0])
    assert right - left == pytest.approx(bottom - top, abs=0.2)
    marks = re.findall(r'd="M([\d.]+) ([\d.]+)a4.5', svg)[: len(pairs)]
    assert len(marks) == len(pairs)
    for (mark_x, mark_y), (x, y) in zip(marks, pairs, strict=True):
        across, up = float(mark_x) + 4.5 - left, bottom - float(mark_y)
        assert -0.2 <= across <= right - left + 0.2
        assert -0.2 <= up <= bottom - top + 0.2
        if abs(math.log10(y / x)) > 0.2:
            assert (up > across) == (y > x)
