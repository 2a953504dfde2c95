"""The run record: what was done, with what, on what, and what came out. Plain JSON, written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lorica.files import write_text
from lorica.json_file import sealed
from lorica.redaction import redacted as redacted

SCHEMA = 1
PACKAGES = ("lorica", "torch", "transformers", "accelerate", "datasets", "safetensors", "numpy")


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


def environment() -> dict[str, Any]:
    """Return versions, hardware, the revision of Lorica's sources (None outside a checkout) and the command."""
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "cpu_cores": os.cpu_count(),
            "gpu": _gpu(),
        },
        "git_revision": _git_revision(),
        "command": redacted(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def peak_memory() -> int | None:
    """Return the largest resident size of this process so far, bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_cuda_memory() -> int | None:
    """Return the most bytes that tensors have taken of the current CUDA device so far; None where there is none."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record with a hash of itself, for ``load_record`` and ``lorica verify``; see ``write_json``."""
    write_json(path, sealed(_finite(record)))


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON beside the target and rename it into place. NaN and infinity become null."""
    write_text(path, json.dumps(_finite(data), indent=1, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _git_revision() -> str | None:
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None  # installed: an enclosing repository would be somebody else's
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40")


def _git(folder: Path, *words: str) -> str | None:
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
