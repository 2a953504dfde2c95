"""A signal in any phase: work is kept where there is any, nothing is half-written, and the end is the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorica.cli
import lorica.constrain.bases
import lorica.experiments.setup
import lorica.inputs
import lorica.training.keeper
import lorica.training.output
import lorica.update
from lorica.constrain.reduced import ReducedLinear
from lorica.errors import Interrupted
from lorica.signals import handled, stop
from lorica.training.checkpoints import checkpoints_in, unusable
from lorica.training.interrupt import SignalCatcher
from lorica.training.trainer import MethodTrainer
from tests.experiments.conftest import Write, write  # noqa: F401
from tests.experiments.conftest import run as run_stream
from tests.reliability.interruptions import (
    assert_same,
    begun_in_child,
    cases,
    outcome,
    quick_updates,
    signalled_in,
    status_of,
    stopped_at,
)
from tests.reliability.small_runs import rows_file, update
from tests.training.conftest import llama_folder  # noqa: F401

TWO = {
    "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 5e-3,
    "logging_steps": 1,
}  # fmt: skip
EVAL = {"eval_strategy": "steps", "eval_steps": 2}

IN_TRAINING: dict[str, tuple[Any, str, int]] = {
    "forward": (ReducedLinear, "forward", 40),
    "backward": (ReducedLinear, "backward", 60),
    "optimizer": (torch.optim.AdamW, "step", 2),
    "evaluation": (MethodTrainer, "evaluation_loop", 1),
    "log": (MethodTrainer, "log", 2),
    "save": (lorica.training.keeper, "save_tree", 1),
    "manifest": (lorica.training.keeper, "write_manifest", 1),
}
"""Where a signal waits for the end of the step."""

OUTSIDE: dict[str, tuple[Any, str, int]] = {
    "reading rows": (lorica.inputs, "validate", 1),
    "tokenising": (lorica.inputs, "load", 1),
    "loading": (lorica.update, "load_model", 1),
    "splitting": (lorica.constrain.bases, "protected_directions", 5),
    "scoring before": (lorica.update, "evaluate", 1),
    "saving the model": (lorica.update, "save_model", 1),
    "moving it into place": (lorica.training.output, "move_into", 1),
    "what it remembers": (lorica.update, "size_of", 1),
    "scoring after": (lorica.update, "evaluate", 2),
    "report": (lorica.update, "write_report", 1),
}
"""Where it ends the process at once."""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_updates():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    return {"file": rows_file(folder, "new", 12), "eval_file": rows_file(folder, "dev", 4)}


@pytest.fixture(scope="module")
def whole(llama_folder: Path, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the undisturbed run comes to."""
    out = tmp_path_factory.mktemp("whole") / "out"
    update(llama_folder, out, **files, **TWO | EVAL)
    return outcome(out)


def nothing_is_half_written(out: Path) -> None:
    for folder in checkpoints_in(out):
        assert unusable(folder) is None
    hidden = {path.name for path in out.rglob(".*")} if out.exists() else set()
    assert not hidden, hidden
    if (out / "model.safetensors").exists():
        load_file(out / "model.safetensors")


def go_on(model: Path, out: Path, files: dict[str, str], **options: Any) -> None:
    resumes = {"resume_from_checkpoint": "true"} if checkpoints_in(out) else {}
    update(model, out, **files, **TWO | EVAL | options | resumes)


