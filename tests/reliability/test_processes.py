"""Where several processes are not supported they are refused by name, before any waits for the others."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from lorica.errors import LoricaError
from lorica.training.arguments import training_arguments
from tests.distributed.ranks import torchrun

LAUNCHER = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


def test_a_library_call_refuses_without_the_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHER.items():
        monkeypatch.setenv(name, value)
    several = "2 processes: this runs on one device, lorica train and lorica run on several"
    with pytest.raises(LoricaError, match=several):
        training_arguments({}, str(tmp_path), hidden_size=64, seq2seq=False)
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_with_one_process_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert training_arguments({}, str(tmp_path), hidden_size=64, seq2seq=False).world_size == 1


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_settings_of_the_launcher_are_not_ignored(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(
        LoricaError, match=f"accelerate's configuration asks for {engine}, which this does not take; lorica train"
    ):
        training_arguments({}, str(tmp_path), hidden_size=64, seq2seq=False)


@pytest.mark.slow
def test_other_commands_end_at_once_under_torchrun(tmp_path: Path) -> None:
    words = torchrun(2, "-m", "lorica", "demo", "--output_dir", str(tmp_path / "out"))
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=60, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode != 0
    assert done.stderr.count("lorica: 2 processes: lorica demo runs on one device") == 1
    assert not (tmp_path / "out").exists()
