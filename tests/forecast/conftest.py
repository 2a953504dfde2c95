"""Folders that hold a config.json and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import transformers
from torch.profiler import profile

from tests.builders import ARCHITECTURES

Folder = Callable[..., str]


def profiled(profiler: profile) -> int:
    """Return the most bytes that torch's profiler saw allocated at once."""
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(nbytes for _, nbytes in changes))


@pytest.fixture
def config_folder(tmp_path: Path) -> Folder:
    """Write the configuration of a small architecture, some of its sizes changed, and return the folder."""

    def write(name: str = "llama", **changes: object) -> str:
        kind, model, sizes = ARCHITECTURES[name]
        config = getattr(transformers, kind)(**(sizes | changes))
        config.architectures = [model]
        folder = tmp_path / "-".join(["model", name, *map(str, changes.values())])
        config.save_pretrained(folder)
        return str(folder)

    return write
