"""A full or broken disk: one clear message, what was there before is whole, and the same command ends well later."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorica import cli
from lorica.errors import LoricaError
from lorica.experiments.stages import last_stage, write_stage
from lorica.files import CannotWrite, refusal, writing
from lorica.forecast.needs import Disk
from lorica.record import write_json
from lorica.told import check_room
from lorica.training.checkpoints import checkpoints_in, unusable
from lorica.training.manifest import damage
from lorica.training.output import save_model
from tests.artefacts.conftest import before_and_after
from tests.builders import tiny
from tests.reliability.faults import NEEDS_ROOM, failing, operations
from tests.reliability.small_runs import rows_file, stream_of, update
from tests.training.conftest import byte_tokenizer, llama_folder  # noqa: F401

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the simulated disk needs Linux")
Command = Callable[..., tuple[int, str, str]]
TRAIN = ["--preset", "paper", "--max_steps", "6", "--learning_rate", "3e-3", "--disable_tqdm", "true", "--seed", "1",
         "--per_device_train_batch_size", "4", "--save_steps", "2", "--save_total_limit", "5"]  # fmt: skip


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process; return its status, output and errors."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lorica", *map(str, words)])
        status: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code or 0
        captured = capsys.readouterr()
        return int(status), captured.out, captured.err

    return run


def one_line(errors: str) -> str:
    """Return the line that a user is told, which is the only one of its kind, without a traceback."""
    assert "Traceback" not in errors, errors
    (line,) = re.findall("lorica: .*", errors)
    return str(line)


# --- what is told -------------------------------------------------------------------------------------------------


@pytest.mark.reliability("R6")
def test_the_message_names_the_file_and_the_room(tmp_path: Path) -> None:
    with failing(tmp_path, 2) as disk, pytest.raises(CannotWrite) as told:
        write_json(tmp_path / "record.json", {"a": 1})
    assert disk.done[-1].startswith(("write", "unlink"))
    pattern = (
        rf"cannot write {tmp_path}/record.json: No space left on device; it needs about 12 bytes, and [\d,]+ bytes"
    )
    assert re.match(pattern, str(told.value)), told.value
    assert not list(tmp_path.iterdir())


@pytest.mark.reliability("R6")
def test_a_limit_on_the_size_of_files_is_the_systems_own(tmp_path: Path) -> None:
    with limited(1000), pytest.raises(CannotWrite, match="model: File too large; it needs about"):
        save_model(tiny("llama"), byte_tokenizer(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_only_the_systems_refusals_are_told_so(tmp_path: Path) -> None:
    assert refusal(OSError(errno.ENOSPC, "")) == errno.ENOSPC
    assert refusal(Exception("I/O error (os error 28)")) == errno.ENOSPC
    assert refusal(FileNotFoundError(errno.ENOENT, "")) is None
    assert refusal(ValueError("28")) is None
    assert refusal(LoricaError("(os error 28)")) is None
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        raise ZeroDivisionError


@contextmanager
def limited(size: int) -> Any:
    """Let no file of this process grow above a size, as a user's limit does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- single writes, failing at every place ------------------------------------------------------------------------


def places(root: Path, work: Callable[[], object], number: int) -> list[int]:
    """Return which operations of some work may fail with an error: all, or those that need room."""
    done = operations(root, work)
    every = [at for at, name in enumerate(done, start=1) if number == errno.EIO or name.split()[0] in NEEDS_ROOM]
    return [at for at in every if done[at - 1].split()[0] not in ("unlink", "rmdir")]


FULL_AND_BROKEN = pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])


@FULL_AND_BROKEN
@pytest.mark.reliability("R6")
def test_a_model_that_cannot_be_written_leaves_the_one_before(number: int, tmp_path: Path) -> None:
    model, tokenizer, out = tiny("llama"), byte_tokenizer(), tmp_path / "out"

    def fresh() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / "config.json").write_text("older")

    fresh()
    every = places(tmp_path, lambda: save_model(model, tokenizer, out), number)
    assert len(every) > 10
    for at in every:
        fresh()
        with failing(tmp_path, at, number, stays_full=number == errno.ENOSPC), pytest.raises(CannotWrite):
            save_model(model, tokenizer, out)
        assert {path.name for path in out.iterdir()} == {"config.json"}, at
        assert (out / "config.json").read_text() == "older", at


