"""The Trainer's checkpoints: which one to go on from, how it is read, and when it is not needed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from lorica.constrain.kept import BASES, KeptBases, bases_problem
from lorica.errors import LoricaError
from lorica.files import remove_folder
from lorica.json_file import load_json
from lorica.training.identity import IDENTITY_FILE
from lorica.training.manifest import damage
from lorica.training.model_state import OPTIMIZER
from lorica.training.trust import distrusted, writable_by_others

STATE = "training_state"
"""Folder of everything but the weights: at the top of a checkpoint loaders would take it for weights."""

BASES_NOTE = "bases.json"
"""File of a checkpoint that names the bases that its weights were trained in."""

_FILE_OF_BASES = re.compile(r"bases/[\w-]+\.safetensors")

_WITHOUT_OPTIMIZER = "; --reset_optimizer goes on from its weights with a new optimizer state"


def checkpoint_to_resume(
    asked: str | bool | None,
    output_dir: str,
    say: Callable[[str], None] = print,
    *,
    reset_optimizer: bool = False,
) -> str | None:
    """Return the checkpoint folder that ``resume_from_checkpoint`` means, or None for a fresh start.

    Args:
        asked: "true" or True for the newest complete one in ``output_dir``, "false", False or None for none, else one
            of the checkpoint folders in ``output_dir``.
        say: is told of each checkpoint that was passed over, and why.
        reset_optimizer: take one whose optimizer state is damaged or missing as well.

    Raises:
        LoricaError: there is no such checkpoint, it lies elsewhere, or it is damaged.
    """
    text = str(asked).lower()
    if asked is None or text == "false":
        return None
    folder = Path(output_dir)
    if text == "true":
        return str(_newest_complete(folder, say, reset_optimizer))
    named = Path(str(asked))
    if not (named / "trainer_state.json").is_file():
        raise LoricaError(f"--resume_from_checkpoint {asked}: no checkpoint there (no trainer_state.json)")
    if named.resolve().parent != folder.resolve():
        raise LoricaError(
            f"--resume_from_checkpoint {asked} lies outside --output_dir {output_dir}; a run goes on where it began"
        )
    if wrong := unusable(named, reset_optimizer=reset_optimizer):
        raise LoricaError(f"--resume_from_checkpoint {asked}: {wrong}; 'true' takes the newest that is complete")
    _tell_who_may_write(named, say)
    return str(named)


def _tell_who_may_write(folder: Path, say: Callable[[str], None]) -> None:
    if told := writable_by_others(folder):
        say(f"notice: {told}")


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    named = (folder for folder in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name))
    return sorted((folder for folder in named if folder.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def unusable(folder: Path, *, reset_optimizer: bool = False) -> str | None:
    """Return why a checkpoint cannot be resumed from, None where it can.

    Args:
        reset_optimizer: whether the optimizer's state does not matter.
    """
    optimizer = f"{STATE}/{OPTIMIZER}."
    try:
        distrust = distrusted(folder)
    except FileNotFoundError:
        return "another process is removing it"
    if wrong := distrust or damage(folder, optimizer if reset_optimizer else None):
        way = "" if reset_optimizer or distrust or damage(folder, optimizer) else _WITHOUT_OPTIMIZER
        return wrong + way
    if not (folder / STATE).is_dir():
        return "it holds no optimizer state (--save_only_model): going on without would be another run"
    return bases_lost(folder)


def bases_lost(folder: Path) -> str | None:
    """Return what is wrong with the bases that a checkpoint was trained in; None: nothing, or it needs none."""
    try:
        noted = bases_of(folder)
    except LoricaError as error:
        return str(error)
    problems = (bases_problem(folder.parent / file, digest) for file, digest in (noted or {}).items())
    return next(filter(None, problems), None)


def note_bases(folder: Path, digests: Mapping[str, str]) -> None:
    """Write down the SHA-256 of the files of the bases that a checkpoint's weights are trained in."""
    (folder / BASES_NOTE).write_text(json.dumps({"sha256": dict(digests)}) + "\n", encoding="utf-8")


def bases_of(folder: Path) -> dict[str, str] | None:
    """Return the SHA-256 of each file of the bases that a complete checkpoint names; None where it needs none.

    Raises:
        LoricaError: the note cannot be read.
    """
    file = folder / BASES_NOTE
    try:
        noted = dict(load_json(file, constants=True)["sha256"]) if file.exists() else None
        if noted is not None and not (noted and all(_FILE_OF_BASES.fullmatch(name) for name in noted)):
            raise ValueError("it names what are no files of bases")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoricaError(f"{file}: cannot tell which bases the checkpoint belongs to: {error}") from error
    return noted


def kept_bases(checkpoint: str | Path | None) -> KeptBases | None:
    """Return the bases to go on with from a checkpoint that is usable; None where it needs none."""
    if checkpoint is None or (noted := bases_of(Path(checkpoint))) is None:
        return None
    return KeptBases(*(Path(checkpoint).parent / file for file in noted))


def newest_complete(output_dir: Path, say: Callable[[str], None], *, reset_optimizer: bool = False) -> Path | None:
    """Return the newest checkpoint to resume from, or None; ``say`` is told of those passed over."""
    for folder in reversed(checkpoints_in(output_dir)):
        wrong = unusable(folder, reset_optimizer=reset_optimizer)
        if wrong is None:
            _tell_who_may_write(folder, say)
            return folder
        say(f"notice: {folder} is passed over: {wrong}")
    return None


def _newest_complete(output_dir: Path, say: Callable[[str], None], reset_optimizer: bool) -> Path:
    found = checkpoints_in(output_dir)
    if not found:
        raise LoricaError(f"--resume_from_checkpoint true: --output_dir {output_dir} holds no checkpoint")
    if newest := newest_complete(output_dir, say, reset_optimizer=reset_optimizer):
        return newest
    ended = (output_dir / "lorica.json").exists()
    way = "; the update there has ended" if ended else "; to begin anew remove the folder, or name another --output_dir"
    raise LoricaError(
        f"--resume_from_checkpoint true: none of the {len(found)} checkpoints in {output_dir} is complete; the newest, "
        f"{found[-1].name}: {unusable(found[-1], reset_optimizer=reset_optimizer)}{way}"
    )


def remove_checkpoints(output_dir: Path) -> None:
    """Remove the checkpoints of an update that has ended; they served to resume it."""
    for folder in checkpoints_in(output_dir):
        remove_folder(folder)
    if (bases := (output_dir / BASES).parent).is_dir():
        remove_folder(bases)
    (output_dir / IDENTITY_FILE).unlink(missing_ok=True)
