"""The learning rate is chosen on rows cut from train, by the same rule for every method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lorica.experiments.scoring
from lorica.data.stream import TaskStream
from lorica.errors import LoricaError
from lorica.experiments.selection import choose_rate
from lorica.report import read_record
from tests.experiments.conftest import Write, llama_folder, run, write  # noqa: F401


@pytest.mark.parametrize(
    ("scores", "by", "chosen"),
    [
        ({1e-4: 50.0, 1e-3: 70.0, 1e-2: 60.0}, "average_accuracy", 1e-3),
        ({1e-4: 70.0, 1e-3: 70.0}, "average_accuracy", 1e-4),
        ({1e-4: 69.5, 1e-3: 70.0, 1e-2: 70.2}, "learning_accuracy", 1e-4),
        ({1e-4: 69.1, 1e-3: 70.0, 1e-2: 70.2}, "learning_accuracy", 1e-3),
        ({1e-4: None, 1e-3: 3.0}, "average_accuracy", 1e-3),
    ],
)
def test_the_rule(scores: dict[float, float | None], by: str, chosen: float) -> None:
    assert choose_rate(scores, by) == chosen


def test_the_best_rate_is_chosen_without_a_test_row(
    write: Write, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = write(held_out=[])
    Path(stream.path("second.test.jsonl")).write_text('{"prompt": "test row", "completion": "b"}\n')
    seen: list[set[str]] = []
    score = lorica.experiments.scoring.score_task

    def watched(model: object, dataset: object, *args: object, **options: object) -> object:
        seen.append({row.where.rpartition(":")[0] for row in dataset.examples})  # type: ignore[attr-defined]
        return score(model, dataset, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(lorica.experiments.scoring, "score_task", watched)
    options = {"methods": "seqft", "learning_rates": [1e-6, 1e-2], "validation_fraction": 0.25, "max_steps": 20}
    (record,), told = run(stream, llama_folder, tmp_path / "out", **options)
    sweep = record["sweep"]
    assert record["learning_rate"] == sweep["selected"] == 1e-2
    assert sweep["at_edge_of_grid"] is True
    assert any("widen --learning_rates" in line for line in told)
    rates = [line.split(", ")[0] for line in told if line.startswith("learning rate ")]
    assert rates == ["learning rate 1e-06"] * 3 + ["learning rate 0.01"] * 3, "each line of the sweep names its rate"
    assert sweep["validation"]["1e-06"]["average_accuracy"] < sweep["validation"]["0.01"]["average_accuracy"]
    assert json.loads((tmp_path / "out" / "seqft" / "sweep" / "sweep.json").read_text()) == sweep
    scored_in_sweep = seen[: -3 * 2]
    assert scored_in_sweep
    assert all(file.endswith("train.jsonl") for files in scored_in_sweep for file in files)
    assert record["data"]["first"]["train"]["kept"] == 8, "the final run trains on all rows"
    assert not list((tmp_path / "out").rglob("memory.safetensors"))


def three(write: Write) -> TaskStream:
    files = (("one", "first"), ("two", "second"), ("three", "known"))
    tasks = [{"name": n, "train_file": f"{f}.train.jsonl", "test_file": f"{f}.test.jsonl"} for n, f in files]
    return write(tasks=tasks)


@pytest.mark.parametrize("by", ["average_accuracy", "learning_accuracy"])
def test_the_bounds_are_chosen_by_what_they_score(by: str, write: Write, llama_folder: Path, tmp_path: Path) -> None:
    options = {"learning_rates": [1e-7, 1e-2], "validation_fraction": 0.25, "max_steps": 12, "select_by": by}
    records, _ = run(three(write), llama_folder, tmp_path / "out", methods=["per-task", "joint"], **options)
    for record in records:
        assert record["learning_rate"] == 1e-2, record["name"]
        low, high = record["sweep"]["validation"].values()
        assert low["average_accuracy"] < high["average_accuracy"]
    assert [record["sweep"]["selected_by"] for record in records] == [by, "average_accuracy"]
    assert records[0]["sweep"]["validation"]["0.01"]["average_accuracy"] == 100.0


def test_a_rate_that_diverges_is_not_chosen_and_stops_nothing(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    options = {"methods": "seqft", "learning_rates": [1e-3, 1e30], "validation_fraction": 0.25, "max_steps": 6}
    (record,), told = run(write(), llama_folder, tmp_path / "out", **options)
    assert record["learning_rate"] == 1e-3
    failed = record["sweep"]["validation"]["1e+30"]
    assert failed["average_accuracy"] is failed["learning_accuracy"] is None
    assert "sequential fine-tuning, seed 0, task first: the loss is" in failed["diverged"]
    assert told[-1].endswith("[done]")
    assert read_record(tmp_path / "out" / "seqft" / "run.json")
    again, _ = run(write(), llama_folder, tmp_path / "out", **options)
    assert again == [record]


def test_a_run_that_diverges_says_where(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match=r"seed 0, task first: the loss is .*; lower its learning rate \(1e\+30"):
        run(write(), llama_folder, tmp_path / "out", methods="seqft", learning_rates=1e30, max_steps=6)


def test_no_rate_is_chosen_where_none_has_a_score() -> None:
    with pytest.raises(LoricaError, match=r"failed with every learning rate of 0\.1 1; give lower --learning_rates"):
        choose_rate({0.1: None, 1.0: None}, "average_accuracy")


def test_no_row_is_both_trained_and_validated(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    from lorica.experiments.config import build_run_config
    from lorica.experiments.setup import Setup

    config = build_run_config(
        {"stream": "x", "model_name_or_path": llama_folder, "output_dir": tmp_path, "validation_fraction": 0.25}
    )
    setup = Setup(config, write())
    rows = setup.rows.train("first")
    kept, held = setup.rows.split("first")
    where = [{row.where for row in part.examples} for part in (kept, held)]
    assert [len(part) for part in where] == [6, 2]
    assert not where[0] & where[1]
    assert where[0] | where[1] == {row.where for row in rows.examples}
