"""Checkpoints are complete or invisible, hold no pickle, and resume exactly."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lorica.cli import app
from lorica.config import build_config
from lorica.errors import LoricaError
from lorica.training.checkpoints import checkpoint_to_resume
from lorica.training.manifest import damage, write_manifest
from lorica.training.states import load_tree, random_state, save_tree, set_random_state
from lorica.update import train
from lorica.verification import verify

Rows = Callable[..., str]
FAST = {"max_steps": 6, "learning_rate": 3e-3, "disable_tqdm": True, "seed": 1, "preset": "paper"}
FAST |= {"per_device_train_batch_size": 4}


def run(model: Path, out: Path, file: str, **options: Any) -> list[str]:
    told: list[str] = []
    values = {"model_name_or_path": str(model), "train_file": file, "output_dir": str(out)} | FAST | options
    train(build_config(values), say=told.append)
    return told


@pytest.fixture(scope="module")
def stopped(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder of a run with three checkpoints, whose model was never written, and the file it trains on."""
    folder = tmp_path_factory.mktemp("kept")
    out, file = folder / "out", str(folder / "new.jsonl")
    Path(file).write_text("".join(f'{{"prompt": "new {i}?", "completion": " {i % 10}"}}\n' for i in range(24)))
    run(llama_folder, out, file, save_steps=2, save_total_limit=5)
    (out / "lorica.json").unlink()
    (out / "model.safetensors").unlink()
    return out, file


@pytest.fixture
def copied(stopped: tuple[Path, str], tmp_path: Path) -> tuple[Path, str]:
    shutil.copytree(stopped[0], tmp_path / "out")
    return tmp_path / "out", stopped[1]


# --- states -----------------------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(trees)
def test_nested_data_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    folder = tmp_path_factory.mktemp("tree")
    save_tree(tree, folder, "x")
    found = load_tree(folder, "x")
    assert found == tree
    assert repr(found) == repr(tree)  # True is not 1, a tuple no list


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool], ids=str)
def test_tensors_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = (100 * torch.rand(3, 4)).to(dtype).T
    save_tree({0: {"a": tensor, "b": tensor}, "empty": torch.zeros(0)}, tmp_path, "x")
    found = load_tree(tmp_path, "x")
    for name in ("a", "b"):
        assert found[0][name].dtype == dtype
        assert torch.equal(found[0][name], tensor)
    assert found["empty"].shape == (0,)


def test_tensors_whose_paths_read_alike_stay_apart(tmp_path: Path) -> None:
    one, two, three = torch.ones(1), 2 * torch.ones(1), 3 * torch.ones(1)
    save_tree({1: one, "1": two, "a.b": two, "a": {"b": three}}, tmp_path, "x")
    assert load_tree(tmp_path, "x") == {1: one, "1": two, "a.b": two, "a": {"b": three}}


def test_what_only_a_pickle_could_hold_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match=r"x\.optimizer\.0 is a function, which only a pickle could hold"):
        save_tree({"optimizer": [lambda: None]}, tmp_path, "x")


def test_a_file_cannot_name_a_class_of_its_choice(tmp_path: Path) -> None:
    save_tree({}, tmp_path, "x")
    (tmp_path / "x.json").write_text('{"wrapped": "os:system", "parts": {}, "context": null}')
    with pytest.raises(ValueError, match=r"os:system is no class of torchao\."):
        load_tree(tmp_path, "x")


def test_every_random_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    def draws() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(()).item()]

    draws()  # leaves Gaussian numbers in store
    save_tree(random_state(), tmp_path, "x")
    expected = draws()
    set_random_state(load_tree(tmp_path, "x"))
    assert draws() == expected


# --- manifests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "it is incomplete: there is no manifest.json"),
        (lambda f: (f / "manifest.json").write_text('{"files": {"a'), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda f: (f / "sub" / "b").unlink(), "sub/b is missing"),
        (lambda f: (f / "a").write_bytes(b"12"), "a has 2 bytes, not 3"),
        (lambda f: (f / "a").write_bytes(b"124"), "a was changed"),
    ],
)
@pytest.mark.reliability("R4")
def test_every_damage_is_found(harm: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "sub" / "b").write_bytes(b"")
    write_manifest(tmp_path)
    assert damage(tmp_path) is None
    harm(tmp_path)
    assert (damage(tmp_path) or "").startswith(message)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_safetensors_json_and_nothing_else(stopped: tuple[Path, str]) -> None:
    for number in (2, 4, 6):
        folder = stopped[0] / f"checkpoint-{number}"
        assert damage(folder) is None
        names = {file.relative_to(folder).as_posix() for file in folder.rglob("*")}
        assert {"model.safetensors", "training_state/state.safetensors", "trainer_state.json"} <= names
        kinds = {file.suffix for file in folder.rglob("*") if file.is_file()}
        assert kinds <= {".safetensors", ".json", ".jinja", ".txt", ".model"}, kinds


