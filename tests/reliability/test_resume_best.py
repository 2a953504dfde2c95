"""Runs that end with the best of their checkpoints, interrupted, moved or damaged; what a resumed run may change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorica.errors import Interrupted, LoricaError
from lorica.training.trainer import MethodMixin
from tests.reliability.interruptions import assert_same, outcome, quick_updates, stopped_at
from tests.reliability.small_runs import rows_file, update
from tests.training.conftest import llama_folder  # noqa: F401

GO_ON = {"resume_from_checkpoint": "true"}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_updates():
        yield


@pytest.fixture
def best(tmp_path: Path) -> dict[str, Any]:
    """Return options of a run whose best checkpoint is its first: the one with the highest loss."""
    return {
        "max_steps": 6, "learning_rate": 5e-3, "logging_steps": 1, "unfreeze_rank_ratio": 0.5, "eval_steps": 1,
        "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True,
        "metric_for_best_model": "loss", "greater_is_better": True, "eval_file": rows_file(tmp_path, "dev", 4),
    }  # fmt: skip


def stop(model: Path, out: Path, file: str, options: dict[str, Any]) -> Interrupted:
    with stopped_at("on_step_begin", 4), pytest.raises(Interrupted) as stopped:
        update(model, out, file, **options)
    return stopped.value


@pytest.mark.reliability("R11")
@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_a_signal_keeps_the_weights_of_its_step_and_not_the_best(
    strategy: str, llama_folder: Path, best: dict[str, Any], tmp_path: Path
) -> None:
    file, whole, parts = rows_file(tmp_path), tmp_path / "whole", tmp_path / "parts"
    best |= {"save_strategy": strategy}
    update(llama_folder, whole, file, **best)
    interrupted = stop(llama_folder, parts, file, best)
    assert interrupted.checkpoint == str(parts / "checkpoint-4")
    now, first = (load_file(parts / f"checkpoint-{step}" / "model.safetensors") for step in (4, 1))
    assert any(not torch.equal(now[name], first[name]) for name in now)
    update(llama_folder, parts, file, **best | GO_ON)
    assert_same(outcome(parts), outcome(whole))


def test_a_moved_run_ends_with_its_best_checkpoint(llama_folder: Path, best: dict[str, Any], tmp_path: Path) -> None:
    file, whole, parts = rows_file(tmp_path), tmp_path / "whole", tmp_path / "parts"
    update(llama_folder, whole, file, **best)
    stop(llama_folder, parts, file, best)
    moved = parts.rename(tmp_path / "moved")
    update(llama_folder, moved, file, **best | GO_ON)
    assert_same(outcome(moved), outcome(whole))


@pytest.mark.reliability("R4")
def test_a_run_whose_best_checkpoint_is_gone_or_changed_is_refused(
    llama_folder: Path, best: dict[str, Any], tmp_path: Path
) -> None:
    file, out = rows_file(tmp_path), tmp_path / "out"
    stop(llama_folder, out, file, best)
    with (out / "checkpoint-1" / "model.safetensors").open("r+b") as stream:
        stream.seek(-2, 2)
        stream.write(b"\xfe")
    with pytest.raises(LoricaError, match=r"checkpoint-1.*the best so far.*was changed"):
        update(llama_folder, out, file, **best | GO_ON)
    shutil.rmtree(out / "checkpoint-1")
    with pytest.raises(LoricaError, match=r"checkpoint-1.*the best so far"):
        update(llama_folder, out, file, **best | GO_ON)


@pytest.mark.reliability("R7")
def test_the_best_counts_among_those_that_are_kept(llama_folder: Path, best: dict[str, Any], tmp_path: Path) -> None:
    update(llama_folder, tmp_path / "out", rows_file(tmp_path), **best, save_total_limit=2)
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-6"}


@pytest.mark.reliability("R19")
@pytest.mark.parametrize(
    ("changed", "message"),
    [(None, "sha256 of the rows of --eval_file was"), ({"eval_steps": 2, "save_steps": 2}, "eval_steps was 1")],
)
def test_what_chooses_the_best_cannot_change(
    changed: dict[str, int] | None, message: str, llama_folder: Path, best: dict[str, Any], tmp_path: Path
) -> None:
    file, out = rows_file(tmp_path), tmp_path / "out"
    stop(llama_folder, out, file, best)
    files = {"eval_file": rows_file(tmp_path, "other", 4)}
    with pytest.raises(LoricaError, match=message):
        update(llama_folder, out, file, **best | GO_ON | (files if changed is None else changed))


@pytest.mark.reliability("R4")
def test_a_best_checkpoint_that_was_changed_is_not_the_model(
    llama_folder: Path, best: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = MethodMixin._load_best_model

    def changed(self: Any) -> None:
        with (Path(self.state.best_model_checkpoint) / "model.safetensors").open("r+b") as stream:
            stream.seek(-2, 2)
            stream.write(b"\xfe")
        load(self)

    monkeypatch.setattr(MethodMixin, "_load_best_model", changed)
    with pytest.raises(LoricaError, match=r"checkpoint-1 is the best model: model\.safetensors was changed"):
        update(llama_folder, tmp_path / "out", rows_file(tmp_path), **best)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_best_is_chosen_among_models_that_are_there(
    llama_folder: Path, best: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(LoricaError, match=r"only those of every 2 would be there.*give --save_steps 1"):
        update(llama_folder, tmp_path / "out", rows_file(tmp_path), **best | {"save_steps": 2})


@pytest.mark.reliability("R19")
def test_another_chat_template_in_the_same_file_makes_another_run(llama_folder: Path, tmp_path: Path) -> None:
    template, out = tmp_path / "chat.jinja", tmp_path / "out"
    file = tmp_path / "talk.jsonl"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    file.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(8)))
    options = {"chat_template_path": str(template), "unfreeze_rank_ratio": 0.5, "max_steps": 6}
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    stop(llama_folder, out, str(file), options)
    template.write_text("{% for m in messages %}{{ m.role }} - {{ m.content }}\n{% endfor %}")
    with pytest.raises(LoricaError, match="sha256 of the training rows as tokens was"):
        update(llama_folder, out, str(file), **options | GO_ON)


def test_a_resumed_run_saves_and_logs_as_often_as_it_is_told_now(llama_folder: Path, tmp_path: Path) -> None:
    file, out = rows_file(tmp_path), tmp_path / "out"
    plain = {"max_steps": 8, "unfreeze_rank_ratio": 0.5, "save_total_limit": 9}
    stop(llama_folder, out, file, plain | {"save_steps": 500, "logging_steps": 500})
    record, _ = update(llama_folder, out, file, **plain | GO_ON | {"save_steps": 3, "logging_steps": 2})
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6", "checkpoint-8"}
    assert [row["step"] for row in record["loss_curve"]] == [6, 8]


@pytest.mark.parametrize("name", ["ignore_data_skip", "enable_jit_checkpoint", "dataloader_persistent_workers"])
def test_what_would_make_another_run_of_a_resumed_one_is_refused(name: str, llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match=f"--{name} is not taken"):
        update(llama_folder, tmp_path / "out", rows_file(tmp_path), **{name: True})
