"""Outputs stay in the output folder whatever the data is called, and a checkpoint that is another's is not taken."""

from __future__ import annotations

import bz2
import json
import os
import shutil
import stat
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorica.artefacts.apply import apply_updates
from lorica.artefacts.bits import unpack
from lorica.artefacts.export import export_update
from lorica.config import build_config
from lorica.errors import LoricaError
from lorica.experiments.stages import last_stage
from lorica.experiments.story import cell_name
from lorica.json_file import sealed
from lorica.names import check_folder_name, check_no_links
from lorica.training.checkpoints import checkpoint_to_resume
from lorica.training.models import read_tokenizer
from lorica.training.output import save_model
from tests.reliability.small_runs import files_in, rows_file, run, stream_of, update
from tests.training.conftest import llama_folder  # noqa: F401

HOSTILE = (
    "..",
    ".",
    "",
    "../../evil",
    "/etc/evil",
    "a/b",
    "a\\b",
    "nul\x00",
    "C:evil",
    "~",
    "x" * 300,
    ".hidden",
    "\n",
    "é/..",
)
NAMES = st.text(max_size=12) | st.sampled_from(HOSTILE) | st.text("./\\~:é \x00a", max_size=6)


def everything_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.reliability("S9")
@given(method=NAMES, order=st.none() | NAMES, seed=st.integers(0, 2**32 - 1))
def test_a_name_that_is_taken_is_one_folder_inside(
    tmp_path_factory: pytest.TempPathFactory, method: str, order: str | None, seed: int
) -> None:
    try:
        for name in filter(lambda name: name is not None, (method, order)):
            check_folder_name(str(name), "settings or order")
    except LoricaError:
        return
    out = tmp_path_factory.mktemp("out")
    own = out / method / cell_name(order, seed)
    own.mkdir(parents=True)  # the system takes it as well
    assert own.resolve().parent.parent == out.resolve()


@pytest.mark.reliability("S9")
@given(st.text("abcdefghijklmnopqrstuvwxyzäöüßé中文0123456789-_=+,. ", min_size=1, max_size=20))
def test_ordinary_names_are_taken(name: str) -> None:
    check_folder_name(f"a{name}z", "settings")


@pytest.mark.reliability("S9")
@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in ("~",)])
def test_names_of_settings_and_orders_in_a_stream_lead_nowhere(name: str, llama_folder: Path, tmp_path: Path) -> None:
    settings = {name: {"method": "seqft", "learning_rate": 1e-2}}
    with pytest.raises(LoricaError, match="cannot be the name of a folder"):
        run(stream_of(tmp_path / "data", methods=settings), llama_folder, tmp_path / "out" / "runs")
    stream = stream_of(tmp_path / "data", orders={name: ["first", "second"]})
    with pytest.raises(LoricaError, match="cannot be the name of a folder"):
        run(stream, llama_folder, tmp_path / "out" / "runs")
    assert everything_in(tmp_path) == {"data", *(f"data/{file.name}" for file in files_in(tmp_path / "data"))}


@pytest.mark.reliability("S9")
def test_names_of_tasks_and_abilities_are_no_paths(llama_folder: Path, tmp_path: Path) -> None:
    tasks = ("../../evil", "/etc/evil")
    rows = rows_file(tmp_path / "data", "held", 4)
    held = [{"name": "nul\x00/../x", "test_file": rows}, {"name": "", "test_file": rows}]
    stream = stream_of(tmp_path / "data", tasks, held_out=held)
    before = everything_in(tmp_path)
    (record,) = run(stream, llama_folder, tmp_path / "out" / "deeper" / "runs", save_models=True)
    assert record["tasks"] == list(tasks)
    new = everything_in(tmp_path) - before - {"out", "out/deeper"}
    assert all(name.startswith("out/deeper/runs") for name in new)
    assert not any((folder / "evil").exists() for folder in (*tmp_path.parents, Path("/etc")))


