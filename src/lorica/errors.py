"""The one exception that is the user's to read."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable
from pathlib import Path

from lorica.redaction import redacted

_LONGEST_NAME = 100
"""Names above this are no misspellings, and comparing them would take quadratic time."""


class LoricaError(Exception):
    """A mistake in what the user gave: a path, a row, an option, a weight.

    The message names the file, line, field or option and says what to do. The command line prints it
    without a traceback and exits with status 2; anything else that is raised is a defect of Lorica. Tokens and
    passwords in the message are hidden.
    """

    def __init__(self, *message: object) -> None:
        super().__init__(*map(redacted, message))


class Interrupted(BaseException):
    """A signal stopped the program. As ``KeyboardInterrupt``, it is no mistake that anybody should make up for.

    Attributes:
        signum: the signal. By convention the process exits with 128 + signum.
        checkpoint: the folder to resume from, of the last finished step; None where there is none.
        hint: how to go on; by default from the checkpoint.
    """

    def __init__(self, signum: int, checkpoint: str | None = None, *, hint: str = "") -> None:
        if checkpoint and not hint:
            hint = f"checkpoint: {checkpoint}; go on with --resume_from_checkpoint true"
        super().__init__(redacted(f"stopped by {signal.Signals(signum).name}" + (f"; {hint}" if hint else "")))
        self.signum = signum
        self.checkpoint = checkpoint


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name nearest to ``name``, or an empty string."""
    short = [one for one in known if len(one) <= _LONGEST_NAME] if len(name) <= _LONGEST_NAME else []
    near = difflib.get_close_matches(name, short, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def names_beside(path: str) -> list[str]:
    """Return what lies in the folder of a path where there is nothing, spelled as the path is; for ``did_you_mean``."""
    folder = Path(path).parent
    try:
        return [str(folder / entry.name) for entry in folder.expanduser().iterdir()]
    except OSError:
        return []


def one_line(text: object, limit: int = 300) -> str:
    """Return text of unknown origin as part of a message: on one line, nothing unprintable, at most so long."""
    whole = str(text)
    shown = "".join(map(_printable, whole[:limit]))
    return f"{shown} ..." if len(whole) > limit else shown


def _printable(char: str) -> str:
    if char.isprintable():
        return char
    return " " if char.isspace() else char.encode("unicode_escape").decode("ascii")
