"""A run that is stopped and called again ends with the same numbers and the same bytes as one that was not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import lorica.experiments.cell
from lorica.errors import Interrupted, LoricaError
from lorica.training.trainer import MethodTrainer
from tests.experiments.conftest import Write, llama_folder, run, write  # noqa: F401

LASTING = ("scores", "retention", "metrics", "row_scores", "carried_bytes", "leakage", "intervals")


def stop_at(monkeypatch: pytest.MonkeyPatch, tasks: int) -> None:
    """Send SIGTERM in the middle of training the task with this number, counted from 1 over the whole run."""
    begun: list[Any] = []

    class Stopper(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begun.append(1)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if len(begun) == tasks and state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    start = MethodTrainer.__init__

    def with_stopper(self: Any, *args: Any, **given: Any) -> None:
        start(self, *args, **given | {"callbacks": [*given["callbacks"], Stopper()]})

    monkeypatch.setattr(MethodTrainer, "__init__", with_stopper)


@pytest.mark.parametrize("method", ["seqft", "half", "lora", "olora", "ewc", "replay", "per-task", "joint"])
def test_a_stopped_run_goes_on_to_the_same_end(
    method: str, write: Write, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"methods": method, "max_steps": 5, "learning_rates": 1e-2, "save_models": True}
    stream = write(tasks=[
        {"name": name, "train_file": f"{file}.train.jsonl", "test_file": f"{file}.test.jsonl"}
        for name, file in (("one", "first"), ("two", "second"), ("three", "known"))
    ])  # fmt: skip
    (whole,), _ = run(stream, llama_folder, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        stop_at(patch, 1 if method == "joint" else 3)
        with pytest.raises(Interrupted, match="the finished tasks are kept; the same command goes on") as stopped:
            run(stream, llama_folder, tmp_path / "parts", **options)
    assert stopped.value.signum == signal.SIGTERM
    assert not list((tmp_path / "parts").rglob("checkpoint-*"))
    (resumed,), told = run(stream, llama_folder, tmp_path / "parts", **options)
    assert [line.split(",")[1].split(":")[0] for line in told if ", after" in line] == [" after three"]
    for field in LASTING:
        assert json.dumps(resumed[field]) == json.dumps(whole[field]), field
    assert resumed["cost"]["steps"] == whole["cost"]["steps"] == 15
    one, two = (load_file(tmp_path / part / method / "model" / "model.safetensors") for part in ("whole", "parts"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_what_is_finished_is_not_done_again(
    write: Write, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = write()
    first, _ = run(stream, llama_folder, tmp_path / "out", methods="seqft", max_steps=2)
    monkeypatch.setattr(lorica.experiments.cell, "fit", None)
    again, told = run(stream, llama_folder, tmp_path / "out", methods="seqft", max_steps=2)
    assert json.dumps(again) == json.dumps(first)
    assert not [line for line in told if "after" in line]


def test_a_folder_of_another_run_is_refused(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    stream = write()
    run(stream, llama_folder, tmp_path / "out", methods="seqft", max_steps=2)
    with pytest.raises(LoricaError, match=r"was begun with learning_rate 0\.01, and it is now 0\.5; give what"):
        run(stream, llama_folder, tmp_path / "out", methods="seqft", max_steps=2, learning_rates=0.5)
    Path(stream.path("second.train.jsonl")).write_text('{"prompt": "new", "completion": "row"}\n')
    with pytest.raises(LoricaError, match="was begun with rows of second"):
        run(stream, llama_folder, tmp_path / "out", methods="seqft", max_steps=2)


def test_a_folder_with_other_things_is_left_alone(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    cell = tmp_path / "out" / "seqft" / "cell"
    cell.mkdir(parents=True)
    (cell / "thesis.tex").write_text("mine")
    with pytest.raises(LoricaError, match="is not empty and not of lorica run"):
        run(write(), llama_folder, tmp_path / "out", methods="seqft")
    assert (cell / "thesis.tex").read_text() == "mine"


def test_damaged_progress_is_named(
    write: Write, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Interrupted):
            run(write(), llama_folder, tmp_path / "out", methods="seqft", max_steps=4)
    (progress,) = (tmp_path / "out").rglob("progress.json")
    progress.write_text("{")
    with pytest.raises(LoricaError, match=r"stage-1/progress\.json: cannot read it: .*; remove .*stage-1 to begin"):
        run(write(), llama_folder, tmp_path / "out", methods="seqft", max_steps=4)
