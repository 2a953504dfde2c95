"""``kill -9`` at random moments of an update that is resumed each time: the end is the undisturbed one's, bit for bit.

``LORICA_KILLS`` says how many; the children are copies of this process, so that a kill costs no imports.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lorica.cli
import lorica.update  # so that no child imports it
from lorica.training.checkpoints import checkpoints_in, unusable
from tests.reliability.interruptions import assert_same, begun_in_child, outcome, quick_updates, status_of
from tests.reliability.small_runs import rows_file
from tests.training.conftest import llama_folder  # noqa: F401

KILLS = int(os.environ.get("LORICA_KILLS", "8"))
SETTINGS: dict[str, Any] = {
    "max_steps": 24, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 5e-3,
    "logging_steps": 5, "save_steps": 3, "save_total_limit": 2, "disable_tqdm": True, "seed": 1,
    "unfreeze_rank_ratio": 0.5,
}  # fmt: skip


class Command:
    """``lorica train`` with what is needed to begin or to go on."""

    def __init__(self, model: Path, file: str, out: Path) -> None:
        self.out, self.log = out, out.with_suffix(".log")
        given = SETTINGS | {"model_name_or_path": model, "train_file": file, "output_dir": out}
        self.words = ["lorica", "train", *(f"--{name}={value}" for name, value in given.items())]

    def begin(self) -> int:
        """Start it in a child: from the newest complete checkpoint, or anew where there is none."""
        resumes = any(unusable(folder) is None for folder in checkpoints_in(self.out))
        if self.out.exists() and not resumes:
            shutil.rmtree(self.out)
        return begun_in_child(lambda: self._run(["--resume_from_checkpoint=true"] if resumes else []), self.log)

    def _run(self, more: list[str]) -> None:
        sys.argv = [*self.words, *more]
        with contextlib.suppress(SystemExit):
            lorica.cli.main()

    @property
    def ended(self) -> bool:
        return (self.out / "lorica.json").exists()


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_updates():
        yield


@pytest.mark.reliability("R1", "R8")
@pytest.mark.parametrize("wanted", [2, pytest.param(KILLS, marks=pytest.mark.slow)], ids=["short", "slow"])
def test_killed_at_any_moment_it_comes_to_the_same_end(wanted: int, llama_folder: Path, tmp_path: Path) -> None:
    file, draws = rows_file(tmp_path, count=20), random.Random(0)
    began = time.perf_counter()
    undisturbed = Command(llama_folder, file, tmp_path / "whole")
    assert status_of(undisturbed.begin()) == 0
    takes = time.perf_counter() - began
    whole = outcome(undisturbed.out)
    kills, runs = 0, 0
    while kills < wanted or runs == 0:
        runs += 1
        command = Command(llama_folder, file, tmp_path / f"run-{runs}")
        while not command.ended:
            child = command.begin()
            if kills < wanted:
                time.sleep(draws.uniform(0.05, 1.0) * takes)
                os.kill(child, signal.SIGKILL)  # one that has ended is there until it is waited for
            killed = status_of(child) == -signal.SIGKILL
            kills += killed
            assert killed or command.ended, command.log.read_text()
        assert_same(outcome(command.out), whole)
        shutil.rmtree(command.out)
    print(f"{kills} kills, {runs} runs to their end")
