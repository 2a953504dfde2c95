"""What is counted, and how results are written: bytes, machine, quartiles, one JSON file per measurement."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.contestants import PEERS
from lorica.record import environment, write_json
from lorica.subspace.store import FOLDER

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "speed"
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
"""Environment in which glibc gives freed memory back, so that resident memory is memory in use."""


def state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Return the bytes of all that training keeps: weights, bases, cores, gradients that are there, optimizer state.

    Counted are the tensors of the model and of its modules' attributes, whatever they are called, each storage once.

    Returns:
        ``state_bytes`` in the memory that training needs; ``mapped_bytes`` in memory maps of files, whose pages the
        system may drop; ``host_bytes`` on the CPU beside a model that is on an accelerator.
    """
    count = {"state_bytes": 0, "mapped_bytes": 0, "host_bytes": 0}
    accelerator = next(model.parameters()).device.type != "cpu"
    maps = _file_maps()
    for tensor in unique([model, optimizer.state]):
        on_host, pointer = tensor.device.type == "cpu", tensor.untyped_storage().data_ptr()
        mapped = on_host and any(low <= pointer < high for low, high in maps)
        place = "mapped_bytes" if mapped else "host_bytes" if accelerator and on_host else "state_bytes"
        count[place] += storage_bytes(tensor)
    return count


def unique(things: Iterable[Any]) -> list[Tensor]:
    """Return the tensors in modules, mappings and sequences, and their gradients: one tensor of each storage."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    for tensor in _tensors(list(things), seen):
        found.setdefault(tensor.untyped_storage()._cdata, tensor)
    return list(found.values())


def storage_bytes(tensor: Tensor) -> int:
    """Return the bytes of the memory a tensor lies in."""
    return tensor.untyped_storage().nbytes()


def _tensors(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(thing) in seen or not isinstance(thing, Tensor | nn.Module | Mapping | list | tuple):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        inside = [thing.grad] if thing.is_leaf else []
    elif isinstance(thing, nn.Module):
        inside = list(vars(thing).values())
    else:
        inside = list(thing.values()) if isinstance(thing, Mapping) else list(thing)
    for value in inside:
        yield from _tensors(value, seen)


def _file_maps() -> list[tuple[int, int]]:
    """Return the address ranges of this process that are maps of files, as far as the system tells (Linux)."""
    ranges = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            place, _, _, _, inode, *path = line.split(maxsplit=5)
            if inode != "0" and not path[0].startswith(("/dev/", "/memfd:", "/SYSV")):
                low, _, high = place.partition("-")
                ranges.append((int(low, 16), int(high, 16)))
    return ranges


def resident() -> dict[str, int]:
    """Return the resident bytes of this process: ``rss``, its share ``anonymous`` in no file, the ``peak_rss`` so far.

    Linux only.
    """
    names = {"VmRSS": "rss", "RssAnon": "anonymous", "VmHWM": "peak_rss"}
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return {names[line[0][:-1]]: int(line[1]) * 1024 for line in lines if line[0][:-1] in names}


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """Let Lorica keep its splits in an empty folder of this run: nothing is found there that was not made by it."""
    with tempfile.TemporaryDirectory(prefix="lorica-splits-") as folder:
        before = os.environ.get(FOLDER)
        os.environ[FOLDER] = folder
        try:
            yield
        finally:
            os.environ.pop(FOLDER)
            os.environ.update({FOLDER: before} if before is not None else {})


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median and both quartiles of at least one value."""
    if len(values) == 1:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def machine() -> dict[str, Any]:
    """Return versions, hardware and threads, as every result file has them."""
    found = environment()
    found["versions"] |= {name: _version(name) for name in PEERS.values()}
    found["hardware"] |= {"cpu": cpu_model(), "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    return found | {"threads": torch.get_num_threads()}


def cpu_model() -> str | None:
    """Return the name of the CPU, None where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return None


def write_result(file: Path, settings: dict[str, Any], rows: list[dict[str, Any]], missing: Sequence[str]) -> None:
    """Write one measurement, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"settings": settings, "rows": rows, "not_installed": list(missing), **machine()})
    print(f"wrote {file}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