@pytest.mark.reliability("R12")
@pytest.mark.parametrize("place", cases(IN_TRAINING, quick=("forward", "backward", "evaluation", "save")))
def test_within_training_it_waits_for_the_end_of_the_step(
    place: tuple[Any, str, int], llama_folder: Path, files: dict[str, str], whole: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    saves = {"save_steps": 2} if place[0] is lorica.training.keeper else {}
    with signalled_in(*place[:2], call=place[2]), pytest.raises(Interrupted) as stopped:
        update(llama_folder, out, **files, **TWO | EVAL | saves)
    assert stopped.value.checkpoint is not None
    assert Path(stopped.value.checkpoint) in checkpoints_in(out)
    nothing_is_half_written(out)
    go_on(llama_folder, out, files, **saves)
    assert_same(outcome(out), whole)


@pytest.mark.reliability("R12")
@pytest.mark.parametrize("place", cases(OUTSIDE, quick=("loading", "splitting", "moving it into place")))
def test_outside_of_training_it_ends_the_process_and_nothing_is_half_written(
    place: tuple[Any, str, int], llama_folder: Path, files: dict[str, str], whole: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with signalled_in(*place[:2], call=place[2]), pytest.raises(Interrupted) as stopped:
        update(llama_folder, out, **files, **TWO | EVAL)
    assert stopped.value.checkpoint is None
    assert str(stopped.value).endswith("resume_from_checkpoint true") == bool(checkpoints_in(out))
    nothing_is_half_written(out)
    go_on(llama_folder, out, files)
    assert_same(outcome(out), whole)
    nothing_is_half_written(out)


@pytest.mark.reliability("R11", "R12")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("command", ["train", "run"])
def test_both_commands_answer_both_signals_in_one_line(
    command: str, signum: signal.Signals, llama_folder: Path, files: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], write: Write,
) -> None:  # fmt: skip
    words = [f"--model_name_or_path={llama_folder}", f"--output_dir={tmp_path / 'out'}", "--max_steps=3"]
    if command == "train":
        words += [f"--train_file={files['file']}", "--preset=paper"]
        target: tuple[Any, str] = (lorica.update, "load_model")
    else:
        words = [str(Path(write().path("stream.yaml"))), "--methods=seqft", *words]
        target = (lorica.experiments.setup, "read_model")
    monkeypatch.setattr(sys, "argv", ["lorica", command, *words])
    with signalled_in(*target, signum=signum), pytest.raises(SystemExit) as ended:
        lorica.cli.main()
    assert ended.value.code == 128 + signum
    kept = "; what is finished is kept; the same lorica run goes on" if command == "run" else ""
    assert capsys.readouterr().err.splitlines() == [f"lorica: stopped by {signum.name}{kept}"]
    monkeypatch.setattr(sys, "argv", ["lorica", command, *words])
    with stopped_at("on_step_begin", 2, signum), pytest.raises(SystemExit) as ended:
        lorica.cli.main()
    assert ended.value.code == 128 + signum
    assert "goes on" in (told := capsys.readouterr().err) or "go on with" in told


def test_after_a_command_the_handlers_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(sys, "argv", ["lorica", "list"])
    with pytest.raises(SystemExit):
        lorica.cli.main()
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


SECOND: dict[str, Callable[[], Any]] = {
    "in mid-accumulation": lambda: stopped_at("on_substep_end", 3, signal.SIGINT),
    "while saving": lambda: signalled_in(lorica.training.keeper, "write_manifest", signal.SIGINT, call=3),
}


@pytest.mark.reliability("R14")
@pytest.mark.parametrize("moment", SECOND.values(), ids=SECOND)
def test_a_second_signal_ends_the_process_at_once_and_does_no_harm(
    moment: Callable[[], Any], llama_folder: Path, files: dict[str, str], whole: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    settings = TWO | EVAL | {"disable_tqdm": True, "seed": 1, "save_steps": 1, "preset": "paper"}
    settings |= {"model_name_or_path": llama_folder, "train_file": files["file"], "eval_file": files["eval_file"]}
    words = [f"--{name}={value}" for name, value in settings.items()]
    monkeypatch.setattr(sys, "argv", ["lorica", "train", f"--output_dir={out}", *words])

    def twice() -> None:
        with moment(), moment():
            lorica.cli.main()

    assert status_of(begun_in_child(twice)) == -signal.SIGINT
    assert unusable(out / "checkpoint-2") is None
    assert not (out / "model.safetensors").exists()
    go_on(llama_folder, out, files, save_steps=1)
    assert_same(outcome(out), whole)


@pytest.mark.reliability("R14")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_second_signal_within_one_long_call_is_not_waited_for(signum: signal.Signals) -> None:
    """Python itself sees neither of the two before the call's end."""
    ready, begun = os.pipe()

    def work() -> None:
        matrix = torch.rand(3000, 3000, dtype=torch.float64)
        with handled(stop):
            os.write(begun, b"!")
            torch.linalg.eigvalsh(matrix + matrix.T)  # for several seconds

    child = begun_in_child(work)
    os.read(ready, 1)
    for _ in range(2):
        time.sleep(0.3)
        os.kill(child, signum)
    assert status_of(child) == 128 + signum
    os.close(ready)
    os.close(begun)


@pytest.mark.reliability("R14")
def test_signals_of_a_copy_are_its_own() -> None:
    """Workers get Ctrl-C as well, and would write to the pipe of the process that they were made by."""
    with handled(stop):
        for _ in range(2):
            child = begun_in_child(lambda: os.kill(os.getpid(), signal.SIGINT))
            assert status_of(child) == 99, "the handler of the copy raises"
        time.sleep(0.1)


def test_what_is_ignored_stays_ignored(
    llama_folder: Path, files: dict[str, str], whole: dict[str, Any], tmp_path: Path
) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a job that a shell has put in the background
    try:
        with stopped_at("on_step_begin", 2, signal.SIGINT):
            update(llama_folder, tmp_path / "out", **files, **TWO | EVAL)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert_same(outcome(tmp_path / "out"), whole)


@pytest.mark.slow
@pytest.mark.reliability("R12")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_while_modules_are_still_imported(
    signum: signal.Signals, llama_folder: Path, files: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", "import lorica.cli; print(flush=True); lorica.cli.main()", "train"]
    command += [f"--train_file={files['file']}", f"--output_dir={tmp_path / 'out'}"]
    command += [f"--model_name_or_path={llama_folder}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(random.uniform(0.2, 1.5))  # of the seconds that torch and transformers take
    process.send_signal(signum)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, told
    assert told.splitlines()[-1] == f"lorica: stopped by {signum.name}"
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.reliability("R9", "R12")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_workers_that_get_the_signal_too(signum: int, llama_folder: Path, tmp_path: Path) -> None:
    """Ctrl-C comes to every process of a terminal; so may SIGTERM, from a job's scheduler."""
    out, options = tmp_path / "out", TWO | {"dataloader_num_workers": 2, "max_steps": 20}
    file = rows_file(tmp_path, count=80)  # more than the workers have fetched by then
    update(llama_folder, tmp_path / "whole", file, **options)

    def all_of_them() -> None:
        os.setpgrp()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 0)  # to all of this process group
            with stopped_at("on_substep_end", 3, signum), pytest.raises(Interrupted):
                update(llama_folder, out, file, **options)

    assert status_of(begun_in_child(all_of_them)) == 0
    assert [folder.name for folder in checkpoints_in(out)] == ["checkpoint-3"]
    update(llama_folder, out, file, **options, resume_from_checkpoint="true")
    assert_same(outcome(out), outcome(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.reliability("R12")
@pytest.mark.parametrize("place", ["read_model", "set_seed"])
def test_a_stopped_stream_goes_on(place: str, write: Write, llama_folder: Path, tmp_path: Path) -> None:
    options = {"methods": "half", "max_steps": 3, "learning_rates": 1e-2}
    (whole,), _ = run_stream(write(), llama_folder, tmp_path / "whole", **options)
    with signalled_in(lorica.experiments.setup, place), pytest.raises(Interrupted):
        run_stream(write(), llama_folder, tmp_path / "parts", **options)
    (parts,), _ = run_stream(write(), llama_folder, tmp_path / "parts", **options)
    assert parts["scores"] == whole["scores"]


@pytest.mark.reliability("R11")
def test_a_signal_after_the_last_look_at_it_is_not_lost() -> None:
    with handled(stop), pytest.raises(Interrupted) as stopped, SignalCatcher():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.signum == signal.SIGTERM
