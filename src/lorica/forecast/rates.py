"""What a machine can do: measured here in a second or two, or given by numbers for another."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorica.errors import LoricaError
from lorica.forecast.ledger import Operation
from lorica.record import peak_memory

CONTEXT = {"cpu": 0, "cuda": 600_000_000}
"""Bytes that a driver and its libraries take of a device before the first tensor; on CUDA 0.5 to 0.7 GB."""

_EIGH_SIZE = 512


@dataclass(frozen=True)
class Machine:
    """One device and its host.

    Attributes:
        device: "cpu" or "cuda". Of a CPU the device's memory is the host's.
        name: for the reader.
        memory: bytes of the device.
        process: bytes that the process takes on the host without any model.
        flops: floating point operations per second of matrix products in float32; None: not known.
        narrow_flops: the same in bfloat16.
        bandwidth: bytes per second read and written together; None: not known.
        launch: seconds that an operation takes at least.
        eigh: seconds of an eigenvalue decomposition in float64, over n^3.
    """

    device: str
    name: str
    memory: int
    process: int
    flops: float | None = None
    narrow_flops: float | None = None
    bandwidth: float | None = None
    launch: float = 5e-6
    eigh: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def seconds(self, work: Mapping[Operation, int]) -> float | None:
        """Return how long operations take: each as long as its arithmetic or its memory traffic, whichever is more."""
        if self.flops is None or self.bandwidth is None:
            return None
        narrow = self.narrow_flops or self.flops
        return sum(
            count * max(op.flops / (narrow if op.narrow else self.flops), op.nbytes / self.bandwidth, self.launch)
            for op, count in work.items()
        )


def this_machine(device: str | None = None) -> Machine:
    """Measure this machine: a matrix product in each dtype, a copy, an eigenvalue decomposition, the process.

    Args:
        device: "cpu" or "cuda"; by default the GPU if there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return replace(
        unmeasured_machine(device),
        flops=_matmul_rate(device, torch.float32),
        narrow_flops=_matmul_rate(device, torch.bfloat16),
        bandwidth=_copy_rate(device),
        eigh=_eigh_time(device),
    )


def unmeasured_machine(device: str) -> Machine:
    """Return what this machine has, without what it can do: enough to forecast memory."""
    cuda = device == "cuda"
    _toy_step()
    return Machine(
        device=device,
        name=torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads",
        memory=memory_of(device),
        process=resident(),
    )


def machine_for(
    device: str | None = None, memory: int | None = None, flops: float | None = None, bandwidth: float | None = None
) -> Machine:
    """Return this machine, or another: what is given by number replaces what would be measured.

    Args:
        device: "cpu" or "cuda"; by default the GPU if there is one.
        memory: bytes of the device.
        flops: per second, of matrix products in the dtype of the weights.
        bandwidth: bytes per second, read and written.

    Raises:
        LoricaError: a GPU is meant, none is here, and its memory is not given.
    """
    if device == "cuda" and not torch.cuda.is_available():
        if memory is None:
            raise LoricaError("--device cuda: there is no GPU here to ask; give --device_memory, such as 24GB")
        _toy_step()
        return Machine("cuda", "a GPU", memory, resident(), flops, flops, bandwidth)
    here = this_machine(device)
    given = {"memory": memory, "flops": flops, "narrow_flops": flops, "bandwidth": bandwidth}
    return replace(here, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def memory_of(device: str) -> int:
    """Return the bytes of memory of this machine's device: "cpu" or "cuda"."""
    return torch.cuda.get_device_properties(0).total_memory if device == "cuda" else host_memory()


def host_memory() -> int:
    """Return the bytes of memory that this process may have: the machine's, or its control group's if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize
    limit = Path("/sys/fs/cgroup/memory.max")
    words = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(words)) if words.isdigit() else total


def resident() -> int:
    """Return the bytes of this process that are in memory now."""
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory() or 0


def _toy_step() -> None:
    """Train a model of a few numbers, so that the libraries and threads that training brings are in memory."""
    config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.zeros(1, 4, dtype=torch.int64)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def _best(work: Callable[[], Any], device: str, repeats: int = 4) -> float:
    """Return the seconds of the fastest of some repeats, after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _matmul_rate(device: str, dtype: torch.dtype) -> float:
    n = 8192 if device == "cuda" else 1024
    a, b = torch.ones(2, n, n, dtype=dtype, device=device)
    return 2 * n**3 / _best(lambda: a @ b, device)


def _copy_rate(device: str) -> float:
    """Bytes read and written per second where the pieces are fresh, as a step's are."""
    source = torch.ones(2**28 if device == "cuda" else 2**24, device=device)
    return 2 * source.nbytes / _best(source.clone, device)


def _eigh_time(device: str) -> float:
    n = _EIGH_SIZE if device == "cpu" else 4 * _EIGH_SIZE
    matrix = torch.diag(torch.arange(n, dtype=torch.float64, device=device)) + 1.0
    return _best(lambda: torch.linalg.eigh(matrix), device, repeats=2) / n**3


def split_seconds(shapes: Mapping[tuple[int, int], int], machine: Machine, *, spectra: bool = True) -> float | None:
    """Return how long the split of weights takes, an estimate.

    Per weight, with s the short and l the long side: the Gram matrix (2 l s^2 operations), its eigenvectors (measured,
    scaled by s^3), the long side (2 l s^2), and the bases of the free directions (about 4 l s^2 more); float64, at half
    the rate of float32.

    Args:
        shapes: how many weights of each shape are split.
        spectra: whether their own spectra are looked at; where directions were measured only bases are made.
    """
    if machine.eigh is None or machine.flops is None:
        return None
    sides: Counter[tuple[int, int]] = Counter()
    for shape, count in shapes.items():
        sides[min(shape), max(shape)] += count
    return sum(
        count * (spectra * machine.eigh * short**3 + 16 * long * short**2 / machine.flops)
        for (short, long), count in sides.items()
    )
