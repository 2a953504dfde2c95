"""When the disk is full, or a signal came: what is whole, and how to go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorica.errors import Interrupted
from lorica.files import CannotWrite, writing
from lorica.training.checkpoints import checkpoints_in, unusable
from lorica.training.manifest import MANIFEST


@contextmanager
def telling_the_way_on(output_dir: Path, command: str = "") -> Iterator[None]:
    """Where the system takes no more in here, or a signal ends it, also say what is whole and how to go on.

    Args:
        command: what goes on where it is when it is given again; by default an update, which is told where to go on.
    """
    try:
        with writing(output_dir):
            yield
    except CannotWrite as error:
        mended = "make room" if error.room else "put that right"
        again = f"what is finished is kept: {mended}, and the same {command} goes on" if command else ""
        raise error.hinting(again or way_on(output_dir, mended)) from error.__cause__
    except Interrupted as stopped:
        if stopped.checkpoint is not None:  # which was told
            raise
        resumable = any((folder / MANIFEST).exists() for folder in checkpoints_in(output_dir))  # hashing takes long
        again = "go on with --resume_from_checkpoint true" if resumable else ""
        hint = f"what is finished is kept; the same {command} goes on" if command else again
        raise Interrupted(stopped.signum, hint=hint) from None


def way_on(output_dir: Path, mended: str) -> str:
    """Return what of an update is whole, and how to go on once something is mended."""
    if (output_dir / "lorica.json").exists():
        return f"the model and its record are whole; lorica report {output_dir} writes the report anew"
    whole = next((folder for folder in reversed(checkpoints_in(output_dir)) if unusable(folder) is None), None)
    if whole is None:
        return f"no checkpoint was complete before; {mended} and begin anew"
    return f"the last complete checkpoint, {whole}, is whole: {mended} and go on with --resume_from_checkpoint true"
