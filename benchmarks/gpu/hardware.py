"""What differs between a GPU and a CPU: clocks, memory, kernels that only one of them has.

Everything else in this folder is written once for both, so that a run on the CPU exercises what will run on the GPU.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

Stamp = Any
"""A point in the device's time: an event on a GPU, seconds on a CPU."""


class Cpu:
    """The CPU, as if it were the device of the benchmark."""

    name: ClassVar[str] = "cpu"
    compiler: ClassVar[str] = "eager"
    drivers: ClassVar[tuple[str | None, ...]] = (None,)
    """LAPACK has one SVD here."""

    def synchronize(self) -> None:
        """Wait until all that was started is done."""

    def stamp(self) -> Stamp:
        """Mark this point in the stream of work."""
        return time.perf_counter()

    def seconds(self, start: Stamp, end: Stamp) -> float:
        """Return the seconds between two stamps, after ``synchronize``."""
        return float(end - start)

    def reset_peak(self) -> None:
        """Forget the largest memory use so far."""

    def peak(self) -> dict[str, int | None]:
        """Return the largest memory use since ``reset_peak``, bytes."""
        return {"peak_allocated": None, "peak_reserved": None}

    def free(self) -> None:
        """Give back what nothing holds any more; here memory is not measured."""

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a b`` of bfloat16 matrices, summed and returned in float32."""
        return a.float() @ b.float()

    def svd(self, matrix: Tensor, driver: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the thin SVD by one driver of ``drivers``."""
        return torch.linalg.svd(matrix, full_matrices=False)

    def describe(self) -> dict[str, Any]:
        """Return what the machine is."""
        return {"device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__}

    def median(self, work: Callable[[], Any], repeats: int = 7, warm_up: int = 2) -> float:
        """Return the median seconds of ``work``, each repeat between two stamps, after the warm-up."""
        for _ in range(warm_up):
            work()
        pairs = []
        for _ in range(repeats):
            start = self.stamp()
            work()
            pairs.append((start, self.stamp()))
        self.synchronize()
        return statistics.median(self.seconds(*pair) for pair in pairs)


class Cuda(Cpu):
    """One NVIDIA GPU."""

    name = "cuda"
    compiler = "inductor"
    drivers = ("gesvd", "gesvdj")

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def stamp(self) -> Stamp:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Stamp, end: Stamp) -> float:
        return float(start.elapsed_time(end)) / 1000

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, int | None]:
        return {
            "peak_allocated": torch.cuda.max_memory_allocated(),
            "peak_reserved": torch.cuda.max_memory_reserved(),
        }

    def free(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b, out_dtype=torch.float32)  # torch 2.8 and later

    def svd(self, matrix: Tensor, driver: str | None) -> tuple[Tensor, Tensor, Tensor]:
        return torch.linalg.svd(matrix, full_matrices=False, driver=driver)

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": properties.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver_version(),
        }


def hardware(name: str) -> Cpu:
    """Return the device of this run.

    Raises:
        RuntimeError: there is no such device here.
    """
    if name == "cpu":
        return Cpu()
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device; check nvidia-smi, or try --device cpu --tiny")
    return Cuda()


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Compute float32 matrix products as ``highest`` (float32) or ``high`` (TF32 on a GPU) inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _driver_version() -> str | None:
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
