"""Published rows beside ours: never silently mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorica.errors import LoricaError
from lorica.report import write_report
from lorica.report.parts import Section
from lorica.report.published import BENCHMARKS, departures, published_rows, published_section
from lorica.report.records import RunRecord
from lorica.report.replicates import replicates
from tests.report.test_comparison import ORDERS, cell

ROWS = [
    {"method": "seqft", "label": "SeqFT", "model": "Tiny", "metrics": {"average_accuracy": 75.7}, "source": "A paper",
     "caveat": "", "like_for_like": True, "orders": {"1": 74.4, "2": 77.0}},
    {"method": "replay", "label": "Replay", "model": "Tiny", "metrics": {"average_accuracy": 57.8}, "source": "A paper",
     "caveat": "keeps rows of past tasks", "like_for_like": False},
    {"method": "osft", "label": "OSFT", "model": "Huge-7B", "source": "B paper", "like_for_like": True,
     "metrics": {"average_accuracy": 80.0, "backward_transfer": -7.1}, "tasks": {"a": 79.0}},
]  # fmt: skip


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks" / "letters"
    folder.mkdir(parents=True)
    (folder / "published.json").write_text(json.dumps(ROWS), encoding="utf-8")
    return tmp_path / "benchmarks"


def section(folder: Path, orders: str = "12", **changes: Any) -> Section:
    cells = [RunRecord.model_validate(cell("osft", order, 0, (80, 90, 60), **changes)) for order in orders]
    found = published_section(replicates(cells), folder)
    assert found is not None
    return found


def verdicts(found: Section) -> dict[str, str]:
    assert found.table is not None
    place = found.table.header.index("like for like")
    tables = [found.table, *(table for _, table in found.details if "like for like" in table.header)]
    return {row[0]: row[place] for table in tables for row in table.rows}


def test_like_for_like_needs_everything_to_match(benchmarks: Path) -> None:
    assert verdicts(section(benchmarks)) == {
        "ours: OSFT, tiny": "yes",
        "SeqFT, Tiny": "yes",
        "Replay, Tiny": "no: keeps rows of past tasks",
        "OSFT, Huge-7B": "no: another model",
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"left_out": ["c"]}, "without c"),
        ({"config": {"run": {"max_train_rows": 9}}}, "at most 9 training rows of each task"),
        ({"config": {"run": {"max_test_rows": 9}}}, "at most 9 scored rows of each task"),
        ({"config": {"run": {"training": {"max_steps": 5}}}}, "training settings of our own: max_steps 5"),
    ],
)
def test_every_departure_is_a_reason(change: dict[str, Any], reason: str, benchmarks: Path) -> None:
    found = section(benchmarks, **change)
    assert reason in found.intro
    told = verdicts(found)
    assert told["ours: OSFT, tiny"] == "no: see above"
    assert told["SeqFT, Tiny"] == "no: ours differs, see above"


def test_an_order_that_did_not_run_is_a_reason(benchmarks: Path) -> None:
    found = section(benchmarks, orders="1")
    assert "not in order 2" in found.intro
    assert found.table is not None
    assert found.table.rows[0][:4] == ["ours: OSFT, tiny", "75.0", "-", "75.0"]
    assert found.table.rows[1][:4] == ["SeqFT, Tiny", "74.4", "77.0", "75.7"]


def test_rows_of_other_models_are_folded(benchmarks: Path) -> None:
    details = dict(section(benchmarks).details)
    assert [row[0] for row in details["1 results of other models"].rows] == ["OSFT, Huge-7B"]
    assert details["Task by task"].rows == [["ours: OSFT", "75.0", "75.0"], ["OSFT, Huge-7B", "79.0", "-"]]
    assert [row[0] for row in section(benchmarks, model="other").table.rows] == [  # type: ignore[union-attr]
        "ours: OSFT, other", "OSFT, Huge-7B",
    ], "of no row of our model, the model with most of our methods"  # fmt: skip


def test_only_a_benchmark_of_that_name_has_rows(benchmarks: Path) -> None:
    assert published_rows("others", benchmarks) == []
    assert published_rows("../benchmarks/letters", benchmarks) == []
    (benchmarks / "letters" / "published.json").write_text('[{"method": 1}]')
    with pytest.raises(LoricaError, match=r"published\.json: not a list of published results"):
        published_rows("letters", benchmarks)


def test_the_files_that_come_with_lorica_are_read() -> None:
    names = [folder.name for folder in BENCHMARKS.iterdir() if (folder / "published.json").is_file()]
    assert {"cl-standard", "cl-long", "trace", "general"} <= set(names)
    for name in names:
        rows = published_rows(name)
        assert rows
        assert all(row.source and row.model and (row.metrics or row.orders or row.tasks) for row in rows), name


def test_general_abilities_stand_beside_those_after_the_same_stream(tmp_path: Path) -> None:
    record = cell(
        "osft", "1", 0, (80, 90, 60), stream="trace", tasks=ORDERS["1"], retention={"mmlu": [46.0, 45.0, 44.0]}
    )
    write_report([record], tmp_path)
    found = (tmp_path / "report.md").read_text().split("## General ability beside published figures")[1].split("## ")[0]
    assert "| ours: OSFT | 44.0 | - | - | - | - | - | -2.0 |" in found
    assert "| SeqFT | 46.4 | 3.5 | 30.1 | 33.2 | 77.9 | 76.5 | -2.6 |" in found, "every column"
    write_report([record | {"stream": "another"}], tmp_path)
    assert "General ability beside" not in (tmp_path / "report.md").read_text()


def test_departures_of_a_plain_run_are_none() -> None:
    methods = replicates([RunRecord.model_validate(cell("osft", "1", 0, (80, 90, 60)))])
    assert departures(methods, ["1"]) == []
