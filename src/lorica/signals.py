"""SIGINT (Ctrl-C) and SIGTERM: the first ends a command in order, the second at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from lorica.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def stop(signum: int, frame: FrameType | None) -> None:
    """Raise ``Interrupted`` where the process is: what was being written is taken back on the way out.

    A second signal is not waited for, not even by a long product of matrices: it ends the process as it would any, or,
    where Python has not come to see the first one yet, with its status.
    While modules are imported the first one ends it too, with the same line and status: libraries try imports and take
    any exception for a package that is missing, and nothing is being written then.
    """
    for one in SIGNALS:
        signal.signal(one, signal.SIG_DFL)
    if in_worker():
        raise KeyboardInterrupt  # which torch's and datasets' workers know to be the main process's business
    if _importing(frame):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"lorica: {Interrupted(signum)}\n".encode())
        os._exit(128 + signum)
    raise Interrupted(signum)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def in_worker() -> bool:
    """Tell whether this process is a worker of another one, from which it has its handlers."""
    return multiprocessing.parent_process() is not None


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[dict[int, Any]]:
    """Handle the signals in here, and as they were handled before from then on; what is ignored stays ignored.

    Yields:
        The handlers from before, by signal. Empty in a thread: Python allows handlers in the main thread alone.
    """
    before: dict[int, Any] = {}
    try:
        with contextlib.suppress(ValueError):
            for signum in SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    before[signum] = signal.signal(signum, handler)
        with _second_at_once() if handler is stop and before else contextlib.nullcontext():
            yield before
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


_watching: list[int] = []
"""Pipes that signals are written to."""


@contextlib.contextmanager
def _second_at_once() -> Iterator[None]:
    """End the process at a second signal, whatever the main thread is in.

    Python runs a handler between two of its own instructions: two signals in one call of torch's would be one, and wait
    for its end. But their numbers go into a pipe as they come, which a thread reads. After ``stop`` none come any more.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    earlier = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    _watching.append(write)
    watcher = threading.Thread(target=_end_at_second, args=(read,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        _watching.remove(write)
        os.write(write, _NO_MORE)  # closing it would be no end to a pipe that workers hold open, too
        watcher.join()
        os.close(write)
        os.close(read)


_NO_MORE = b"\0"


def _end_at_second(pipe: int) -> None:
    came = 0
    while (number := os.read(pipe, 1)) != _NO_MORE:
        came += number[0] in SIGNALS
        if came == 2:
            os._exit(128 + number[0])


def _watch_no_more() -> None:
    if _watching:  # a worker's signals are not those of the process that it shares the pipe with
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_watch_no_more)
