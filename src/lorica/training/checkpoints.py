"""The Trainer's checkpoints: which one to go on from, and when they are no longer needed."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from lorica.errors import LoricaError


def checkpoint_to_resume(asked: str | bool | None, output_dir: str) -> str | None:
    """Return the checkpoint folder that ``resume_from_checkpoint`` means, or None for a fresh start.

    Args:
        asked: "true" or True for the newest in ``output_dir``, "false", False or None for none, else a folder.

    Raises:
        LoricaError: there is no such checkpoint.
    """
    text = str(asked).lower()
    if asked is None or text == "false":
        return None
    if text != "true":
        if not (Path(str(asked)) / "trainer_state.json").is_file():
            raise LoricaError(f"--resume_from_checkpoint {asked}: no checkpoint there (no trainer_state.json)")
        return str(asked)
    newest = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if newest is None:
        raise LoricaError(f"--resume_from_checkpoint true: --output_dir {output_dir} holds no checkpoint")
    return newest


def remove_checkpoints(output_dir: Path) -> None:
    """Remove the checkpoints of an update that has ended; they served to resume it."""
    for folder in output_dir.glob("checkpoint-*"):
        shutil.rmtree(folder)
