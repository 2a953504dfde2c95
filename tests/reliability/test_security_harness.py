"""Tasks of lm-evaluation-harness that run what the model writes need two switches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorica.errors import LoricaError
from lorica.evaluation import harness
from lorica.evaluation.harness import _check_unsafe, lm_eval_record
from lorica.evaluation.metrics import METRICS
from lorica.scoring import evaluate_model
from lorica.scoring_options import EvalOptions
from tests.builders import tiny
from tests.training.conftest import byte_tokenizer, llama_folder  # noqa: F401

pytest.importorskip("lm_eval")


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a task that says of itself that it runs what the model writes."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"{i}?", "options": ["a", "b"], "label": i % 2}) + "\n" for i in range(4)))
    fields = {
        "task": "generated", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{options}}",
        "doc_to_target": "label", "metric_list": [{"metric": "acc"}], "unsafe_code": True,
    }  # fmt: skip
    path = tmp_path / "generated.yaml"
    path.write_text(json.dumps(fields))
    return str(path)


@pytest.mark.reliability("S13")
@pytest.mark.parametrize(("option", "variable"), [(False, "0"), (True, ""), (True, "true"), (False, "1")])
def test_one_switch_is_not_enough(option: bool, variable: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", variable)
    missing = ["--confirm_run_unsafe_code"] * (not option) + ["HF_ALLOW_CODE_EVAL=1"] * (variable != "1")
    with pytest.raises(LoricaError, match=f"generated runs the code that the model writes.*{' and '.join(missing)}$"):
        lm_eval_record(tiny("llama"), byte_tokenizer(), [task], confirm_run_unsafe_code=option)


@pytest.mark.reliability("S13")
def test_both_switches_are(task: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    options: dict[str, Any] = {"model_name_or_path": str(llama_folder), "tasks": [task]}
    told: list[str] = []
    with pytest.raises(LoricaError, match="--confirm_run_unsafe_code"):
        evaluate_model(EvalOptions(**options), told.append)
    record = evaluate_model(EvalOptions(**options, confirm_run_unsafe_code=True), told.append)
    assert record["lm_eval"]["scores"]["generated"]["acc"] is not None


@pytest.mark.reliability("S13")
def test_a_task_of_the_harness_is_refused_before_its_code_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """humaneval fetches and runs the code of its metric when it is loaded."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry, Kind

    class Index(TaskManager):
        def __init__(self, **options: Any) -> None:
            super().__init__(include_defaults=False)
            self._index["humaneval"] = Entry("humaneval", Kind.TASK, None, {"task": "humaneval", "unsafe_code": True})
            self._all_tasks = ["humaneval"]

        def load(self, *names: Any) -> Any:
            raise AssertionError("loaded")

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Index)
    with pytest.raises(LoricaError, match="humaneval runs the code that the model writes"):
        lm_eval_record(tiny("llama"), byte_tokenizer(), ["humaneval"])


@pytest.mark.reliability("S13")
def test_what_runs_nothing_needs_none() -> None:
    _check_unsafe([], confirmed=False)
    assert harness.CODE_EVAL == "HF_ALLOW_CODE_EVAL"
    assert not [name for name in METRICS if "code" in name or "exec" in name]
