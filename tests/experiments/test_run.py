"""``lorica.run``: two tasks, one after the other, with and without protection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorica
from lorica.data.stream import read_stream
from lorica.errors import LoricaError
from lorica.experiments.config import build_run_config
from lorica.experiments.setup import Setup
from lorica.report import read_record, write_report
from lorica.scores import ScoreMatrix
from tests.experiments.conftest import SETTINGS, Write, llama_folder, run, t5_folder, write  # noqa: F401


def test_both_methods_learn_the_stream(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    records, told = run(write(), llama_folder, tmp_path / "out", seeds=3, save_models=True)
    plain, protected = records
    for record, name in zip(records, SETTINGS, strict=True):
        scores = record["scores"]
        assert (len(scores), {len(row) for row in scores}) == (3, {2})
        assert scores[0] == [0.0, 0.0], "before training a random model knows nothing"
        assert scores[1][0] == scores[2][1] == 100.0, "each task is learned when it comes"
        assert len(record["retention"]["known"]) == 3
        assert record["metrics"] == ScoreMatrix.from_json(record).metrics()
        assert (record["kind"], record["stream"], record["seed"]) == ("run", "letters", 3)
        assert record["cost"]["steps"] == 30
        assert read_record(tmp_path / "out" / name / "run.json").title == record["label"]
    assert "sequential fine-tuning" in write_report([tmp_path / "out"], tmp_path).read_text()
    assert told[-1].endswith("[done]")
    assert sum(line.startswith("OSFT, after") for line in told) == 2

    assert plain["plan"] == plain["leakage"] == []
    assert len(protected["plan"]) == len(protected["leakage"]) == 14
    assert max(row["leak_u"] for row in protected["leakage"]) <= 1e-5
    assert max(row["leak_v"] for row in protected["leakage"]) <= 1e-5
    assert 0 < protected["cost"]["trainable_parameters"] < plain["cost"]["trainable_parameters"]

    before = load_file(llama_folder / "model.safetensors")
    for name in SETTINGS:
        after = load_file(tmp_path / "out" / name / "model" / "model.safetensors")
        assert after.keys() == before.keys()
        assert {tensor.dtype for tensor in after.values()} == {torch.float32}
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name / "model").config.use_cache is True
        assert not list((tmp_path / "out" / name).rglob("stage-*/model")), "only a stop would have needed them"


def test_the_answers_of_every_row_are_kept(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    (record,), _ = run(write(), llama_folder, tmp_path / "out", methods="seqft")
    rows = {name: [float(score) for score in text.split()] for name, text in record["row_scores"].items()}
    assert {name: len(scores) for name, scores in rows.items()} == {"first": 8, "second": 8, "known": 8}
    for column, name in enumerate(record["tasks"]):
        assert sum(rows[name]) / 8 == record["scores"][-1][column]
    low, high = record["intervals"]["average_accuracy"]
    assert low <= record["metrics"]["average_accuracy"] <= high
    lines = (tmp_path / "out" / "seqft" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 24


@pytest.mark.parametrize("name", ["half", "lora"])
def test_the_same_seed_gives_the_same_weights(name: str, write: Write, llama_folder: Path, tmp_path: Path) -> None:
    stream = write(training={"max_steps": 4, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8})
    weights = []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / str(number)
        run(stream, llama_folder, out, methods=name, seeds=seed, save_models=True)
        weights.append(load_file(out / name / "model" / "model.safetensors"))
    first, second, other = weights
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_an_encoder_decoder_runs(write: Write, t5_folder: Path, tmp_path: Path) -> None:
    records, _ = run(write(), t5_folder, tmp_path / "out", methods=["half"])
    assert [record["label"] for record in records] == ["OSFT"]
    assert records[0]["model_kind"] == "seq2seq"


def test_seeds_and_orders_are_cells_of_their_own(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    stream = write(orders={"1": ["first", "second"], "2": ["second", "first"]})
    options: dict[str, Any] = {"methods": "seqft", "seeds": [0, 1], "orders": ["1", "2"], "max_steps": 3}
    records, _ = run(stream, llama_folder, tmp_path / "out", **options)
    assert [(record["order"], record["seed"]) for record in records] == [("1", 0), ("1", 1), ("2", 0), ("2", 1)]
    assert [record["tasks"] for record in records[1:3]] == [["first", "second"], ["second", "first"]]
    folders = sorted(path.parent.name for path in (tmp_path / "out" / "seqft").rglob("run.json"))
    assert folders == ["order-1-seed-0", "order-1-seed-1", "order-2-seed-0", "order-2-seed-1"]


def test_a_subset_of_the_tasks_says_so(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    records, told = run(write(), llama_folder, tmp_path / "out", methods="seqft", tasks="second", max_steps=2)
    assert records[0]["tasks"] == ["second"]
    assert records[0]["left_out"] == ["first"]
    assert "notice: a subset of the stream; left out: first" in told


def test_the_bounds(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    (alone, joint, plain), _ = run(write(), llama_folder, tmp_path / "out", methods=["per-task", "joint", "seqft"],
                            learning_rates=1e-2, save_models=True)  # fmt: skip
    assert alone["scores"] == [[0.0, 0.0], [100.0, 0.0], [100.0, 100.0]], "each task's own model answers"
    assert alone["metrics"]["backward_transfer"] == 0.0
    assert joint["scores"][1] == [None, None] or joint["scores"][1] != joint["scores"][1]
    assert joint["metrics"]["average_accuracy"] == 100.0
    assert joint["metrics"]["backward_transfer"] is None
    assert alone["cost"]["steps"] == joint["cost"]["steps"] == plain["cost"]["steps"] == 30, "the same budget"


def test_replay_gets_no_more_steps_than_the_rest(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    stream = write(training={"num_train_epochs": 3, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8})
    records, _ = run(stream, llama_folder, tmp_path / "out", methods=["seqft", "replay"], learning_rates=1e-3)
    assert [record["cost"]["steps"] for record in records] == [12, 12]
    assert records[0]["carried_bytes"] == [0, 0]
    assert 0 < records[1]["carried_bytes"][0] < records[1]["carried_bytes"][1]


def test_what_is_said_later_about_the_length_holds(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    """The run's word counts more than the settings', theirs more than the task's, that more than the stream's."""
    files = {"train_file": "first.train.jsonl", "test_file": "first.test.jsonl"}
    stream = write(tasks=[{"name": "first", "num_train_epochs": 2} | files], methods={
        "plain": SETTINGS["seqft"],
        "own": SETTINGS["seqft"] | {"training": {"max_steps": 5, "weight_decay": 0.5}},
    })  # fmt: skip

    def length(name: str, **training: Any) -> tuple[float, float, float]:
        given = {"stream": "x", "model_name_or_path": llama_folder, "output_dir": tmp_path}
        a = Setup(build_run_config(given | training), stream).arguments("", 0, 1e-3, name=name, task=stream.tasks[0])
        return a.max_steps, a.num_train_epochs, a.weight_decay

    assert length("plain") == (-1, 2, 0)
    assert length("own") == (5, 2, 0.5)
    assert length("own", num_train_epochs=3) == (-1, 3, 0.5)
    assert length("own", max_steps=7, weight_decay=0.1) == (7, 2, 0.1)


def test_a_finished_run_gives_the_same_record_again(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    first, _ = run(write(), llama_folder, tmp_path / "out", methods="joint", max_steps=2)
    again, told = run(write(), llama_folder, tmp_path / "out", methods="joint", max_steps=2, save_models=True)
    assert again == first, "what was not measured is None in both"
    assert first[0]["retention"]["known"][1] is None
    assert any("was finished without --save_models; remove it" in line for line in told)


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "training": ({"training": {"learning_rat": 1}}, {}, r"method 'seqft': unknown option --learning_rat\. Did"),
    "key": (
        {"methods": {"half": SETTINGS["half"] | {"options": {"unfreeze_rank": 0.5}}}}, {},
        r"stream 'letters', method 'half': unknown option 'unfreeze_rank'; .* Did you mean 'unfreeze_rank_ratio'",
    ),
    "foreign": (
        {"methods": {"seqft": SETTINGS["seqft"] | {"options": {"source": "activation"}}}}, {},
        r"stream 'letters', method 'seqft': unknown option 'source'",
    ),
    "type": (
        {"methods": {"half": SETTINGS["half"] | {"options": {"mrr": "much"}}}}, {},
        r"stream 'letters', method 'half': option 'mrr': .*'much'",
    ),
    "method": (
        {"methods": {"mine": SETTINGS["half"] | {"method": "ostf"}}}, {},
        r"stream 'letters', method 'mine': unknown method 'ostf'.* Did you mean 'osft'",
    ),
    "no method": ({"methods": {}}, {}, "stream 'letters' has settings for no method"),
    "unknown method": ({}, {"methods": "haf"}, r"unknown method 'haf'; known: seqft, half, .*Did you mean 'half'"),
    "train file": (
        {"tasks": [{"name": "one", "train_file": "none.jsonl", "test_file": "first.test.jsonl"}]}, {},
        r"stream 'letters', task 'one': no file .*stream/none\.jsonl; give the folder",
    ),
    "ability": (
        {"held_out": [{"name": "old", "test_file": "old.jsonl"}]}, {},
        r"stream 'letters', ability 'old': no file .*stream/old\.jsonl",
    ),
    "metric": (
        {"held_out": [{"name": "known", "test_file": "known.test.jsonl", "metric": "exact"}]}, {},
        r"unknown metric 'exact'.* Did you mean 'exact_match'",
    ),
    "same orders": (
        {"orders": {"1": ["first", "second"], "2": ["second", "first"]}}, {"orders": ["1", "2"], "tasks": "first"},
        "stream 'letters': orders '1' and '2' are the same without second; name one of them",
    ),
    "order": ({}, {"orders": "7"}, r"stream 'letters' has no order '7'; it has none"),
    "task": ({}, {"tasks": "frist"}, r"stream 'letters' has no task 'frist'; .*Did you mean 'first'"),
    "twice": ({}, {"seeds": [1, 1]}, r"--seeds names one twice"),
    "rate": ({}, {"learning_rates": [-1]}, r"--learning_rates holds one that is not above 0"),
    "few rows": ({}, {"learning_rates": [1e-3, 1e-2], "validation_fraction": 0.01}, r"8 rows are too few to cut 0\.01"),
    "field": ({}, {"seed": 3}, r"--seed is set by"),
    "kept by itself": ({}, {"save_only_model": True}, r"--save_only_model has no effect in lorica run"),
    "scored by itself": ({}, {"eval_strategy": "epoch"}, r"--eval_strategy has no effect in lorica run"),
    "goes on by itself": ({}, {"resume_from_checkpoint": True}, r"--resume_from_checkpoint has no effect"),
    "no batch": ({}, {"per_device_train_batch_size": 0}, r"--per_device_train_batch_size 0 is no number of rows"),
    "tracker": ({}, {"report_to": "nobody"}, r"--report_to: "),
    "below 0": ({}, {"seeds": [-1]}, r"--seeds\.0: .*greater than or equal to 0"),
    "nan": ({}, {"learning_rates": [float("nan")]}, r"--learning_rates holds one that is not above 0"),
    "not a mapping": ({}, {"training": "x"}, r"'training' holds names and values"),
    "folder": ({"methods": {"../seqft": SETTINGS["seqft"]}}, {}, r"'\.\./seqft' cannot be the name of a folder"),
}  # fmt: skip


@pytest.mark.reliability("R26")
@pytest.mark.parametrize(("changes", "options", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_run_is_one_error_before_anything_runs(
    changes: dict[str, Any], options: dict[str, Any], message: str, write: Write, llama_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(LoricaError, match=message):
        run(write(**changes), llama_folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "stream.yaml: "),
        ("name: x\n", "field version: Field required"),
        ("name: [\n", "stream.yaml: not YAML"),
        ("name: x\nversion: 1\ndescription: d\ntasks: []\n", "field tasks|stream.yaml"),
        (
            "name: x\nversion: 1\ndescription: d\norders: {o: [a, a]}\n"
            "tasks: [{name: a, train_file: b, test_file: c}]\n",
            "order 'o' names a task twice: a, a",
        ),
    ],
)
def test_a_file_that_is_no_stream(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "stream.yaml").write_text(text)
    with pytest.raises(LoricaError, match=message):
        read_stream(tmp_path / "stream.yaml")


def test_rows_without_answers_cannot_be_scored(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    stream = write()
    Path(stream.path("second.test.jsonl")).write_text('{"text": "only text"}\n')
    with pytest.raises(LoricaError, match=r"second\.test\.jsonl:1: the row has no answer to score"):
        run(stream, llama_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_one_error(write: Write, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match="nowhere: no such folder"):
        run(write(), tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(LoricaError, match="nobody: cannot load the tokenizer"):
        lorica.run(
            {"stream": "letters", "model_name_or_path": "nobody", "output_dir": tmp_path / "out"}, stream=write()
        )
    assert not (tmp_path / "out").exists()


def test_choices_that_the_metric_cannot_tell_apart_are_refused(
    write: Write, llama_folder: Path, tmp_path: Path
) -> None:
    task = {"name": "sums", "train_file": "first.train.jsonl", "test_file": "first.test.jsonl", "choices": ["4", "-4"]}
    stream = write(tasks=[task])
    with pytest.raises(LoricaError, match=r"sums: metric 'exact_match' takes '4' and '-4' for the same answer"):
        run(stream, llama_folder, tmp_path / "out", methods="seqft")
    assert not (tmp_path / "out").exists()


def test_floors_and_recalls_are_those_of_the_scored_rows(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    stream = write(held_out=[])
    rows = [{"prompt": f"first {i}?", "completion": "a" if i < 6 else "z"} for i in range(8)]
    Path(stream.path("first.test.jsonl")).write_text("\n".join(map(json.dumps, rows)) + "\n")
    task = {"name": "first", "train_file": "first.train.jsonl", "test_file": "first.test.jsonl"}
    stream = stream.model_copy(update={"tasks": [type(stream.tasks[0])(**task, choices=["a", "z"], floor=10)]})
    (record,), _ = run(stream, llama_folder, tmp_path / "out", methods="seqft")
    assert record["floors"] == {"first": 75.0}
    assert record["recall"] == {"first": {"a": 100.0, "z": 0.0}}


def test_a_stream_may_bring_its_seeds(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    stream = write(seeds=[4, 5])
    records, _ = run(stream, llama_folder, tmp_path / "own", methods="seqft", max_steps=1)
    assert [record["seed"] for record in records] == [4, 5]
    (record,), _ = run(stream, llama_folder, tmp_path / "asked", methods="seqft", max_steps=1, seeds=7)
    assert record["seed"] == 7


def test_a_missing_package_shows_before_anything_runs(
    write: Write, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorica.methods.base.find_spec", lambda name: None)
    message = r"stream 'letters', method 'olora': the method needs the package peft: pip install 'lorica\[peft\]'"
    with pytest.raises(LoricaError, match=message):
        run(write(), llama_folder, tmp_path / "out", methods=["seqft", "olora"])
    assert not (tmp_path / "out").exists()