@FULL_AND_BROKEN
@pytest.mark.reliability("R6")
def test_a_stage_that_cannot_be_written_leaves_the_one_before(number: int, tmp_path: Path) -> None:
    model, memory = tiny("llama"), {"kept": torch.ones(5)}
    first, cell = tmp_path / "first", tmp_path / "cell"
    write_stage(first, 1, model, memory, {"scores": [1]})
    shutil.copytree(first, cell)
    done = operations(tmp_path, lambda: write_stage(cell, 2, model, memory, {"scores": [1, 2]}))
    renamed = next(at for at, name in enumerate(done, start=1) if name == "rename cell/stage-2")
    for at in range(1, renamed + 1):
        if done[at - 1].split()[0] in ("unlink", "rmdir") or (
            number == errno.ENOSPC and done[at - 1].startswith("ren")
        ):
            continue
        shutil.rmtree(cell)
        shutil.copytree(first, cell)
        with failing(tmp_path, at, number, stays_full=number == errno.ENOSPC), pytest.raises(CannotWrite):
            write_stage(cell, 2, model, memory, {"scores": [1, 2]})
        stage = last_stage(cell)
        assert stage is not None
        assert stage.number == 1
        assert damage(stage.folder) is None
        assert [path.name for path in cell.iterdir()] == ["stage-1"], at


@pytest.mark.parametrize("what", ["export-update", "apply"])
@pytest.mark.reliability("R6")
def test_an_artefact_that_cannot_be_written_leaves_nothing(what: str, command: Command, tmp_path: Path) -> None:
    before, after = before_and_after(tmp_path)
    assert command("export-update", before, after, tmp_path / "update")[0] == 0
    work = tmp_path / "work"
    work.mkdir()
    words = {
        "export-update": ["export-update", before, after, work / "new"],
        "apply": ["apply", before, tmp_path / "update", "--output_dir", work / "new"],
    }[what]
    every = places(work, lambda: command(*words), errno.ENOSPC)
    for at in (*every[:-3:3], *every[-3:]):
        shutil.rmtree(work / "new", ignore_errors=True)
        with failing(work, at):
            status, _, errors = command(*words)
        if (work / "new").exists():  # the last name was there, and only its way to the disk was refused
            assert at == every[-1]
        assert status == 2
        assert f"{work / 'new'}" in one_line(errors)
        assert "No space left on device" in errors
        assert not [path for path in work.iterdir() if path.name != "new"]


# --- lorica train -------------------------------------------------------------------------------------------------


def check_what_is_left(out: Path, errors: str) -> None:
    """The checkpoint that the message names is the newest complete one, and nothing incomplete is there."""
    line = one_line(errors)
    found = checkpoints_in(out)
    assert all(unusable(one) is None for one in found), [one.name for one in found]
    if (out / "lorica.json").exists():
        assert "the model and its record are whole" in line
    elif found:
        assert f"the last complete checkpoint, {found[-1]}, is whole" in line
        assert line.endswith("go on with --resume_from_checkpoint true")
    else:
        assert re.search("no checkpoint was complete before; (make room|put that right) and begin anew$", line)


