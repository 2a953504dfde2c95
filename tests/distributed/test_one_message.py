"""What goes wrong in one process while the others need it ends all, and is told once; so is what all get wrong."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import lorica.cli
from lorica.data.collate import Collator
from lorica.errors import LoricaError
from lorica.subspace import measure
from tests.distributed.ranks import on_ranks
from tests.distributed.test_sharded_train import quick, rows_in  # noqa: F401
from tests.training.conftest import llama_folder  # noqa: F401

LEFT_ALONE = "lorica: another process has ended"
"""What the others say where no launcher ends them."""

MEASURED = ["--source", "activation", "--constraint", "input", "--calibration", "random"]


def command(words: list[str]) -> tuple[Any, list[str]]:
    """Run ``lorica`` in this process, and return its exit status and what it told of mistakes."""
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as told, redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", ["lorica", *words])
        try:
            lorica.cli.main()
            status: Any = 0
        except SystemExit as left:
            status = left.code
    lines = [line for line in told.getvalue().splitlines() if line.startswith("lorica: ")]
    return status, [line for line in lines if line != LEFT_ALONE]


def trained(model: Path, folder: Path, *words: str) -> list[str]:
    given = {"model_name_or_path": model, "train_file": rows_in(folder), "output_dir": folder / "out", "max_steps": 4}
    given |= {"preset": "paper", "fsdp": "full_shard", "per_device_train_batch_size": 4, "disable_tqdm": True}
    return ["train", *(word for name, value in given.items() for word in (f"--{name}", str(value))), *words]


def failing(call: int) -> Callable[..., Any]:
    """Return a function that raises when it is called for the n-th time."""
    calls = iter(range(1, 10**6))

    def fail(*_: Any, **__: Any) -> None:
        if next(calls) == call:
            raise LoricaError("this process alone fails")

    return fail


def damaged(folder: Path, copy: Path) -> Path:
    """Copy a model, of which the weights cannot be read."""
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    return copy


def of_two(work: Callable[[int], tuple[Any, list[str]]]) -> list[str]:
    """Return what two processes tell that both fail."""
    ends = on_ranks(2, work)  # which gives up on one that waits
    assert [status for status, _ in ends] == [lorica.cli.BAD_INPUT] * 2
    return [line for _, lines in ends for line in lines]


def test_weights_that_one_process_cannot_read(llama_folder: Path, tmp_path: Path) -> None:
    folders = [llama_folder, damaged(llama_folder, tmp_path / "damaged")]
    (told,) = of_two(lambda rank: command(trained(folders[rank], tmp_path)))
    assert told.startswith(f"lorica: model {folders[1]}: cannot load the weights: ")


def test_a_measurement_that_fails_in_one_process(llama_folder: Path, tmp_path: Path) -> None:
    def work(rank: int) -> tuple[Any, list[str]]:
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(measure, "_check_finite", failing(2))
            return command(trained(llama_folder, tmp_path, *MEASURED))

    assert of_two(work) == ["lorica: this process alone fails"]


def test_rows_that_one_process_cannot_read(llama_folder: Path, tmp_path: Path) -> None:
    def work(rank: int) -> tuple[Any, list[str]]:
        fail, collate = failing(3), Collator.__call__

        def read(self: Collator, *args: Any) -> Any:
            fail()
            return collate(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr(Collator, "__call__", read)
            return command(trained(llama_folder, tmp_path))

    assert of_two(work) == ["lorica: this process alone fails"]


def test_a_mistake_of_all_in_the_middle_of_the_training(llama_folder: Path, tmp_path: Path) -> None:
    def work(rank: int) -> tuple[Any, list[str]]:
        ended = command(trained(llama_folder, tmp_path, "--learning_rate", "1e30"))
        dist.barrier()  # where they met is at the first one here, and with a launcher until all have ended
        return ended

    (told,) = of_two(work)
    assert told.startswith("lorica: the loss is nan at step ")
