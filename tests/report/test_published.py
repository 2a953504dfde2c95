"""Published rows beside ours: never silently mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorica.errors import LoricaError
from lorica.report import write_report
from lorica.report.departures import BENCHMARKS, departures, read_protocol
from lorica.report.parts import Section
from lorica.report.published import published_rows, published_section
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

PROTOCOL = {"rows": {"a": {"train": 50, "test": 9}}, "beside": "Ours are written by hand."}


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks" / "letters"
    folder.mkdir(parents=True)
    (folder / "published.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (folder / "protocol.json").write_text(json.dumps(PROTOCOL), encoding="utf-8")
    return tmp_path / "benchmarks"


def section(folder: Path, orders: str = "12", **changes: Any) -> Section:
    cells = [RunRecord.model_validate(cell("osft", order, 0, (80, 90, 60), **changes)) for order in orders]
    found = published_section(replicates(cells), folder)
    assert found is not None
    return found


def verdicts(found: Section) -> dict[str, str]:
    assert found.table is not None
    place = found.table.header.index("like for like")
    tables = [found.table, *(table for _, table in found.details if "source" in table.header)]
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
        ({"config": {"settings": {"training": {"max_steps": 6}}}}, "training settings of our own: max_steps 6"),
        ({"config": {"run": {"stream": "mine/letters.yaml"}}}, "a stream file of our own"),
        ({"data": {"a": {"train": {"rows_read": 40}}}}, "40 train rows instead of 50 in a"),
        ({"data": {"b": {"test": {"from_hub": True}}}}, "rows of the hub, not the benchmark's own: b"),
        ({"data": {"b": {"test": {"loss": "class"}}}}, "a classification head in place of written answers"),
    ],
)
def test_every_departure_is_a_reason(change: dict[str, Any], reason: str, benchmarks: Path) -> None:
    found = section(benchmarks, **change)
    assert reason in found.intro
    told = verdicts(found)
    assert told["ours: OSFT, tiny"] == "no: see above"
    assert told["SeqFT, Tiny"] == "no: ours differs, see above"


def test_a_run_of_the_benchmark_s_own_rows_is_no_departure(benchmarks: Path) -> None:
    data = {"a": {"train": {"rows_read": 50, "from_hub": False}, "test": {"rows_read": 9}}, "c": {"test": {}}}
    found = section(benchmarks, data=data, config={"run": {"stream": "letters", "training": {}}, "settings": {}})
    assert verdicts(found)["ours: OSFT, tiny"] == "yes"
    assert found.intro.startswith("Like for like: ")
    assert found.intro.endswith("constraints. Ours are written by hand."), "what differs anyway is always said"


@pytest.mark.parametrize(
    ("fact", "reason"),
    [("needs_old_data", "keeps rows of past tasks"), ("needs_task_id", "is told which task a row belongs to")],
)
def test_ours_is_asked_what_theirs_is_asked(fact: str, reason: str, benchmarks: Path) -> None:
    assert verdicts(section(benchmarks, facts={fact: True}))["ours: OSFT, tiny"] == f"no: {reason}"


def test_a_caveat_does_not_hide_that_ours_differs(benchmarks: Path) -> None:
    rows = [ROWS[0] | {"caveat": "a note"}, ROWS[1]]
    (benchmarks / "letters" / "published.json").write_text(json.dumps(rows), encoding="utf-8")
    assert verdicts(section(benchmarks))["SeqFT, Tiny"] == "yes: a note"
    told = verdicts(section(benchmarks, left_out=["c"]))
    assert told["SeqFT, Tiny"] == "no: ours differs, see above; a note"
    assert told["Replay, Tiny"] == "no: keeps rows of past tasks"


def test_every_method_has_to_have_run_in_every_order(benchmarks: Path) -> None:
    cells = [RunRecord.model_validate(cell("osft", order, 0, (80, 90, 60))) for order in "12"]
    cells.append(RunRecord.model_validate(cell("seqft", "1", 0, (80, 90, 60))))
    assert departures(replicates(cells), ["1", "2"]) == ["not in order 2"]


def test_an_order_that_did_not_run_is_a_reason(benchmarks: Path) -> None:
    found = section(benchmarks, orders="1")
    assert "not in order 2" in found.intro
    assert found.table is not None
    assert found.table.rows[0][:4] == ["ours: OSFT, tiny", "75.0", "-", "75.0"]
    assert found.table.rows[1][:4] == ["SeqFT, Tiny", "74.4", "77.0", "75.7"]


def test_rows_of_other_models_are_folded(benchmarks: Path) -> None:
    details = dict(section(benchmarks).details)
    assert [row[0] for row in details["1 results of other models"].rows] == ["OSFT, Huge-7B"]
    assert details["Task by task"].rows == [
        ["ours: OSFT", "75.0", "75.0", "yes"], ["OSFT, Huge-7B", "79.0", "-", "no: another model"],
    ]  # fmt: skip
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


def test_a_protocol_that_is_none_names_its_file(benchmarks: Path) -> None:
    assert read_protocol("others", benchmarks).rows == {}
    (benchmarks / "letters" / "protocol.json").write_text('{"rows": 1}')
    with pytest.raises(LoricaError, match=r"protocol\.json: not a protocol"):
        read_protocol("letters", benchmarks)


@pytest.mark.parametrize(("name", "tasks", "scored"), [("cl-standard", 4, 30400), ("cl-long", 15, 70861)])
def test_the_protocols_have_the_rows_of_the_benchmarks(name: str, tasks: int, scored: int) -> None:
    rows = read_protocol(name).rows
    assert len(rows) == tasks
    assert sum(parts["test"] for parts in rows.values()) == scored


@pytest.mark.parametrize(
    ("name", "label", "model"),
    [("trace", "OSFT", "LLaMA-2-7B-Chat"), ("trace", "LoRASeqFT", "LLaMA-2-7B-Chat"),
     ("cl-standard", "OSFT", "T5-large"), ("cl-long", "OSFT", "T5-large")],
)  # fmt: skip
def test_figures_of_another_protocol_are_marked_so(name: str, label: str, model: str) -> None:
    (row,) = [row for row in published_rows(name) if (row.label, row.model) == (label, model)]
    assert not row.like_for_like
    assert row.caveat


def test_general_abilities_stand_beside_those_after_the_same_stream(tmp_path: Path) -> None:
    record = cell(
        "osft", "1", 0, (80, 90, 60), stream="trace", tasks=ORDERS["1"], retention={"mmlu": [46.0, 45.0, 44.0]}
    )
    write_report([record], tmp_path)
    found = (tmp_path / "report.md").read_text().split("## General ability beside published figures")[1].split("## ")[0]
    assert "| ours: OSFT | 44.0 | - | - | - | - | - | -2.0 | mean change over mmlu alone |" in found
    assert "| SeqFT | 46.4 | 3.5 | 30.1 | 33.2 | 77.9 | 76.5 | -2.6 |" in found, "every column"
    write_report([record | {"stream": "another"}], tmp_path)
    assert "General ability beside" not in (tmp_path / "report.md").read_text()


def test_departures_of_a_plain_run_are_none() -> None:
    methods = replicates([RunRecord.model_validate(cell("osft", "1", 0, (80, 90, 60)))])
    assert departures(methods, ["1"]) == []
