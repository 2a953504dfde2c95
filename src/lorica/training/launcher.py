"""What a launcher has told of its processes: taken as options, or refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lorica import processes
from lorica.errors import LoricaError
from lorica.training import deepspeed, sharding

SHARDED = "lorica train and lorica run shard the model with --fsdp full_shard, see docs/distributed.md"
"""What to do instead of asking a launcher for a sharded model."""


@contextmanager
def launcher_settings() -> Iterator[dict[str, Any]]:
    """Yield as training arguments what Accelerate's launcher was told of FSDP and DeepSpeed, which it does not begin.

    Call it before the processes meet.
    """
    with sharding.launcher_settings() as fsdp, deepspeed.launcher_settings() as zero:
        yield fsdp | zero


def check_launcher() -> None:
    """Refuse processes that nobody waits for, and settings of a launcher that would be ignored."""
    if processes.launched() > processes.size():
        raise LoricaError(processes.alone("this"))
    for engine in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true":
            raise LoricaError(f"accelerate's configuration asks for {engine}, which this does not take; {SHARDED}")
