"""The learning rate is chosen on rows cut from train, by the same rule for every method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lorica.experiments.cell
from lorica.experiments.selection import choose_rate
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
    score = lorica.experiments.cell.score_task

    def watched(model: object, dataset: object, *args: object, **options: object) -> object:
        seen.append({row.where.rpartition(":")[0] for row in dataset.examples})  # type: ignore[attr-defined]
        return score(model, dataset, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(lorica.experiments.cell, "score_task", watched)
    options = {"methods": "seqft", "learning_rates": [1e-6, 1e-2], "validation_fraction": 0.25, "max_steps": 20}
    (record,), told = run(stream, llama_folder, tmp_path / "out", **options)
    sweep = record["sweep"]
    assert record["learning_rate"] == sweep["selected"] == 1e-2
    assert sweep["at_edge_of_grid"] is True
    assert any("widen --learning_rates" in line for line in told)
    assert sweep["validation"]["1e-06"]["average_accuracy"] < sweep["validation"]["0.01"]["average_accuracy"]
    assert json.loads((tmp_path / "out" / "seqft" / "sweep" / "sweep.json").read_text()) == sweep
    scored_in_sweep = seen[: -3 * 2]
    assert scored_in_sweep
    assert all(file.endswith("train.jsonl") for files in scored_in_sweep for file in files)
    assert record["data"]["first"]["train"]["kept"] == 8, "the final run trains on all rows"
    assert not list((tmp_path / "out").rglob("memory.safetensors"))


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