@pytest.fixture(scope="module")
def undisturbed(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("undisturbed")
    file = rows_file(folder)
    root = folder / "root"
    root.mkdir()
    words = ["train", "--model_name_or_path", llama_folder, "--train_file", file, *TRAIN]
    options = {"max_steps": 6, "save_steps": 2, "save_total_limit": 5}
    done = operations(root, lambda: update(llama_folder, root / "out", file, **options))
    return SimpleNamespace(words=words, done=done, weights=load_file(root / "out" / "model.safetensors"))


def fails_and_goes_on(run: Any, at: int, number: int, command: Command, root: Path, *, resumes: bool = True) -> None:
    out = root / "out"
    with failing(root, at, number, stays_full=number == errno.ENOSPC):
        status, _, errors = command(*run.words, "--output_dir", out)
    assert status == 2, (run.done[at - 1], errors)
    assert os.strerror(number) in one_line(errors)
    check_what_is_left(out, errors)
    if number == errno.ENOSPC and "checkpoint-" in run.done[at - 1]:
        assert re.search(r"it needs about [\d,]+ bytes, and [\d,]+ bytes are free there", errors), errors
    if resumes and checkpoints_in(out):
        assert command(*run.words, "--output_dir", out, "--resume_from_checkpoint", "true")[0] == 0
        found = load_file(out / "model.safetensors")
        assert all(torch.equal(found[key], run.weights[key]) for key in run.weights)


def train_places(run: Any, number: int) -> list[int]:
    """Return the operations of a whole update that may fail; what removes is left out."""
    needs = [at for at, name in enumerate(run.done, start=1) if name.split()[0] in NEEDS_ROOM]
    return needs if number == errno.ENOSPC else [
        at for at, name in enumerate(run.done, start=1) if name.split()[0] not in ("unlink", "rmdir", "rename")
    ]  # fmt: skip


@pytest.mark.reliability("R6")
@pytest.mark.parametrize("where", ["update.json", "checkpoint-4/model.safetensors", "lorica.json"])
def test_a_full_disk_ends_an_update_with_one_line(
    where: str, undisturbed: Any, command: Command, tmp_path: Path
) -> None:
    at = next(i for i, name in enumerate(undisturbed.done, 1) if where in name and name.split()[0] in NEEDS_ROOM)
    fails_and_goes_on(undisturbed, at, errno.ENOSPC, command, tmp_path, resumes=where.startswith("checkpoint-4"))


@pytest.mark.slow
@pytest.mark.reliability("R6")
@FULL_AND_BROKEN
def test_an_update_may_fail_anywhere(number: int, undisturbed: Any, command: Command, tmp_path: Path) -> None:
    every = train_places(undisturbed, number)
    step = max(1, len(every) // int(os.environ.get("LORICA_FAULTS", "30")))
    for count, at in enumerate(every[::step]):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        fails_and_goes_on(undisturbed, at, number, command, tmp_path, resumes=count % 5 == 0)


@pytest.mark.reliability("R6")
def test_a_limit_on_file_sizes_ends_an_update_with_one_line(
    llama_folder: Path, command: Command, tmp_path: Path
) -> None:
    words = ["train", "--model_name_or_path", llama_folder, "--train_file", rows_file(tmp_path), *TRAIN]
    with limited((llama_folder / "model.safetensors").stat().st_size // 2):
        status, _, errors = command(*words, "--output_dir", tmp_path / "out")
    assert status == 2
    assert "File too large" in one_line(errors)
    check_what_is_left(tmp_path / "out", errors)


@pytest.mark.slow
@pytest.mark.reliability("R6")
def test_a_file_system_that_is_really_full(llama_folder: Path, tmp_path: Path) -> None:
    """In a mount namespace of its own, where that is allowed: it is gone with the process."""
    disk, file = tmp_path / "disk", rows_file(tmp_path)
    disk.mkdir()
    size = 3 * (llama_folder / "model.safetensors").stat().st_size
    lorica = [
        sys.executable,
        "-m",
        "lorica.cli",
        "train",
        "--model_name_or_path",
        str(llama_folder),
        "--train_file",
        file,
    ]
    lorica += [*TRAIN, "--output_dir", str(disk / "out")]
    # The forecast would refuse at once: the room is taken while the run is on its way.
    fill = (
        f"(while [ ! -d {disk}/out/checkpoint-2 ]; do sleep 0.05; done; head -c {8 * size} /dev/zero > {disk}/filler) &"
    )
    script = f"mount -t tmpfs -o size={8 * size} none {disk} && {{ {fill} {' '.join(lorica)}; echo status $?; }}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=120)
    if "status" not in done.stdout:
        pytest.skip(f"no mount namespace here: {done.stderr[:200]}")
    assert "status 2" in done.stdout, done
    assert "No space left on device" in one_line(done.stderr)


# --- the other commands -------------------------------------------------------------------------------------------


def commands(folder: Path, model: Path, work: Path) -> dict[str, list[object]]:
    """Return a small call of every other command that writes; each writes below ``work``."""
    rows, prompts = rows_file(folder, "known", 4), folder / "prompts.txt"
    prompts.write_text("one?\n")
    (folder / "judge.py").write_text("def longer(prompt, first, second):\n    return len(first) - len(second)\n")
    judge = folder / "judge.py"
    stream = stream_of(folder / "stream").path("stream.yaml")
    return {
        "run": ["run", stream, "--model_name_or_path", model, "--output_dir", work / "out", "--methods", "seqft"],
        "eval": ["eval", model, "--tasks", rows, "--output_file", work / "eval.json"],
        "judge": ["judge", model, model, "--prompts_file", prompts, "--judge_function", f"{judge}:longer",
                  "--output_dir", work / "out", "--max_new_tokens", "2"],
        "inspect": ["inspect", model, "--output_dir", work / "out", "--curvature_rows", "0"],
        "check": ["check", "--model_name_or_path", model, "--json", work / "check.json"],
        "audit": ["audit", model, model, "--json", work / "audit.json"],
        "report": ["report", folder / "run", "--output_dir", work / "out"],
    }  # fmt: skip


@pytest.mark.reliability("R6")
@pytest.mark.parametrize(
    "name",
    ["run", "eval", "audit", "report", *(pytest.param(one, marks=pytest.mark.slow) for one in ("judge", "inspect"))],
)
def test_every_command_answers_a_full_disk_with_one_line(
    name: str, llama_folder: Path, command: Command, tmp_path: Path, undisturbed: Any
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    words = commands(tmp_path, llama_folder, work)[name]
    if name == "report":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "lorica.json").write_text(json.dumps({"schema": 1, "kind": "train", "method": "osft"}))
    every = places(work, lambda: command(*words), errno.ENOSPC)
    assert len(every) > 2
    for at in (every[0], every[len(every) // 2]):
        shutil.rmtree(work)
        work.mkdir()
        with failing(work, at) as disk:
            status, _, errors = command(*words)
        assert status == 2, disk.done
        assert str(work) in one_line(errors), (disk.done[at - 1], errors)
        assert "No space left on device" in errors


@pytest.mark.reliability("R6")
def test_a_folder_that_takes_nothing_is_named(llama_folder: Path, command: Command, tmp_path: Path) -> None:
    """As root no folder is read-only; a file in the way refuses in the same place, and procfs takes nothing."""
    for out in (Path("/proc/lorica-out"), rows_file(tmp_path) + "/out"):
        words = ["train", "--model_name_or_path", llama_folder, "--train_file", rows_file(tmp_path), *TRAIN]
        status, _, errors = command(*words, "--output_dir", out)
        assert status == 2, errors
        assert str(out) in one_line(errors)


# --- before the first step ----------------------------------------------------------------------------------------


def with_free(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**12, used=0, free=free))


@pytest.mark.reliability("R7")
@pytest.mark.parametrize("method", ["osft", "ewc"])
def test_too_little_room_is_an_error_before_the_first_step(
    method: str, llama_folder: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, size = tmp_path / "out", (llama_folder / "model.safetensors").stat().st_size
    words = ["train", "--model_name_or_path", llama_folder, "--train_file", rows_file(tmp_path), *TRAIN]
    words += ["--output_dir", out, "--method", method]
    with_free(3 * size, monkeypatch)  # six checkpoints and the model would be there at once
    status, told, errors = command(*words)
    assert status == 2
    pattern = r"--output_dir .*: the run needs .*of disk \(.* the model, .* 3 checkpoints\) and .* is free there"
    assert re.search(pattern, one_line(errors)), errors
    assert not out.exists()
    assert "training:" not in told


@pytest.mark.reliability("R7")
def test_what_checkpoints_take_already_is_free_for_the_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(model=100, checkpoint=300, kept=3, lasting=2, bases=50, cache=0)
    assert disk.output == 950
    for number in (2, 4):
        (tmp_path / f"checkpoint-{number}" / "training_state").mkdir(parents=True)
        (tmp_path / f"checkpoint-{number}" / "training_state" / "state").write_bytes(b"x" * 300)
    (tmp_path / "other").write_bytes(b"x" * 1000)
    with_free(350, monkeypatch)
    check_room(disk, str(tmp_path))
    with_free(349, monkeypatch)
    with pytest.raises(LoricaError, match="the run needs"):
        check_room(disk, str(tmp_path))


@pytest.mark.reliability("R7")
@pytest.mark.parametrize(
    "options",
    [
        {"save_total_limit": 1},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"method": "seqft", "save_total_limit": None},
                {"memory_mode": "lean"},
                {"source": "curvature", "calibration": "random", "curvature_penalty": 9.0, "remember_tasks": True},
                {"save_only_model": True},
                {"save_steps": 0.5},
                {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
            )
        ),
    ],
    ids=str,
)
def test_the_room_that_is_forecast_is_the_room_that_is_taken(
    options: dict[str, Any], llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorica import told

    seen: list[Any] = []
    monkeypatch.setattr(told, "check_room", lambda disk, output_dir: seen.append(disk))
    out = tmp_path / "out"
    given = {"max_steps": 6, "save_steps": 2, "save_total_limit": 2} | options
    most = 0

    def count(*_: Any) -> None:
        nonlocal most
        files = [
            file for file in out.rglob("*.safetensors") if file.name != "state.safetensors"
        ]  # 30 kB whatever the model
        most = max(most, sum(file.stat().st_size for file in files))

    from lorica.training import keeper

    before = keeper.write_manifest
    monkeypatch.setattr(keeper, "write_manifest", lambda folder: (before(folder), count()))
    update(llama_folder, out, rows_file(tmp_path), **given)
    count()
    (disk,) = seen
    # What is remembered of the update is told as the most that it may take.
    assert 0.96 < disk.output / most <= (1.02 if "remember_tasks" in options else 1.0), (disk, most)


@pytest.mark.reliability("R7")
def test_a_stream_without_room_is_an_error_before_its_first_task(
    llama_folder: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = commands(tmp_path, llama_folder, tmp_path)["run"]
    with_free((llama_folder / "model.safetensors").stat().st_size, monkeypatch)
    status, _, errors = command(*words)
    assert status == 2
    assert re.search(r"the run needs .* of disk, 2 models at once, and .* is free there", one_line(errors))
    assert not (tmp_path / "out").exists()


def test_more_memory_than_there_is_is_a_warning(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorica.told.memory_of", lambda device: 10**6)
    _, lines = update(llama_folder, tmp_path / "out", rows_file(tmp_path), max_steps=1)
    (line,) = (line for line in lines if "of memory" in line)
    assert line.startswith("notice: this machine has 1.0 MB of memory, so the run may not come to its end")
    assert "--memory_mode" in line
