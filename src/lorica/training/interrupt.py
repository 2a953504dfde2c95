"""Ctrl-C and SIGTERM: finish the step, write a checkpoint, leave."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class SignalCatcher(TrainerCallback):
    """As a context: catch SIGINT and SIGTERM. As a callback: at the next step's end, save and stop.

    A second signal is not waited for: the handlers from before are back in place by then.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._catch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    def _catch(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()
        print(f"\n{signal.Signals(signum).name}: finishing this step, then a checkpoint; once more stops at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.signum is not None:
            control.should_save = control.should_training_stop = True
        return control
