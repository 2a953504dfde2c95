"""Several processes on this machine that talk through gloo."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

SECONDS = 120
"""After which a process that hangs ends."""


def torchrun(size: int, *words: str) -> list[str]:
    """Return the command that starts so many processes of a script, or of ``-m`` and a module."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size), *words,
    ]  # fmt: skip


def on_ranks(size: int, work: Callable[[int], Any]) -> list[Any]:
    """Run something in several copies of this process, which form a group, and return what each returned.

    Args:
        size: how many processes.
        work: gets its rank and returns what JSON can hold.

    Raises:
        AssertionError: with the traceback of each process that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        children = [_begun(rank, size, work, Path(folder), port) for rank in range(size)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        told = [Path(folder, str(rank)) for rank in range(size)]
        words = [file.read_text() if file.exists() else "no result" for file in told]
    wrong = [
        f"process {rank}: {text}" for rank, (status, text) in enumerate(zip(statuses, words, strict=True)) if status
    ]
    assert not wrong, "\n".join(wrong)
    return [json.loads(text) for text in words]


def _begun(rank: int, size: int, work: Callable[[int], Any], folder: Path, port: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.alarm(SECONDS)
        torch.set_num_threads(1)  # a copy of this process has none of its threads
        with _group(rank, size, port):
            text = json.dumps(work(rank))
        status = 0
    except BaseException:
        text = traceback.format_exc()
    Path(folder, str(rank)).write_text(text)
    os._exit(status)


@contextmanager
def _group(rank: int, size: int, port: int) -> Iterator[None]:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"})
    AcceleratorState._reset_state(reset_partial_state=True)  # a copy of this process knows one process alone
    dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