@pytest.mark.reliability("S9")
@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/b"])
def test_templates_of_a_tokenizer_are_saved_in_its_folder(name: str, llama_folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "{{ 1 }}"}, {"name": name, "template": "evil"}]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    before = everything_in(tmp_path)
    with pytest.raises((LoricaError, ValueError)):
        save_model(Unsaved(), read_tokenizer(str(model)), tmp_path / "out" / "deeper")
    assert not [name for name in everything_in(tmp_path) - before if "evil" in name or name.endswith(".jinja")]


class Unsaved:
    """Stands for a model of which nothing is written."""

    def save_pretrained(self, folder: Path, **options: object) -> None:
        Path(folder).mkdir(parents=True)

    def state_dict(self, **options: object) -> dict[str, object]:
        return {}


@pytest.mark.reliability("S9")
@pytest.mark.parametrize("name", ["../update-00001.safetensors", "/etc/passwd", "update-00001.safetensors/..", "x"])
def test_a_saved_update_names_files_beside_itself_alone(name: str, llama_folder: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(llama_folder, tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] + 1}, changed / "model.safetensors", {"format": "pt"})
    export_update(str(llama_folder), str(changed), str(tmp_path / "update"), say=lambda line: None)
    header = tmp_path / "update" / "lorica-update.json"
    data = json.loads(header.read_text())
    data["files"] = {name: next(iter(data["files"].values()))}
    header.write_text(json.dumps(sealed(data)))
    with pytest.raises(LoricaError, match=r"damaged: files.*is no file of an update"):
        apply_updates(str(llama_folder), [str(tmp_path / "update")], str(tmp_path / "new"), say=lambda line: None)


@pytest.mark.reliability("S9")
@pytest.mark.parametrize("field", ["output_dir", "train_file", "retention_file", "model_name_or_path"])
def test_a_path_with_nul_is_one_error(field: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"model_name_or_path": "m", "train_file": "x.jsonl", "output_dir": str(tmp_path / "out")}
    for value in ("a\x00b", ["c", "a\x00b"]) if field == "retention_file" else ("a\x00b",):
        with pytest.raises(LoricaError, match=f"--{field} holds a NUL character"):
            build_config(values | {field: value})


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.reliability("S9")
@pytest.mark.parametrize("name", ["plan.json", "checkpoint-2", "lorica.json", ".saving", "deep/er/model.safetensors"])
def test_nothing_is_written_through_a_link(name: str, llama_folder: Path, tmp_path: Path) -> None:
    out, precious = tmp_path / "out", tmp_path / "precious"
    precious.mkdir()
    (precious / "kept").write_text("kept")
    (out / name).parent.mkdir(parents=True)
    (out / name).symlink_to(precious / "kept" if name.endswith("n") else precious)
    with pytest.raises(LoricaError, match="is a symbolic link"):
        check_no_links(out)
    for options in ({}, {"resume_from_checkpoint": "true"}):
        with pytest.raises(LoricaError):
            update(llama_folder, out, rows_file(tmp_path / "data"), max_steps=1, **options)
    with pytest.raises(LoricaError, match="is a symbolic link"):
        run(stream_of(tmp_path / "data", ("one",)), llama_folder, out)
    assert everything_in(precious) == {"kept"}
    assert (precious / "kept").read_text() == "kept"


