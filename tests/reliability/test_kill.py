"""``kill -9`` at random moments of an update that is resumed each time: the end is the undisturbed one's, bit for bit.

``LORICA_KILLS`` says how many.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorica.training.checkpoints import checkpoints_in, unusable
from tests.reliability.interruptions import outcome, quick_updates
from tests.reliability.kills import KILLS, Command, check_kills
from tests.reliability.small_runs import rows_file
from tests.training.conftest import llama_folder  # noqa: F401

SETTINGS: dict[str, Any] = {
    "max_steps": 24, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 5e-3,
    "logging_steps": 5, "save_steps": 3, "save_total_limit": 2, "disable_tqdm": True, "seed": 1,
    "unfreeze_rank_ratio": 0.5, "preset": "paper",
}  # fmt: skip


class Update(Command):
    """``lorica train``, which goes on from the newest complete checkpoint, or begins anew where there is none."""

    def next_words(self) -> list[str]:
        if any(unusable(folder) is None for folder in checkpoints_in(self.out)):
            return [*self.words, "--resume_from_checkpoint=true"]
        shutil.rmtree(self.out, ignore_errors=True)
        return self.words


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_updates():
        yield


@pytest.mark.reliability("R1", "R8")
@pytest.mark.parametrize("wanted", [2, pytest.param(KILLS or 8, marks=pytest.mark.slow)], ids=["short", "slow"])
def test_killed_at_any_moment_it_comes_to_the_same_end(wanted: int, llama_folder: Path, tmp_path: Path) -> None:
    given = SETTINGS | {"model_name_or_path": llama_folder, "train_file": rows_file(tmp_path, count=20)}
    check_kills(lambda out: Update(out, "train", **given), outcome, tmp_path, wanted, spell=1.0)
