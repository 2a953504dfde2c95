"""The one exception that is the user's to read."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class LoricaError(Exception):
    """A mistake in what the user gave: a path, a row, an option, a weight.

    The message names the file, line, field or option and says what to do. The command line prints it
    without a traceback and exits with status 2; anything else that is raised is a defect of Lorica.
    """


class Interrupted(Exception):
    """Training was stopped by a signal.

    Attributes:
        signum: the signal. By convention the process exits with 128 + signum.
        checkpoint: the folder to resume from, of the last finished step; None where there is none.
        hint: how to go on; by default from the checkpoint.
    """

    def __init__(self, signum: int, checkpoint: str | None = None, *, hint: str = "") -> None:
        if checkpoint and not hint:
            hint = f"checkpoint: {checkpoint}; go on with --resume_from_checkpoint true"
        super().__init__(f"stopped by {signal.Signals(signum).name}" + (f"; {hint}" if hint else ""))
        self.signum = signum
        self.checkpoint = checkpoint


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name nearest to ``name``, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
