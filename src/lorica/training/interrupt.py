"""Ctrl-C and SIGTERM while training: finish the step, write a checkpoint, leave."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorica import processes
from lorica.signals import handled, in_worker, stop
from lorica.training.exact import at_epoch_end


class SignalCatcher(TrainerCallback):
    """As a context: catch SIGINT and SIGTERM. As a callback: at the next step's end, save and stop.

    Of several processes all stop after the same step, whichever of them the signal came to.

    A second signal is not waited for. In a command it ends the process as if nobody handled it; elsewhere the
    handlers from before get it.

    Attributes:
        signum: the signal that came; None: none did.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}
        self._context = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._before = self._context.enter_context(handled(self._catch))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.close()
        if kind is None and self.signum is not None:  # it came after the last look at it
            handler = signal.getsignal(self.signum)
            if callable(handler):  # raised again it would count as a second one
                handler(self.signum, None)
            else:
                signal.raise_signal(self.signum)

    def _catch(self, signum: int, frame: FrameType | None) -> None:
        if in_worker():
            return  # Ctrl-C comes to all processes of a terminal; this one's rows are needed to finish the step
        self.signum = signum
        for one, earlier in self._before.items():
            signal.signal(one, signal.SIG_DFL if earlier is stop else earlier)
        told = f"\n{signal.Signals(signum).name}: finishing this step, then a checkpoint; once more stops at once\n"
        if not processes.first():
            return  # a launcher sends it to all
        with contextlib.suppress(OSError):  # unlike print, this may be in the middle of a print
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, told.encode())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.agreed() is not None:
            control.should_save = control.should_training_stop = True
        return control

    def agreed(self) -> int | None:
        """Return the signal that came to this process or to another that it works with; it counts for all."""
        self.signum = processes.largest(self.signum or 0) or None
        return self.signum

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.signum is not None and state.global_step < state.max_steps and not at_epoch_end(state):
            # The Trainer ends the epoch too when it stops within one; the resumed run will do so in its place.
            control.should_log = control.should_evaluate = control.should_save = False
        return control
