"""Part 0: what the machine is, and the two ceilings that all other numbers stand under."""

from __future__ import annotations

import torch

from benchmarks.gpu.hardware import float32_products
from benchmarks.gpu.workbench import Row, Workbench
from lorica.record import environment

SIDE, TINY_SIDE = 8192, 128


def run(bench: Workbench) -> None:
    """Describe the machine; measure its matrix products and its memory."""
    bench.measure({"what": "machine"}, _machine, bench)
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
        ("fp64", torch.float64, "highest"),
    ):
        bench.measure({"what": "product", "arithmetic": name}, _product, bench, dtype, precision)
    bench.measure({"what": "copy"}, _copy, bench)
    bench.measure({"what": "host to device"}, _from_host, bench)


def _machine(bench: Workbench) -> Row:
    return bench.device.describe() | {"environment": environment()}


def _product(bench: Workbench, dtype: torch.dtype, precision: str) -> Row:
    side = TINY_SIDE if bench.tiny else SIDE
    a, b = (torch.randn(side, side, device=bench.device.name).to(dtype) for _ in range(2))
    with float32_products(precision):
        seconds = bench.device.median(lambda: a @ b)
    return {"side": side, "ms": 1e3 * seconds, "tflops": 2 * side**3 / seconds / 1e12}


def _copy(bench: Workbench) -> Row:
    count = 2**16 if bench.tiny else 2**30
    a = torch.randn(count, device=bench.device.name)
    b = torch.empty_like(a)
    seconds = bench.device.median(lambda: b.copy_(a))
    return {"gigabytes_per_second": 8 * count / seconds / 1e9}


def _from_host(bench: Workbench) -> Row:
    count = 2**16 if bench.tiny else 2**28
    a = torch.randn(count, pin_memory=bench.device.name == "cuda")
    b = torch.empty(count, device=bench.device.name)
    seconds = bench.device.median(lambda: b.copy_(a, non_blocking=True))
    return {"gigabytes_per_second": 4 * count / seconds / 1e9}
