"""``lorica eval``: files, streams and lm-eval tasks in one table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorica
import lorica.evaluation.scorer
from lorica.errors import LoricaError
from lorica.scoring import _is_ours, evaluate_model
from lorica.scoring_options import EvalOptions
from lorica.values import validated
from tests.experiments.conftest import Write, write  # noqa: F401
from tests.training.conftest import llama_folder, rows  # noqa: F401

Rows = Callable[..., str]


def scores_of(model: Path, *tasks: Any, **options: Any) -> tuple[dict[str, Any], list[str]]:
    told: list[str] = []
    given = {"model_name_or_path": str(model), "tasks": [str(task) for task in tasks]} | options
    return evaluate_model(validated(EvalOptions, given), told.append), told


def test_a_file_and_a_stream_are_scored_as_in_training(
    llama_folder: Path, rows: Rows, write: Write, tmp_path: Path
) -> None:
    known = rows("known", count=8, completion=" 1")
    settings = {"max_steps": 40, "learning_rate": 1e-2, "method": "seqft", "output_dir": tmp_path / "out"}
    config = {"model_name_or_path": llama_folder, "train_file": known, "eval_file": known}
    trained = lorica.train(config | settings, say=lambda _: None)
    stream = write()
    record, told = scores_of(tmp_path / "out", known, stream.path("stream.yaml"), output_file=str(tmp_path / "e.json"))
    assert record["scores"]["known"]["score"] == trained["scores"]["after"]["eval"]["exact_match"] == 100.0
    assert set(record["scores"]) == {"known", "letters/first", "letters/second", "letters/known"}
    for score in record["scores"].values():
        assert score["low"] <= score["score"] <= score["high"]
        assert score["rows"] == 8
    assert told[0] == "known: 100.0 % [100.0, 100.0] exact_match, 8 rows"
    assert record["weights_sha256"] == trained["weights_sha256"]
    assert json.loads((tmp_path / "e.json").read_text())["scores"] == record["scores"]


def test_other_metrics_and_fewer_rows(llama_folder: Path, rows: Rows) -> None:
    record, _ = scores_of(llama_folder, rows("a", count=12), metric="token_f1", limit=5, max_new_tokens=3)
    assert record["scores"]["a"]["metric"] == "token_f1"
    assert record["scores"]["a"]["rows"] == 5


def test_files_of_one_stem_and_parts_of_streams(llama_folder: Path, rows: Rows, write: Write, tmp_path: Path) -> None:
    one = rows("one", count=4)
    (tmp_path / "other").mkdir()
    other = str(shutil.copy(one, tmp_path / "other" / "one.jsonl"))
    stream = write()
    options: dict[str, Any] = {"only": ["known"], "max_new_tokens": 1}
    record, _ = scores_of(llama_folder, one, other, stream.path("stream.yaml"), **options)
    assert set(record["scores"]) == {one, other, "letters/known"}


def test_a_prediction_may_be_as_long_as_any_answer(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were each cut at the length of its own answer, a metric of overlap would reward what the model does not know."""
    file = tmp_path / "two.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "seven.."}\n')
    write, seen = lorica.evaluation.scorer.greedy_answers, []

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(options["max_new_tokens"])
        return write(*args, **options)

    monkeypatch.setattr(lorica.evaluation.scorer, "greedy_answers", watched)
    scores_of(llama_folder, file)
    assert seen == [len("seven..") + 1]


def test_whose_yaml_a_file_is(tmp_path: Path) -> None:
    for name, text in {"ours": "name: x\ndescription: 'task: this'\ntasks: []\n", "theirs": "task: x\n"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    assert _is_ours(str(tmp_path / "ours.yaml"))
    assert not _is_ours(str(tmp_path / "theirs.yaml"))


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        (["no.jsonl"], {}, r"^--tasks no\.jsonl: no such file"),
        (["{rows}l"], {}, r"Did you mean '.*/a\.jsonl'\?"),
        (["generl"], {}, r"Did you mean 'general'\?"),
        (["trace"], {}, r"stream 'trace', .*: no file trace/.*test\.json; give .*--data_dir"),
        (["no.yaml"], {}, r"no\.yaml: cannot read the stream"),
        (["{rows}", "{rows}"], {}, r"--tasks names 'a' twice"),
        (["generall"], {}, r"generall.*lorica\[lm-eval\]|lm-eval has no task 'generall'"),
        (["general"], {"only": ["piqua"]}, r"has no task 'piqua'.*Did you mean 'piqa'"),
        (["{rows}"], {"metric": "exact"}, r"unknown metric 'exact'"),
        (
            ["{rows}"],
            {"output_file": "no/such/folder/e.json"},
            r"--output_file no/such/folder/e\.json: there is",
        ),
        (["{rows}"], {"batch_size": 0}, r"--batch_size: .*greater than or equal to 1"),
        (["{rows}"], {"batchsize": 3}, r"unknown option --batchsize\. Did you mean 'batch_size'"),
    ],
)
def test_mistakes(tasks: list[str], options: dict[str, Any], message: str, llama_folder: Path, rows: Rows) -> None:
    with pytest.raises(LoricaError, match=message):
        scores_of(llama_folder, *(task.replace("{rows}", rows("a")) for task in tasks), **options)
