"""Signals that come at a chosen moment of a run, and what two runs must share to be the same run."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import TrainerCallback

import lorica.update
from lorica.signals import handled, stop
from lorica.training.trainer import MethodMixin


class SignalAt(TrainerCallback):
    """Sends a signal to this process at one event of one step of the Trainer, counted from 1."""

    def __init__(self, event: str, step: int, signum: int = signal.SIGTERM) -> None:
        self.step, self.signum, self.sent = step, signum, False
        setattr(self, event, self._send)

    def _send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 >= self.step and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.signum)


@contextlib.contextmanager
def stopped_at(event: str, step: int, signum: int = signal.SIGTERM) -> Iterator[None]:
    """Let every Trainer that is made in here be stopped at an event such as ``on_substep_end``."""
    with pytest.MonkeyPatch.context() as patch:
        start = MethodMixin.__init__

        def with_signal(self: Any, *args: Any, **given: Any) -> None:
            start(self, *args, **given | {"callbacks": [*given["callbacks"], SignalAt(event, step, signum)]})

        patch.setattr(MethodMixin, "__init__", with_signal)
        yield


@contextlib.contextmanager
def signalled_in(target: Any, name: str, signum: int = signal.SIGTERM, call: int = 1) -> Iterator[None]:
    """Send a signal in here when a function is called for the n-th time, before it does anything.

    The process handles signals as the command line does.
    """
    calls = []
    with pytest.MonkeyPatch.context() as patch, handled(stop):
        real: Callable[..., Any] = getattr(target, name)

        def with_signal(*args: Any, **given: Any) -> Any:
            calls.append(name)
            if len(calls) == call:
                os.kill(os.getpid(), signum)
            return real(*args, **given)

        patch.setattr(target, name, with_signal)
        yield
    assert len(calls) >= call, f"{name} was called {len(calls)} times"


@contextlib.contextmanager
def quick_updates() -> Iterator[None]:
    """Update without the forecast of memory, which takes longer than such small models, in one thread.

    A copy of this process has no other threads. Nor does the collection of garbage after each Trainer look at what was
    there before.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lorica.update, "foreseen", lambda *_: (None, []))
        yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def begun_in_child(work: Callable[[], None], log: Path | str = os.devnull, seconds: int = 120) -> int:
    """Run something in a copy of this process, which has imported everything already, and return its id.

    Args:
        log: where what it prints goes.
        seconds: after which one that hangs ends.
    """
    child = os.fork()
    if child == 0:
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(written, 1)
        os.dup2(written, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)  # not those of pytest; by lines
        signal.alarm(seconds)
        _bars_with_a_lock_of_their_own(tqdm)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    return child


def _bars_with_a_lock_of_their_own(kind: type[tqdm]) -> None:
    """Take from progress bars the lock that all copies of a process share: a killed one can have held it."""
    kind.set_lock(threading.RLock())
    for derived in kind.__subclasses__():
        _bars_with_a_lock_of_their_own(derived)


def status_of(child: int) -> int:
    """Wait for a child and return how it ended; see ``os.waitstatus_to_exitcode``."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def cases(named: dict[str, Any], quick: Sequence[str]) -> list[Any]:
    """Return the parameters of a test by their names; all but the quick ones are slow."""
    return [
        pytest.param(value, id=name, marks=() if name in quick else pytest.mark.slow) for name, value in named.items()
    ]


def outcome(out: Path) -> dict[str, Any]:
    """Return the weights of a finished update and what its record says of its course."""
    record = json.loads((out / "lorica.json").read_text())
    return {"weights": load_file(out / "model.safetensors")} | {
        name: record[name] for name in ("loss_curve", "scores", "plan", "weights_sha256")
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Both runs ended with the same weights, bit for bit, by the same losses."""
    assert one["weights"].keys() == other["weights"].keys()
    for name, tensor in one["weights"].items():
        assert torch.equal(tensor, other["weights"][name]), name
    for name in one.keys() - {"weights"}:
        assert one[name] == other[name], name
