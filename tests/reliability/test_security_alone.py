"""A run speaks to nobody, and a signal to one run does not reach another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.errors import Interrupted
from lorica.report import write_report
from tests.reliability.small_runs import rows_file, run, stream_of, update
from tests.training.conftest import llama_folder  # noqa: F401

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg")
_calls: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _calls is not None and event in NETWORK and "AF_UNIX" not in str(arguments):
        _calls.append(f"{event} {arguments!r}")
        raise OSError(f"{event}: the network is blocked")


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Refuse every connection and note it; the hub counts as reachable, so that whoever would ask it does."""
    global _calls
    if not getattr(sys, "lorica_hook", False):
        sys.addaudithook(_note)  # which stays until the process ends
        sys.lorica_hook = True  # type: ignore[attr-defined]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    _calls = []
    yield _calls
    _calls = None


@pytest.mark.reliability("S16")
def test_the_block_blocks(blocked: list[str]) -> None:
    import socket
    import urllib.request

    with pytest.raises(OSError, match="blocked"):
        socket.create_connection(("127.0.0.1", 9), timeout=1)
    with pytest.raises(OSError, match="blocked"):
        urllib.request.urlopen("http://localhost:9", timeout=1)
    assert len(blocked) >= 2


@pytest.mark.reliability("S16")
def test_train_run_and_report_on_local_files_speak_to_nobody(
    blocked: list[str], llama_folder: Path, tmp_path: Path
) -> None:
    rows = rows_file(tmp_path)
    record, _ = update(llama_folder, tmp_path / "out", rows, eval_file=rows, save_steps=2, max_steps=2)
    run(stream_of(tmp_path / "data", ("one",)), llama_folder, tmp_path / "runs")
    write_report([tmp_path / "out", tmp_path / "runs"], tmp_path / "report")
    assert blocked == []
    assert record["training_arguments"]["report_to"] == "[]"


ALONE = """
import socket, sys
tried = []
def note(event, arguments):
    if event in {events!r} and "AF_UNIX" not in str(arguments):
        tried.append(event)
        raise OSError("the network is blocked")
sys.addaudithook(note)
import lorica.cli
for words in {commands!r}:
    sys.argv = ["lorica", *words]
    try:
        lorica.cli.main()
    except SystemExit as end:
        assert not end.code, end.code
assert tried == [], tried
"""


@pytest.mark.slow
@pytest.mark.reliability("S16")
def test_a_new_process_speaks_to_nobody_either(llama_folder: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path)
    stream_of(tmp_path / "data", ("one",))
    model, quick = ["--model_name_or_path", str(llama_folder)], ["--max_steps", "2", "--preset", "paper"]
    commands = [
        ["train", *model, "--train_file", rows, "--output_dir", str(tmp_path / "out"), *quick],
        ["run", str(tmp_path / "data" / "stream.yaml"), *model, "--output_dir", str(tmp_path / "runs")],
        ["report", str(tmp_path / "out"), str(tmp_path / "runs"), "--output_dir", str(tmp_path / "report")],
        ["audit", str(llama_folder), str(tmp_path / "out")],
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(events=set(NETWORK), commands=commands)], capture_output=True, text=True,
        check=False, timeout=300, env=environment | {"HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "report" / "report.html").exists()


# --- two runs at once -------------------------------------------------------------------------------------------------


def started(work: Callable[[], Any]) -> int:
    """Start a process that does some work and return its id; it ends with 0, or 128 and the signal that stopped it."""
    child = os.fork()
    if child:
        return child
    status = 1
    torch.set_num_threads(1)  # a copy of this process has none of its threads, and would wait for them
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
    try:
        work()
        status = 0
    except Interrupted as stop:
        status = 128 + stop.signum
    finally:
        os._exit(status)


def ended(child: int, seconds: float = 60) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the run did not end")


def appears(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.reliability("S20")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_one_of_two_runs_leaves_the_other_alone(
    signum: signal.Signals, llama_folder: Path, tmp_path: Path
) -> None:
    rows = rows_file(tmp_path)

    def work(name: str, steps: int) -> Callable[[], Any]:
        options = {"max_steps": steps, "save_steps": 2, "save_total_limit": 10}
        return lambda: update(llama_folder, tmp_path / name, rows, **options)

    stopped, other = started(work("stopped", 2000)), started(work("other", 12))
    try:
        for name in ("stopped", "other"):
            appears(tmp_path / name / "checkpoint-2" / "manifest.json")
        os.kill(stopped, signum)
        assert ended(stopped) == 128 + signum
        assert ended(other) == 0
    finally:
        for child in (stopped, other):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    assert json.loads((tmp_path / "other" / "lorica.json").read_text())["weights_sha256"] is not None
    assert not (tmp_path / "stopped" / "lorica.json").exists()
