"""After a fault at any moment of a save: what is complete is found and loads, and nothing half passes for whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorica.artefacts.apply import apply_updates
from lorica.artefacts.export import export_update
from lorica.artefacts.file import Update
from lorica.errors import LoricaError
from lorica.experiments.stages import last_stage, write_stage
from lorica.files import LEFTOVER, move_into, remove_folder, sync_tree, write_text
from lorica.lineage import candidate, promote, reject
from lorica.record import write_json
from lorica.subspace.store import SplitStore
from lorica.training.checkpoints import checkpoints_in, unusable
from lorica.training.manifest import damage, write_manifest
from lorica.training.output import check_output_dir, save_model
from lorica.verification import verify
from tests.artefacts.conftest import before_and_after
from tests.builders import tiny
from tests.experiments.conftest import Write, write  # noqa: F401
from tests.experiments.conftest import run as run_stream
from tests.reliability.faults import WORLDS, Image, images, operations
from tests.reliability.small_runs import rows_file, update
from tests.training.conftest import byte_tokenizer, llama_folder  # noqa: F401

pytestmark = [
    pytest.mark.reliability("R1"),
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the simulated disk needs Linux"),
]
LIMIT = int(os.environ.get("LORICA_FAULTS", "0")) or None
"""How many moments of a whole run are gone on from in the slow tests; by default the number that each one names."""


def some(every: Sequence[Image], count: int) -> list[Image]:
    """Return so many images, evenly spread."""
    count = min(LIMIT or count, len(every))
    return [every[(2 * i + 1) * len(every) // (2 * count)] for i in range(count)]


# --- the simulated disk -------------------------------------------------------------------------------------------


def holds(image: Image, name: str) -> str | None:
    content = image.tree.get(name)
    return None if content is None else content.decode()


def last_of(every: list[Image], world: str) -> Image:
    return [image for image in every if image.world == world][-1]


def test_what_is_not_synchronised_is_lost_when_the_power_goes(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")

    def careless() -> None:
        (tmp_path / "new").write_text("new")
        (tmp_path / "old.tmp").write_text("other")
        (tmp_path / "old.tmp").replace(tmp_path / "old")

    every = images(tmp_path, careless)
    assert holds(last_of(every, "killed"), "old") == "other"
    assert holds(last_of(every, "names first"), "old") == "", "renamed, and never written"
    assert {holds(image, "old") for image in every if image.world == "harsh"} <= {"old"}
    assert "ot" in {holds(image, "old.tmp") for image in every}, "a write is cut in half"


def test_what_is_synchronised_is_kept_and_what_is_removed_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").write_text("x")

    def careful() -> None:
        write_text(tmp_path / "folder-less", "text")
        (tmp_path / "gone").unlink()

    every = images(tmp_path, careful)
    for world in WORLDS:
        assert last_of(every, world).tree == {"folder-less": b"text"}, world


def test_every_durable_operation_is_seen(tmp_path: Path) -> None:
    def code() -> None:
        (tmp_path / "a" / "b").mkdir(parents=True)
        save_file({"x": torch.ones(2)}, tmp_path / "a" / "b" / "x.safetensors")
        byte_tokenizer().save_pretrained(tmp_path / "a")
        with (tmp_path / "a" / "text").open("w") as file:
            file.write("text")
            file.flush()
            os.fsync(file.fileno())
        (tmp_path / "a" / "text").rename(tmp_path / "a" / "other")
        shutil.copyfile(tmp_path / "a" / "other", tmp_path / "a" / "copy")
        shutil.rmtree(tmp_path / "a")

    done = operations(tmp_path, code)
    for expected in (
        "mkdir a", "mkdir a/b", "save_file a/b/x.safetensors", "save_tokenizer a/tokenizer.json", "open a/text",
        "write a/text", "fsync a/text", "rename a/other", "open a/copy", "write a/copy", "unlink a/copy", "rmdir a/b",
        "rmdir a",
    ):  # fmt: skip
        assert expected in done, done


# --- single writes ------------------------------------------------------------------------------------------------


def check(every: list[Image], folder: Path, holds_up: Callable[[Path], None]) -> None:
    """Restore every image and look at it."""
    assert len(every) > 3, "nothing was seen"
    assert {image.world for image in every} == set(WORLDS)
    for image in every:
        try:
            holds_up(image.restore(folder))
        except Exception as error:
            raise AssertionError(str(image)) from error


def test_a_text_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "record.json").write_text('{"old": 1}')
    every = images(root, lambda: write_json(root / "record.json", {"new": list(range(100))}))

    def holds_up(folder: Path) -> None:
        assert list(json.loads((folder / "record.json").read_text())) in (["old"], ["new"])
        assert all(LEFTOVER.fullmatch(file.name) for file in folder.iterdir() if file.name != "record.json")

    check(every, tmp_path / "image", holds_up)
    assert b"new" in (every[-1].tree["record.json"] or b"")


def test_a_manifest_is_there_when_all_that_it_lists_is(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "checkpoint-1").mkdir(parents=True)

    def save() -> None:
        folder = root / "checkpoint-1"
        (folder / "sub").mkdir()
        (folder / "config.json").write_text("{}")
        save_file({"x": torch.ones(9)}, folder / "sub" / "state.safetensors")
        write_manifest(folder)

    every = images(root, save)

    def holds_up(folder: Path) -> None:
        if (folder / "checkpoint-1" / "manifest.json").exists():
            assert damage(folder / "checkpoint-1") is None

    check(every, tmp_path / "image", holds_up)
    for world in WORLDS:
        end = last_of(every, world).restore(tmp_path / "image")
        assert damage(end / "checkpoint-1") is None, world


def different(every: list[Image], folder: str = "") -> list[Image]:
    """Return the images that differ in what a loader sees of a folder."""
    seen: dict[str, Image] = {}
    for image in every:
        shown = {name: content for name, content in image.tree.items() if name.startswith(folder) and name[0] != "."}
        seen.setdefault(repr(shown), image)
    return list(seen.values())


def loads_as(folder: Path, models: list[dict[str, torch.Tensor]]) -> bool:
    """Tell whether a folder loads as a model, which must then be one of these."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):
        return False
    state = model.state_dict()
    assert any(all(torch.equal(state[key], one[key]) for key in one) for one in models), "half a model was loaded"
    assert {"tokenizer.json", "generation_config.json"} <= {file.name for file in folder.iterdir()}
    return True


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_a_model_folder_is_whole_or_does_not_load(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorica.training.output.MAX_SHARD", shards)
    root, old, new = tmp_path / "root", tiny("llama"), tiny("llama")
    with torch.no_grad():
        for parameter in new.parameters():
            parameter += 1
    root.mkdir()
    save_model(old, byte_tokenizer(), root)
    every = images(root, lambda: save_model(new, byte_tokenizer(), root))
    known = [dict(old.state_dict()), dict(new.state_dict())]
    seen = set()
    for image in different(every):
        seen.add(loads_as(image.restore(tmp_path / "image"), known))
    assert True in seen
    assert loads_as(every[-1].restore(tmp_path / "image"), known[1:])


def test_a_promoted_model_is_whole_or_does_not_load(tmp_path: Path) -> None:
    root, model = tmp_path / "root", tiny("llama")
    root.mkdir()

    def settle() -> None:
        save_model(model, byte_tokenizer(), candidate(root))
        promote(root)

    every = images(root, settle)
    for image in different(every)[::4]:
        folder = image.restore(tmp_path / "image")
        loads_as(folder, [dict(model.state_dict())])
        save_model(model, byte_tokenizer(), candidate(folder))  # the same again, as a resumed run does
        assert loads_as(promote(folder), [dict(model.state_dict())]), str(image)


def test_a_rejected_model_stays_aside(tmp_path: Path) -> None:
    root, model = tmp_path / "root", tiny("llama")
    root.mkdir()
    save_model(model, byte_tokenizer(), candidate(root))
    for image in images(root, lambda: reject(root)):
        folder = image.restore(tmp_path / "image")
        assert not (folder / "config.json").exists()
        save_model(model, byte_tokenizer(), candidate(folder))
        assert loads_as(reject(folder), [dict(model.state_dict())]), str(image)


def test_of_two_stages_one_is_always_whole(tmp_path: Path) -> None:
    root, one, two = tmp_path / "root", tiny("llama"), tiny("llama")
    root.mkdir()
    write_stage(root, 1, one, {"kept": torch.ones(5)}, {"scores": [1]})
    every = images(root, lambda: write_stage(root, 2, two, {"kept": torch.zeros(5)}, {"scores": [1, 2]}))

    def holds_up(folder: Path) -> None:
        stage = last_stage(folder)
        assert stage is not None
        assert damage(stage.folder) is None
        assert len(stage.progress()["scores"]) == stage.number
        assert stage.memory()["kept"].sum() == (5 if stage.number == 1 else 0)
        assert AutoModelForCausalLM.from_pretrained(str(stage.model)) is not None

    check(every, tmp_path / "image", holds_up)
    folder = every[-1].restore(tmp_path / "image")
    assert [path.name for path in folder.iterdir()] == ["stage-2"]


def test_a_stage_whose_model_is_dropped_stays_whole(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    write_stage(root, 1, tiny("llama"), {"kept": torch.ones(5)}, {"scores": [1]})

    def drop() -> None:
        stage = last_stage(root)
        assert stage is not None
        stage.drop_model()

    def holds_up(folder: Path) -> None:
        assert damage(folder / "stage-1") is None

    check(images(root, drop), tmp_path / "image", holds_up)
    assert {path.name for path in (root / "stage-1").iterdir()} == {"progress.json", "manifest.json"}


def test_a_removed_folder_is_whole_or_has_another_name(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for number in (1, 2):
        (root / f"checkpoint-{number}" / "sub").mkdir(parents=True)
        (root / f"checkpoint-{number}" / "sub" / "file").write_text("x")
        write_manifest(root / f"checkpoint-{number}")
    sync_tree(root)

    def holds_up(folder: Path) -> None:
        assert [damage(one) for one in checkpoints_in(folder)] in ([None, None], [None])

    check(images(root, lambda: remove_folder(root / "checkpoint-1")), tmp_path / "image", holds_up)


def test_a_moved_folder_can_be_moved_again(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("new/config.json", "new/model.safetensors", "new/memory/lorica-memory.safetensors"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "goal").mkdir()
    sync_tree(root)
    for image in images(root, lambda: move_into(root / "new", root / "goal")):
        folder = image.restore(tmp_path / "image")
        move_into(folder / "new", folder / "goal")
        assert {path.name for path in (folder / "goal").rglob("*") if path.is_file()} == {
            "config.json", "model.safetensors", "lorica-memory.safetensors",
        }, str(image)  # fmt: skip


def test_a_cache_of_splits_holds_right_ones_or_none(tmp_path: Path) -> None:
    root, weight = tmp_path / "root", torch.randn(300, 260, dtype=torch.float64)
    root.mkdir()
    right = SplitStore(root).split(weight, 20)
    shutil.rmtree(root)
    root.mkdir()
    for image in different(images(root, lambda: SplitStore(root).split(weight, 20, "layer"))):
        found = SplitStore(image.restore(tmp_path / "image")).split(weight, 20, "layer")
        assert torch.equal(found.sigma_S, right.sigma_S), str(image)


def test_artefacts_are_there_whole_or_not_at_all(tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path)
    root = tmp_path / "root"
    root.mkdir()

    def work() -> None:
        export_update(str(before), str(after), str(root / "update"), say=lambda _: None)
        apply_updates(str(before), [str(root / "update")], str(root / "on"), say=lambda _: None)

    weights = load_file(after / "model.safetensors")
    every = images(root, work)
    for image in every:
        folder = image.restore(tmp_path / "image")
        if (folder / "update").exists() and any((folder / "update").iterdir()):
            Update.load(folder / "update")
        if (folder / "on").exists() and any((folder / "on").iterdir()):
            found = load_file(folder / "on" / "model.safetensors")
            assert all(torch.equal(found[key], weights[key]) for key in weights), str(image)
            assert [one.problem for one in verify(folder / "on")] == [None]
    assert {"update", "on"} <= every[-1].tree.keys()


# --- whole runs ---------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"save_steps": 2, "save_total_limit": 1, "max_steps": 6}


class Whole:
    """A run of ``lorica train`` that nothing disturbed, and what its folder would be after a fault at any moment."""

    def __init__(self, model: Path, folder: Path, **options: Any) -> None:
        self.model, self.options = model, OPTIONS | options
        self.rows = rows_file(folder)
        root = folder / "root"
        root.mkdir()
        self.images = images(root, lambda: update(model, root / "out", self.rows, **self.options))
        self.weights = load_file(root / "out" / "model.safetensors")

    def check(self, folder: Path) -> int:
        """Check what a fault left; return the step of the newest complete checkpoint, 0 if there is none."""
        out = folder / "out"
        whole = [one for one in checkpoints_in(out) if unusable(one) is None]
        for one in whole:
            names = {file.name for file in one.iterdir()}
            assert {"model.safetensors", "trainer_state.json", "tokenizer.json"} <= names
        for name in ("plan.json", "update.json"):
            assert not (out / name).exists() or json.loads((out / name).read_text())
        if (out / "lorica.json").exists():
            assert [one.problem for one in verify(out) if one.what == "model"] == [None]
        if (out / "model.safetensors").exists() and (out / "config.json").exists():
            found = load_file(out / "model.safetensors")
            assert all(torch.equal(found[key], self.weights[key]) for key in self.weights)
        return int(whole[-1].name.split("-")[1]) if whole else 0

    def go_on(self, folder: Path) -> None:
        """Do what the messages say, and end with the weights of the undisturbed run."""
        out = folder / "out"
        if any(unusable(one) is None for one in checkpoints_in(out)):
            update(self.model, out, self.rows, **self.options, resume_from_checkpoint="true")
        elif not (out / "lorica.json").exists():
            with pytest.raises(LoricaError, match=r"holds no checkpoint|is complete"):
                update(self.model, out, self.rows, **self.options, resume_from_checkpoint="true")
            if refused := refusal_of(out):
                assert re.search("remove it|--resume_from_checkpoint", refused)
                shutil.rmtree(out)
            update(self.model, out, self.rows, **self.options)
        found = load_file(out / "model.safetensors")
        assert all(torch.equal(found[key], self.weights[key]) for key in self.weights)
        assert not [one for one in verify(out) if one.problem]


def refusal_of(out: Path) -> str | None:
    """Return why a new update cannot begin in a folder, None where it can."""
    try:
        check_output_dir(str(out), resuming=False)
    except LoricaError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def whole(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(llama_folder, tmp_path_factory.mktemp("whole"))


def check_in_order(run: Whole, every: list[Image], folder: Path) -> None:
    """A checkpoint that was complete is there from then on, or a newer one, until the update has ended."""
    newest = dict.fromkeys(WORLDS, 0)
    steps: dict[frozenset[tuple[str, bytes | None]], int] = {}
    for image in every:
        key = frozenset(image.tree.items())
        if key not in steps:
            steps[key] = run.check(image.restore(folder))
        ended = "out/lorica.json" in image.tree
        assert steps[key] >= newest[image.world] or ended, f"{image}: checkpoint-{newest[image.world]} was lost"
        newest[image.world] = max(newest[image.world], steps[key])
    assert set(newest.values()) == {6}


def test_the_newest_complete_checkpoint_is_found_at_any_moment(whole: Whole, tmp_path: Path) -> None:
    assert len(whole.images) > 300
    chosen = [image for image in whole.images if "manifest" in image.moment or ".removed" in image.moment]
    chosen += [*some(whole.images, 40), *(last_of(whole.images, world) for world in WORLDS)]
    wanted = {id(image) for image in chosen}
    check_in_order(whole, [image for image in whole.images if id(image) in wanted], tmp_path / "image")


def test_from_a_few_moments_the_run_ends_with_the_same_bits(whole: Whole, tmp_path: Path) -> None:
    for image in some(whole.images, 2):
        whole.go_on(image.restore(tmp_path / "image"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"max_forgetting": 100}, {"method": "replay"}], ids=["osft", "judged", "replay"]
)
def test_from_any_moment_the_run_ends_with_the_same_bits(
    options: dict[str, Any], llama_folder: Path, tmp_path: Path
) -> None:
    if "max_forgetting" in options:
        options = options | {"retention_file": rows_file(tmp_path, "known", 4)}
    run = Whole(llama_folder, tmp_path, **options)
    check_in_order(run, run.images, tmp_path / "image")
    for image in some(run.images, 12):
        run.go_on(image.restore(tmp_path / "image"))


@pytest.mark.slow
def test_a_stream_goes_on_from_any_moment(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    stream, root = write(), tmp_path / "root"
    options: dict[str, Any] = {"methods": "half", "max_steps": 2, "save_models": True}
    root.mkdir()
    every = images(root, lambda: run_stream(stream, llama_folder, root / "out", **options))
    weights = load_file(root / "out" / "half" / "model" / "model.safetensors")
    scores = json.loads((root / "out" / "half" / "run.json").read_text())["scores"]
    for image in some(every, 25):
        out = image.restore(tmp_path / "image") / "out"
        run_stream(stream, llama_folder, out, **options)
        found = load_file(out / "half" / "model" / "model.safetensors")
        assert all(torch.equal(found[key], weights[key]) for key in weights), str(image)
        assert json.loads((out / "half" / "run.json").read_text())["scores"] == scores, str(image)
        assert not [one for one in verify(out) if one.problem], str(image)
