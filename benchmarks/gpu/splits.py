"""Part 2: what the split of a weight costs, how it is computed, and how exact the subspace is.

The subspace error of k directions is the largest sine between the spans of two computations,

    sin = |(I - V V^T) X|_2        (the spectral norm, float64, V from the float64 Gram matrix)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.workbench import Row, Workbench, read_rows
from lorica.subspace.linalg import Split, split
from lorica.subspace.orthonormal import complement, polar, reflector

SHAPES, TINY_SHAPES = ((2048, 2048), (4096, 4096), (14336, 4096)), ((48, 48), (96, 96), (224, 96))
SHARE = 0.75

Compute = Callable[[], Tensor | None]
Seconds = dict[str, tuple[int, float]]
"""By form: the work (rows x columns x short side) of the last shape it was measured on, and its seconds."""


def run(bench: Workbench, *, smallest: int = 0, largest: int = len(SHAPES)) -> None:
    """Measure the forms of the split, and of the bases of what it leaves free, on the shapes from one to another."""
    known = _known(bench)
    _warm_up(bench)
    for m, n in (TINY_SHAPES if bench.tiny else SHAPES)[smallest:largest]:
        torch.manual_seed(0)
        weight = 0.02 * torch.randn(m, n, device=bench.device.name)
        k = int(SHARE * min(m, n))
        parts = split(weight, k)
        for name, compute in _forms(bench, weight, parts).items():
            _one(bench, {"form": name, "rows": m, "columns": n, "k": k}, compute, parts.v_NK, known)
        del weight, parts
        bench.device.free()


def _forms(bench: Workbench, weight: Tensor, parts: Split) -> dict[str, Compute]:
    """Return what computes the top right singular vectors, or (then without a result) a basis of the rest."""
    k = parts.v_NK.shape[1]
    top, drivers = parts.u_MK[:k], bench.device.drivers
    forms: dict[str, Compute] = {
        "gram fp64 (lorica)": lambda: split(weight, k).v_NK,
        **{f"polar factor, {driver or 'svd'}": partial(_only, bench.device.svd, top, driver) for driver in drivers},
        "polar factor, eigh (lorica)": partial(_only, lambda a: polar(a)[0], top),
        "polar factor, newton": partial(_only, newton_polar, top),
        "reflector, long side": partial(_only, reflector, parts.u_MK),
        "complement, short side": partial(_only, complement, parts.v_NK),
        "eigh fp64 alone": partial(_eigh, weight, k),
    }
    for dtype in (torch.float32, torch.float64):
        for driver in drivers:
            name = f"{driver or 'gesdd'} {str(dtype).removeprefix('torch.')}"
            forms[name] = partial(_svd, bench, weight, dtype, k, driver)
    return forms


def _known(bench: Workbench) -> Seconds:
    """Return what an earlier part measured on smaller shapes, to foresee what larger ones take."""
    rows = (row for row in read_rows(bench.folder) if row.get("form") and "seconds" in row and "rows" in row)
    return {
        row["form"]: (row["rows"] * row["columns"] * min(row["rows"], row["columns"]), row["seconds"]) for row in rows
    }


def _warm_up(bench: Workbench) -> None:
    """Load the solvers, which takes a second the first time."""
    small = torch.randn(64, 64, device=bench.device.name, dtype=torch.float64)
    torch.linalg.eigh(small @ small.T)
    for driver in bench.device.drivers:
        bench.device.svd(small, driver)


def _one(bench: Workbench, labels: Row, compute: Compute, exact: Tensor, known: Seconds) -> None:
    size = labels["rows"] * labels["columns"] * min(labels["rows"], labels["columns"])
    before, seconds = known.get(labels["form"], (size, 0.0))
    if not bench.fits(labels, seconds * size / before):
        return

    def work() -> Row:
        bench.device.synchronize()
        start = time.monotonic()
        found = compute()
        bench.device.synchronize()
        row: Row = {"seconds": time.monotonic() - start}
        return row if found is None else row | {"subspace_error": subspace_error(found, exact)}

    row = bench.measure(labels, work)
    if row is not None:
        known[labels["form"]] = (size, row["seconds"])


def subspace_error(found_NK: Tensor, exact_NK: Tensor) -> float:
    """Return the largest sine of an angle between two spans."""
    found = torch.linalg.qr(found_NK.double()).Q
    rest = found - exact_NK @ (exact_NK.T @ found)
    top = torch.linalg.eigvalsh(rest.T @ rest)[-1]
    return float(top.clamp_min(0).sqrt())


def newton_polar(a: Tensor, steps: int = 30) -> Tensor:
    """Return the orthogonal polar factor of a square matrix by Newton's iteration on inverses.

    Source: Higham, "Computing the polar decomposition, with applications", 1986, with the Frobenius norm's scaling.
    """
    for _ in range(steps):
        inverse_t = torch.linalg.inv(a).T
        scale = (inverse_t.norm() / a.norm()).sqrt()
        new = (scale * a + inverse_t / scale) / 2
        if (new - a).norm() <= 1e-13 * new.norm():
            return new
        a = new
    return a


def _eigh(weight: Tensor, k: int) -> Tensor:
    w = weight.double()
    return torch.linalg.eigh(w.T @ w).eigenvectors[:, -k:]


def _svd(bench: Workbench, weight: Tensor, dtype: torch.dtype, k: int, driver: str | None) -> Tensor:
    return bench.device.svd(weight.to(dtype), driver)[2][:k].T


def _only(compute: Callable[..., object], *arguments: object) -> None:
    """Compute something whose result is no set of protected directions."""
    compute(*arguments)