@pytest.mark.slow
@pytest.mark.reliability("S9")
def test_the_output_folder_itself_may_be_a_link(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large disk")
    update(llama_folder, tmp_path / "out", rows_file(tmp_path / "data"), max_steps=1)
    assert (tmp_path / "large disk" / "model.safetensors").exists()


# --- checkpoints of others --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder, mask = tmp_path_factory.mktemp("kept"), os.umask(0o022)
    rows = rows_file(folder)
    update(llama_folder, folder / "out", rows, save_steps=2, save_total_limit=5)
    run(stream_of(folder / "data", ("one",)), llama_folder, folder / "runs")
    os.umask(mask)
    return folder, rows


@pytest.fixture
def copied(kept: tuple[Path, str], tmp_path: Path) -> Path:
    shutil.copytree(kept[0], tmp_path / "kept")
    return tmp_path / "kept"


def chosen(out: Path) -> tuple[str | None, list[str]]:
    told: list[str] = []
    return checkpoint_to_resume("true", str(out), told.append), told


@pytest.mark.reliability("S15")
def test_own_checkpoints_are_taken_without_a_word(copied: Path) -> None:
    assert chosen(copied / "out") == (str(copied / "out" / "checkpoint-4"), [])


@pytest.mark.reliability("S15")
@pytest.mark.parametrize("bits", [stat.S_IWGRP, stat.S_IWOTH])
@pytest.mark.parametrize("part", ["", "trainer_state.json", "training_state"])
def test_what_others_can_write_to_is_said(bits: int, part: str, copied: Path) -> None:
    path = copied / "out" / "checkpoint-4" / part
    path.chmod(stat.S_IMODE(path.stat().st_mode) | bits)
    checkpoint, (told,) = chosen(copied / "out")
    assert checkpoint == str(copied / "out" / "checkpoint-4")
    who = "everybody" if bits == stat.S_IWOTH else "its group"
    assert told.startswith(f"notice: {path} can be written by {who}")
    assert "chmod -R go-w" in told


@pytest.mark.reliability("S15")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("part", ["", "model.safetensors", "training_state/state.safetensors"])
def test_a_checkpoint_of_another_user_is_passed_over(part: str, copied: Path) -> None:
    os.chown(copied / "out" / "checkpoint-4" / part, 12345, -1)
    checkpoint, (told,) = chosen(copied / "out")
    assert checkpoint == str(copied / "out" / "checkpoint-2")
    assert "belongs to another user (uid 12345)" in told


@pytest.mark.reliability("S15")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_owner_of_the_output_folder_is_trusted(copied: Path) -> None:
    for path in (copied / "out", *(copied / "out").rglob("*")):
        os.chown(path, 12345, -1)
    assert chosen(copied / "out")[0] == str(copied / "out" / "checkpoint-4")


@pytest.mark.reliability("S15")
def test_a_link_in_a_checkpoint_is_passed_over(copied: Path) -> None:
    weights = copied / "out" / "checkpoint-4" / "model.safetensors"
    weights.rename(copied / "elsewhere")
    weights.symlink_to(copied / "elsewhere")
    checkpoint, (told,) = chosen(copied / "out")
    assert checkpoint == str(copied / "out" / "checkpoint-2")
    assert "checkpoint-4/model.safetensors is a symbolic link" in told


@pytest.mark.reliability("S15")
def test_a_stage_of_another_user_is_not_gone_on_with(copied: Path) -> None:
    (cell,) = (copied / "runs").rglob("cell")
    stage = last_stage(cell)
    assert stage is not None
    (stage.folder / "memory.pkl").write_bytes(b"")
    with pytest.raises(LoricaError, match=r"memory\.pkl is a pickle, which no run of Lorica writes; remove"):
        last_stage(cell)


# --- what is compressed -----------------------------------------------------------------------------------------------


@pytest.mark.reliability("S10")
@pytest.mark.parametrize("compress", [zlib.compress, bz2.compress])
def test_a_bomb_in_a_saved_update_takes_no_more_memory_than_its_tensor(compress: Callable[[bytes], bytes]) -> None:
    plane = compress(bytes(50_000_000))
    head = np.array([len(plane)] * 4, "<u8").tobytes()
    packed = torch.frombuffer(bytearray(head + plane * 4), dtype=torch.uint8)
    tracemalloc.start()
    numbers = unpack(packed, 1000, 4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert numbers.shape == (1000,)
    assert peak < 5_000_000
