"""Several processes are refused by name, by each of them, before any waits for the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorica.errors import LoricaError
from lorica.training.arguments import training_arguments

LAUNCHER = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.mark.reliability("R13", "R30")
def test_one_of_two_processes_refuses_without_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (LAUNCHER | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LoricaError, match="2 processes or GPUs: Lorica runs on one device for now"):
        training_arguments({}, str(tmp_path), hidden_size=64, seq2seq=False)
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_with_one_process_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert training_arguments({}, str(tmp_path), hidden_size=64, seq2seq=False).world_size == 1


@pytest.mark.slow
@pytest.mark.reliability("R13", "R30")
def test_torchrun_with_two_processes_ends(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": " b"}\n')
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--no-python", sys.executable,
             "-m", "lorica.cli", "train", "--model_name_or_path", str(tmp_path), "--train_file", str(rows),
             "--output_dir", str(tmp_path / "out")]  # fmt: skip
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer.json").write_text(
        '{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, '
        '"pre_tokenizer": null, "post_processor": null, "decoder": null, '
        '"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "e": 2}, "unk_token": "e"}}'
    )
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    assert done.stderr.count("2 processes or GPUs: Lorica runs on one device for now") == 2
    assert not (tmp_path / "out").exists()
