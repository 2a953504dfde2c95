"""The benchmarks that come with Lorica: they can be found, read, and ask what their protocols ask."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import AutoTokenizer

import lorica
from lorica.benchmarks import catalogue, find_stream
from lorica.data.scored import Scored
from lorica.data.stream import TaskStream
from lorica.data.task_rows import load_rows
from lorica.errors import LoricaError
from lorica.evaluation.metrics import METRICS, Answer
from lorica.evaluation.scorer import trimmed

MODEL = Path(__file__).resolve().parents[2] / "src" / "lorica" / "assets" / "demo_model"
STREAMS = ["cl-standard", "cl-long", "trace", "general"]


def folder(name: str) -> Path:
    return catalogue()[name].parent


def golden(name: str) -> dict[str, dict[str, Any]]:
    return json.loads((folder(name) / "golden.json").read_text(encoding="utf-8"))


def scored_of(stream: TaskStream) -> list[Scored]:
    return [*stream.tasks, *stream.held_out]


CASES = [(name, scored.name) for name in STREAMS for scored in scored_of(find_stream(name))]


class Letters:
    """A tokenizer that gives every character a number of its own, so that a prompt can be read back exactly."""

    eos_token_id, bos_token_id, chat_template, is_fast = 1, None, None, False
    all_special_tokens: ClassVar[list[str]] = []
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [2 + ord(letter) for letter in text]}

    def tokenize(self, text: str) -> list[str]:
        return list(text)

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(number - 2) for number in ids if number != self.eos_token_id)

    def __len__(self) -> int:
        return 2 + 0x110000


def test_the_catalogue_holds_every_benchmark() -> None:
    assert {*STREAMS, "demo"} <= set(catalogue())
    for name in STREAMS:
        assert find_stream(name).name == name
        for file in ("README.md", "golden.json", "published.json"):
            assert (folder(name) / file).is_file(), f"{name}/{file}"


def test_a_stream_is_found_by_name_or_path(tmp_path: Path) -> None:
    copy = tmp_path / "mine.yaml"
    copy.write_text(catalogue()["trace"].read_text(encoding="utf-8"), encoding="utf-8")
    assert find_stream(str(copy)).model_dump() == find_stream("trace").model_dump()
    with pytest.raises(LoricaError, match=r"unknown stream 'cl-standart'; known: .*Did you mean 'cl-standard'\?"):
        find_stream("cl-standart")
    with pytest.raises(LoricaError, match=r"none\.yaml: cannot read the stream"):
        find_stream(tmp_path / "none.yaml")


def test_the_orders_are_those_of_the_papers() -> None:
    orders = {name: [len(order) for order in find_stream(name).orders.values()] for name in STREAMS}
    assert orders == {"cl-standard": [4, 4, 4], "cl-long": [15, 15, 15], "trace": [8], "general": []}
    for name in STREAMS:
        stream = find_stream(name)
        for order in stream.orders:
            assert sorted(task.name for task in stream.in_order(order)) == sorted(task.name for task in stream.tasks)
    assert [task.name for task in find_stream("cl-standard").in_order("3")] == ["yahoo", "amazon", "agnews", "dbpedia"]
    assert list(find_stream("cl-long").orders) == ["4", "5", "6"]


def test_the_two_classification_benchmarks_share_their_tasks() -> None:
    long = {task.name: task for task in find_stream("cl-long").tasks}
    for task in find_stream("cl-standard").tasks:
        assert task == long[task.name]


@pytest.mark.parametrize(("name", "task"), CASES)
def test_the_first_example_is_asked_as_the_protocol_says(name: str, task: str, tmp_path: Path) -> None:
    expected = golden(name)[task]
    stream = find_stream(name).within(str(tmp_path))
    scored = next(one for one in scored_of(stream) if one.name == task)
    for file, text in expected.get("files", {scored.test_file: json.dumps([expected.get("row")])}).items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text, encoding="utf-8")
    loose = scored.model_copy(update={"max_prompt_length": None})
    rows = load_rows(stream, loose, "test", Letters(), kind="causal", max_length=10**6).examples
    assert [Letters().decode(row.prompt_ids or []) for row in rows] == [expected["prompt"]]
    assert rows[0].answer == expected["answer"]
    assert list(rows[0].choices) == expected.get("choices", scored.choices)
    assert rows[0].source == expected.get("source", "")


ANSWERS = [
    ("cl-standard", "agnews", " science  or technology.", "Science or Technology", 100),
    ("cl-standard", "agnews", "Sports\nDataset:agnews\nAnswer: World", "World", 100),
    ("cl-standard", "agnews", "World\nDataset:agnews\nAnswer: Sports", "World", 0),
    ("cl-long", "mnli", "entailment neutral", "entailment", 0),
    ("trace", "C-STANCE", "A", "A", 100),
    ("trace", "C-STANCE", " A", "A", 0),
    ("trace", "NumGLUE-cm", "12.", "12", 0),
    ("trace", "ScienceQA", "B\nSo it is.", "B\nWax melts.", 100),
    ("trace", "ScienceQA", "", "B\nWax melts.", 0),
    ("general", "gsm8k", " 7 x 6.\n#### 1,042\nQuestion: of 3?", " 1000 + 42\n#### 1042", 100),
    ("general", "bbh", " 1 - 5 = -4. So the answer is -4.\n\nQ: 2 + 3\nA: the answer is 5.", " -4", 100),
    ("general", "bbh", " So the answer is 4.", " -4", 0),
    ("general", "bbh", " So the answer is ] ).", " ] ) }", 0),
    ("general", "bbh", " So the answer is (A).\n\nThat was easy.", " (A)", 100),
    ("general", "tydiqa", " In 1931\nQuestion: why?", " 1931", 200 / 3),
]


@pytest.mark.parametrize(("name", "task", "written", "reference", "score"), ANSWERS)
def test_a_written_answer_is_scored_as_the_protocol_says(
    name: str, task: str, written: str, reference: str, score: float
) -> None:
    scored = next(one for one in scored_of(find_stream(name)) if one.name == task)
    assert METRICS[scored.metric](Answer(trimmed(written, scored), reference)) == pytest.approx(score)


@pytest.mark.parametrize("name", STREAMS)
def test_golden_rows_cover_every_task_and_metrics_exist(name: str) -> None:
    stream = find_stream(name)
    assert set(golden(name)) == {scored.name for scored in scored_of(stream)}
    for scored in scored_of(stream):
        assert {scored.metric, *scored.metrics_beside} <= set(METRICS)


@pytest.mark.parametrize("name", STREAMS)
def test_published_figures_name_their_source(name: str) -> None:
    stream = find_stream(name)
    names = {scored.name for scored in scored_of(stream)}
    rows = json.loads((catalogue()[name].parent / "published.json").read_text(encoding="utf-8"))
    assert rows
    for row in rows:
        assert {"method", "label", "model", "metrics", "source", "caveat", "like_for_like"} <= set(row)
        assert all(row[key] for key in ("method", "label", "model", "source"))
        assert row["like_for_like"] or row["caveat"], "what is not like for like says why"
        assert set(row.get("orders", {})) <= set(stream.orders)
        assert set(row.get("tasks", {})) <= names
        if {*row.get("tasks", {})} == names and "average_accuracy" in row["metrics"]:
            mean = sum(row["tasks"].values()) / len(names)
            assert mean == pytest.approx(row["metrics"]["average_accuracy"], abs=0.06)
        orders = list(row.get("orders", {}).values())
        if len(orders) == len(stream.orders) > 1 and "the mean of its orders is" not in row["caveat"]:
            assert sum(orders) / len(orders) == pytest.approx(row["metrics"]["average_accuracy"], abs=0.1)


@pytest.mark.parametrize("name", ["cl-standard", "cl-long", "trace"])
def test_the_protocol_counts_the_rows_of_every_task(name: str) -> None:
    rows = json.loads((folder(name) / "protocol.json").read_text(encoding="utf-8"))["rows"]
    assert set(rows) == {task.name for task in find_stream(name).tasks}
    for task in find_stream(name).tasks:
        if task.hub and task.hub.train_rows:
            assert rows[task.name]["train"] == task.hub.train_rows
        if task.hub and task.hub.test_rows:
            assert rows[task.name]["test"] == task.hub.test_rows


def test_the_anchors_of_the_method_are_there() -> None:
    figures = {name: json.loads((folder(name) / "published.json").read_text(encoding="utf-8")) for name in STREAMS}

    def found(name: str, label: str, model: str) -> list[float]:
        return [
            row["metrics"]["average_accuracy"]
            for row in figures[name]
            if (row["label"], row["model"]) == (label, model)
        ]

    assert found("cl-standard", "OSFT", "T5-large") == [75.9]
    assert found("cl-long", "OSFT", "T5-large") == [71.3]
    assert found("trace", "OSFT", "LLaMA-2-7B-Chat") == [48.4]


DATA = os.environ.get("LORICA_TEST_DATA")


@pytest.mark.skipif(DATA is None, reason="LORICA_TEST_DATA names no folder of benchmark data")
@pytest.mark.parametrize(("name", "task"), CASES)
def test_real_rows_load(name: str, task: str) -> None:
    stream = find_stream(name).within(DATA)
    scored = next(one for one in scored_of(stream) if one.name == task)
    if not Path(stream.path(scored.test_file)).exists():
        pytest.skip(f"no {scored.test_file}")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = load_rows(stream, scored, "test", tokenizer, kind="causal", max_length=stream.max_length, limit=20)
    assert len(rows) == 20
    assert rows.summary["rejected"] == 0
    for row in rows.examples:
        assert row.answer
        assert not row.choices or row.answer in row.choices
        assert len(row.prompt_ids or []) <= (scored.max_prompt_length or stream.max_length)


def test_data_that_is_not_there_is_refused_before_a_model_is_asked_for(tmp_path: Path) -> None:
    """The model's name means nothing, so whoever looked for it would complain of it."""
    given = {"model_name_or_path": "nobody/nothing", "output_dir": str(tmp_path / "out"), "methods": "seqft"}

    def message(stream: str, **more: Any) -> str:
        with pytest.raises(LoricaError) as caught:
            lorica.run(given | {"stream": stream} | more)
        return str(caught.value)

    needs = "give the folder that holds trace/C-STANCE/train.json (and 15 more of its files) as --data_dir"
    assert needs in message("trace")
    assert "no file cl/amazon/train.json; give the folder" in message("cl-standard"), "the hub has the others"
    (tmp_path / "data" / "trace" / "C-STANCE").mkdir(parents=True)
    (tmp_path / "data" / "trace" / "C-STANCE" / "train.json").write_text("[]")
    for folder, told in {
        tmp_path / "none": "there is no such folder; it is to hold trace/C-STANCE/train.json (and 15 more",
        tmp_path: f"it holds no trace/C-STANCE/train.json .*Did you mean '{tmp_path / 'data'}'",
        tmp_path / "data" / "trace": f"Did you mean '{tmp_path / 'data'}'",
        tmp_path / "data": "it holds no trace/C-STANCE/test.json (and 14 more",
    }.items():
        said = message("trace", data_dir=str(folder))
        assert said.startswith(f"--data_dir {folder}: ")
        assert all(part in said for part in told.split(" .*"))
    assert "it holds no cl/dbpedia/train.json" in message("cl-standard", data_dir=str(tmp_path)), "nor the hub's"
    assert not (tmp_path / "out").exists()