@pytest.mark.parametrize("options", [{"save_steps": 2}, {"save_strategy": "epoch"}], ids=["mid-epoch", "epoch's end"])
def test_resumed_from_any_of_them_it_is_the_undisturbed_run(
    options: dict[str, Any], llama_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    file = rows("new", count=20)  # five steps an epoch
    out = tmp_path / "out"
    run(llama_folder, out, file, max_steps=12, save_total_limit=9, **options)
    whole = load_file(out / "model.safetensors")
    for folder in sorted(out.glob("checkpoint-*"))[:2]:
        (out / "lorica.json").unlink()
        (out / "model.safetensors").unlink()
        resumed = {"resume_from_checkpoint": str(folder)}
        run(llama_folder, out, file, max_steps=12, save_total_limit=9, **options, **resumed)
        again = load_file(out / "model.safetensors")
        assert all(torch.equal(again[key], whole[key]) for key in whole), folder.name


@pytest.mark.reliability("R3", "R4")
def test_the_newest_complete_one_is_taken_and_the_others_are_named(
    llama_folder: Path, copied: tuple[Path, str]
) -> None:
    out, file = copied
    (out / "checkpoint-6" / "manifest.json").unlink()
    with (out / "checkpoint-4" / "training_state" / "state.safetensors").open("r+b") as stream:
        stream.seek(200)
        stream.write(b"\xff")
    told = run(llama_folder, out, file, save_steps=2, save_total_limit=5, resume_from_checkpoint="true")
    passed = [line for line in told if "is passed over" in line]
    assert ["checkpoint-6" in passed[0], "checkpoint-4" in passed[1], len(passed)] == [True, True, 2]
    assert "training_state/state.safetensors was changed" in passed[1]
    assert (out / "model.safetensors").exists()


@pytest.mark.reliability("R2", "R3")
def test_nothing_complete_is_an_error_and_so_is_a_damaged_one_by_name(copied: tuple[Path, str]) -> None:
    out, _ = copied
    (out / "checkpoint-6" / "model.safetensors").unlink()
    with pytest.raises(LoricaError, match=r"model.safetensors is missing; 'true' takes the newest that is complete"):
        checkpoint_to_resume(str(out / "checkpoint-6"), str(out))
    for number in (2, 4):
        (out / f"checkpoint-{number}" / "manifest.json").unlink()
    said: list[str] = []
    with pytest.raises(LoricaError, match=r"none of the 3 checkpoints.*is complete; the newest, checkpoint-6: model"):
        checkpoint_to_resume("true", str(out), said.append)
    assert len(said) == 3


@pytest.mark.reliability("R1")
def test_old_ones_go_when_the_new_one_is_complete(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    run(llama_folder, tmp_path / "out", rows("new"), save_steps=1, save_total_limit=2)
    left = {folder.name for folder in (tmp_path / "out").glob("checkpoint-*")}
    assert left == {"checkpoint-5", "checkpoint-6"}


@pytest.mark.reliability("R5")
def test_weights_alone_are_no_checkpoint_to_resume(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(llama_folder, out, rows("new"), save_steps=3, save_only_model=True)
    assert damage(out / "checkpoint-3") is None
    with pytest.raises(LoricaError, match="holds no optimizer state"):
        checkpoint_to_resume("true", str(out), lambda line: None)


# --- lorica verify ----------------------------------------------------------------------------------------------------


@pytest.mark.reliability("R4")
def test_verify_finds_a_changed_byte(llama_folder: Path, rows: Rows, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(llama_folder, out, rows("new"), save_steps=3)
    assert [str(one) for one in verify(out)] == [
        f"{name}: complete and unchanged" for name in ("model", "checkpoint-3", "checkpoint-6")
    ]
    assert [one.problem for one in verify(out / "checkpoint-3")] == [None]
    for file, what in ((out / "model.safetensors", "model"), (out / "checkpoint-3" / "config.json", "checkpoint-3")):
        with file.open("r+b") as stream:
            stream.seek(-2, 2)
            stream.write(b"\xfe")
        assert what in [one.what for one in verify(out) if one.problem]


def test_verify_refuses_what_it_cannot_verify(tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match="no such folder"):
        verify(tmp_path / "nowhere")
    with pytest.raises(LoricaError, match=r"holds no checkpoint and no lorica\.json"):
        verify(tmp_path)
    assert "verify" in {command.name for command in app.registered_commands}
