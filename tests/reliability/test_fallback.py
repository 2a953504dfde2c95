"""Damaged checkpoints are never taken for whole: refused, passed over, found by ``lorica verify``."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorica.errors import LoricaError
from lorica.experiments.stages import write_stage
from lorica.training.checkpoints import checkpoint_to_resume
from lorica.training.states import load_tree
from lorica.verification import verify
from tests.artefacts.conftest import before_and_after
from tests.artefacts.test_apply import apply, export
from tests.builders import tiny
from tests.reliability.small_runs import rows_file, run, stream_of, update
from tests.training.conftest import llama_folder  # noqa: F401

OPTIONS: dict[str, Any] = {"max_steps": 6, "save_steps": 2, "save_total_limit": 5}


@pytest.fixture(scope="module")
def stopped(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the folder of an update with three checkpoints that has not ended, its rows and the weights of its end."""
    folder = tmp_path_factory.mktemp("stopped")
    out, file = folder / "out", rows_file(folder)
    update(llama_folder, out, file, **OPTIONS)
    weights = load_file(out / "model.safetensors")
    for name in ("lorica.json", "model.safetensors"):
        (out / name).unlink()
    return out, file, weights


@pytest.fixture
def out(stopped: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped[0], tmp_path / "out"))


def flip(file: Path) -> None:
    """Flip the last bit of a file."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: [shutil.rmtree(f), f.mkdir()], "it is incomplete: there is no manifest.json"),
    "no state": (lambda f: (f / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "cut weights": (lambda f: cut(f / "model.safetensors"), "model.safetensors has .* bytes, not"),
    "cut optimizer": (
        lambda f: cut(f / "training_state" / "optimizer.safetensors"),
        "optimizer.safetensors has .* bytes",
    ),
    "a bit of the weights": (lambda f: flip(f / "model.safetensors"), "model.safetensors was changed"),
    "a bit of the optimizer": (
        lambda f: flip(f / "training_state" / "optimizer.safetensors"),
        "optimizer.* was changed",
    ),
    "a bit of the configuration": (lambda f: flip(f / "config.json"), "config.json was changed"),
    "no optimizer": (lambda f: (f / "training_state" / "optimizer.safetensors").unlink(), "optimizer.* is missing"),
}


@pytest.mark.reliability("R2", "R3", "R4")
@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_passed_over_and_named(harm: str, out: Path) -> None:
    hurt, reason = HARMS[harm]
    hurt(out / "checkpoint-6")
    said: list[str] = []
    assert checkpoint_to_resume("true", str(out), said.append) == str(out / "checkpoint-4")
    (line,) = said
    assert line.startswith(f"notice: {out / 'checkpoint-6'} is passed over: ")
    with pytest.raises(LoricaError, match=f"no checkpoint there|{reason}"):
        checkpoint_to_resume(str(out / "checkpoint-6"), str(out), said.append)


@pytest.mark.reliability("R2", "R3", "R4", "R5")
@pytest.mark.parametrize("harm", HARMS)
def test_verify_names_what_is_damaged(harm: str, out: Path) -> None:
    hurt, reason = HARMS[harm]
    hurt(out / "checkpoint-6")
    problems = {one.what: one.problem for one in verify(out) if one.problem}
    assert problems.keys() == {"checkpoint-6"}
    assert re.search(reason, str(problems["checkpoint-6"]))


# --- the optimizer ------------------------------------------------------------------------------------------------


@pytest.mark.reliability("R5")
def test_without_its_optimizer_a_run_is_refused_and_told_how_to_go_on(out: Path) -> None:
    for number in (2, 4, 6):
        (out / f"checkpoint-{number}" / "training_state" / "optimizer.safetensors").unlink()
    with pytest.raises(LoricaError, match=r"optimizer\.safetensors is missing; --reset_optimizer goes on from"):
        checkpoint_to_resume("true", str(out), lambda line: None)
    assert checkpoint_to_resume("true", str(out), reset_optimizer=True) == str(out / "checkpoint-6")
    flip(out / "checkpoint-6" / "training_state" / "state.safetensors")
    assert checkpoint_to_resume("true", str(out), lambda _: None, reset_optimizer=True) == str(out / "checkpoint-4")


@pytest.mark.reliability("R5")
@pytest.mark.parametrize("optim", ["sgd", pytest.param("adamw_torch", marks=pytest.mark.slow)])
def test_a_new_optimizer_goes_on_with_weights_step_rate_and_rows(
    optim: str, llama_folder: Path, tmp_path: Path
) -> None:
    """Plain gradient descent has no state to lose, so that the rest must be the undisturbed run, bit for bit."""
    out, file = tmp_path / "out", rows_file(tmp_path)
    options = OPTIONS | {"optim": optim, "warmup_steps": 2, "logging_steps": 1}
    whole, _ = update(llama_folder, out, file, **options)
    weights = load_file(out / "model.safetensors")
    for place in ("checkpoint-4", "checkpoint-6"):
        if place == "checkpoint-6":
            shutil.rmtree(out / place)
        else:
            for name in ("optimizer.json", "optimizer.safetensors"):
                (out / place / "training_state" / name).unlink()
    (out / "lorica.json").unlink()
    (out / "model.safetensors").unlink()
    resume = {"resume_from_checkpoint": str(out / "checkpoint-4"), "reset_optimizer": True}
    record, told = update(llama_folder, out, file, **options, **resume)
    assert any("the optimizer begins anew here" in line for line in told)
    assert [one["learning_rate"] for one in record["loss_curve"]] == [
        one["learning_rate"] for one in whole["loss_curve"]
    ]
    assert record["loss_curve"][4]["loss"] == whole["loss_curve"][4]["loss"], "the step after is taken on the same rows"
    found = load_file(out / "model.safetensors")
    same = all(torch.equal(found[key], weights[key]) for key in weights)
    assert same == (optim == "sgd")
    if optim == "adamw_torch":
        steps = load_tree(out / "checkpoint-6" / "training_state", "optimizer")["state"]
        assert {int(one["step"]) for one in steps.values()} == {2}, "its moments began anew"


@pytest.mark.reliability("R5")
def test_a_new_optimizer_needs_a_checkpoint(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match="--reset_optimizer has no effect without --resume_from_checkpoint"):
        update(llama_folder, tmp_path / "out", rows_file(tmp_path), reset_optimizer=True)


# --- lorica verify ------------------------------------------------------------------------------------------------


@pytest.mark.reliability("R4")
def test_every_file_of_a_finished_model_counts(llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    update(llama_folder, out, rows_file(tmp_path), method="replay")
    assert [str(one) for one in verify(out)] == ["model: complete and unchanged"]
    listed = json.loads((out / "lorica.json").read_text())["files"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "memory/lorica-memory.safetensors"} <= listed.keys()
    for name in listed:
        before = (out / name).read_bytes()
        flip(out / name)
        assert [one.problem for one in verify(out)] == [
            f"{name} was changed: its SHA-256 is not the one it was written with"
        ]
        (out / name).write_bytes(before)


@pytest.mark.reliability("R4")
def test_what_did_not_end_is_not_taken_for_an_update(out: Path, stopped: Any, llama_folder: Path) -> None:
    shutil.copy(llama_folder / "model.safetensors", out / "model.safetensors")
    problems = [str(one) for one in verify(out) if one.problem]
    assert problems == ["model: it is of an update that did not end: there is no lorica.json, which is written last"]


@pytest.mark.reliability("R4")
def test_the_cells_of_a_run_are_verified(llama_folder: Path, tmp_path: Path) -> None:
    out, stream = tmp_path / "out", stream_of(tmp_path / "stream")
    run(stream, llama_folder, out, save_models=True)
    assert [str(one) for one in verify(out)] == [
        "seqft: result: complete and unchanged",
        "seqft/cell/stage-2: complete and unchanged",
    ]
    for name in ("seqft/model/model.safetensors", "seqft/predictions.jsonl", "seqft/cell/stage-2/progress.json"):
        before = (out / name).read_bytes()
        flip(out / name)
        (problem,) = (str(one) for one in verify(out) if one.problem)
        assert Path(name).name in problem
        (out / name).write_bytes(before)


@pytest.mark.reliability("R3", "R4")
def test_a_damaged_stage_is_not_gone_on_from(llama_folder: Path, tmp_path: Path) -> None:
    out, stream = tmp_path / "out", stream_of(tmp_path / "stream")
    run(stream, llama_folder, out)
    cell = out / "seqft" / "cell"
    (out / "seqft" / "run.json").unlink()
    shutil.rmtree(cell / "stage-2")
    write_stage(cell, 1, tiny("llama"), {}, {"scores": []})
    flip(cell / "stage-1" / "model" / "model.safetensors")
    with pytest.raises(
        LoricaError, match=r"stage-1: model/model\.safetensors was changed: .*; remove .*stage-1 to go on"
    ):
        run(stream, llama_folder, out)


@pytest.mark.reliability("R4")
def test_artefacts_are_verified(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path)
    export(before, after, tmp_path / "update")
    apply(before, tmp_path / "update", tmp_path / "on")
    shutil.rmtree(before)
    shutil.rmtree(after)
    assert [str(one) for one in verify(tmp_path)] == [
        "on: model: complete and unchanged", "update: update: complete and unchanged",
    ]  # fmt: skip
    flip(tmp_path / "update" / "update-00001.safetensors")
    flip(tmp_path / "on" / "config.json")
    problems = [str(one) for one in verify(tmp_path)]
    assert "config.json was changed" in problems[0]
    assert "update-00001.safetensors: damaged" in problems[1]
