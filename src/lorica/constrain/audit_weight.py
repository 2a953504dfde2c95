"""What happened to one weight: how much of its change lies in protected directions, from the numbers themselves.

Shape suffixes: M output rows, N input columns, S = min(M, N), A / B protected output / input directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from lorica.constrain.audit_report import AuditRow
from lorica.errors import LoricaError
from lorica.subspace.factor import Factors
from lorica.subspace.linalg import ROWS, Pair, singular_values, spectrum_points
from lorica.subspace.plan_entry import PlanEntry
from lorica.subspace.sources import Protected, directions_and_spectrum

TINY = torch.finfo(torch.float64).tiny
"""Keeps a division by the norm of a weight of zeros defined."""

PerSide = tuple[float | None, float | None]
"""Of the output and the input side; None: there is nothing to tell of it."""


def leakage(delta_MN: Tensor, u_MA: Tensor, v_NB: Tensor) -> tuple[float, float]:
    """Return the shares of a weight change D that lie in the protected output and input directions.

        leak_u = |U^T D| / |D|        leak_v = |D V| / |D|        (Frobenius norms, float64)

    Zero for an exact two-sided update; about sqrt(A / M) and sqrt(B / N) for one that ignores the
    constraint. Computed on D itself: taking what is left of the free part would cancel.

    Args:
        delta_MN: weight after minus weight before, (out, in).
        u_MA, v_NB: orthonormal protected directions; no columns: that side is not protected.

    Raises:
        ValueError: the shapes disagree.
    """
    if delta_MN.shape != (u_MA.shape[0], v_NB.shape[0]):
        raise ValueError(f"bases do not fit: {delta_MN.shape=} {u_MA.shape=} {v_NB.shape=}")
    u, v = u_MA.double(), v_NB.double()
    squares = torch.zeros(2, dtype=torch.float64, device=delta_MN.device)
    left_AN = torch.zeros(u.shape[1], v.shape[0], dtype=torch.float64, device=delta_MN.device)
    for rows in _row_blocks(delta_MN):
        d = delta_MN[rows].double()
        left_AN.addmm_(u[rows].T, d)
        squares += torch.stack([d.square().sum(), (d @ v).square().sum()])
    norm, right = squares.sqrt()
    return (0.0, 0.0) if norm == 0 else ((left_AN.norm() / norm).item(), (right / norm).item())


def _row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield the rows of a matrix, some at a time: in float64 a whole weight takes up to four times its memory."""
    return (slice(start, start + ROWS) for start in range(0, len(matrix), ROWS))


def rounding_share(before_MN: Tensor, after_MN: Tensor) -> float:
    """Return how large the rounding error of the stored weights must be, relative to the change.

    A number w of a dtype with eps is rounded to a grid of step ``2^floor(log2 |w|) eps``, which leaves an
    error of variance step^2 / 12, or the whole change where that is smaller. How large the change of one
    entry was cannot be read off that entry once it is rounded (most small ones are lost entirely), so the
    mean over the weight stands for it. No constraint can be seen more exactly than this share, times the
    protected share of the directions.
    """
    eps = max(torch.finfo(before_MN.dtype).eps, torch.finfo(after_MN.dtype).eps)
    square = _sum(before_MN, lambda rows: _change(before_MN, after_MN, rows).square().sum())
    mean = square / max(before_MN.numel(), 1)

    def error(rows: slice) -> Tensor:
        after = after_MN[rows].double()
        step = torch.ldexp(torch.full_like(after, eps), torch.frexp(after).exponent - 1)
        return step.square_().div_(12).clamp_max_(mean).sum()

    return 0.0 if square == 0 else (_sum(before_MN, error) / square) ** 0.5


def _change(before_MN: Tensor, after_MN: Tensor, rows: slice) -> Tensor:
    return after_MN[rows].to(torch.float64, copy=True).sub_(before_MN[rows].double())


def _sum(matrix: Tensor, part: Callable[[slice], Tensor]) -> float:
    """Return the sum over blocks of rows of what ``part`` makes of each."""
    return float(sum(part(rows) for rows in _row_blocks(matrix)))


def audit_weight(
    before_MN: Tensor,
    after_MN: Tensor,
    entry: PlanEntry,
    factors: Factors | None = None,
    learned: Pair | None = None,
    *,
    master_delta_MN: Tensor | None = None,
    directions: Protected | None = None,
) -> AuditRow:
    """Audit one weight against directions computed anew from the weight before.

    Args:
        before_MN, after_MN: (out, in), in the dtypes they are stored in.
        entry: what was to be protected.
        factors: what was measured, for the sources that need calibration.
        learned: directions of finished tasks that were to be protected besides.
        master_delta_MN: the change before it was added to the weight and rounded to the stored dtype
            (``SubspaceLayer.delta``), where it is known.
        directions: the protected ones, where they cannot be computed anew: what was measured for them is gone.
    """
    check_shapes(entry, before_MN, after_MN)
    sigma_S = None
    if directions is None:
        directions, sigma_S = directions_and_spectrum(before_MN, entry, factors, learned)
    delta = _change(before_MN, after_MN, slice(None))
    leaks = _leaks(delta, directions, entry.constraint)
    master = (None, None) if master_delta_MN is None else _leaks(master_delta_MN, directions, entry.constraint)
    free = _unconstrained(directions, entry.constraint)
    row = _row(before_MN, after_MN, entry, delta, leaks, free, free)
    spectrum = None if sigma_S is None else spectrum_points(sigma_S)
    return replace(row, master_leak_u=master[0], master_leak_v=master[1], spectrum=spectrum)


def audit_by_rank(before_MN: Tensor, after_MN: Tensor, entry: PlanEntry) -> AuditRow:
    """Audit one weight whose protected directions are not known: does its change leave as many alone as were protected?

    The leakages are those of ``least_leakage``, of the sides where it can be other than 0 whatever the change: M x N
    leaves N - M input directions alone of itself. A change that was constrained passes; so does one that leaves other
    directions alone, as adapters of a low rank do.

    Args:
        before_MN, after_MN: (out, in), in the dtypes they are stored in.
        entry: how many directions were to be protected; any constraint but ``block``.
    """
    check_shapes(entry, before_MN, after_MN)
    delta = _change(before_MN, after_MN, slice(None))
    free_u, free_v = (one or None for one in _least_of_random(entry.shape, entry.protected))
    leak_u, leak_v = least_leakage(delta, *entry.protected)
    leaks = (None if free_u is None else leak_u, None if free_v is None else leak_v)
    (m, n), (a, b) = entry.shape, entry.protected
    rank = min(m - a, n - b)  # of the change; rounding fills the rest, (M - rank) x (N - rank) directions of both sides
    rounded = ((m - rank) * (n - rank) / (m * n)) ** 0.5
    row = _row(before_MN, after_MN, entry, delta, leaks, (free_u, free_v), (rounded, rounded))
    return replace(row, k=max(a, b))


def _row(
    before_MN: Tensor,
    after_MN: Tensor,
    entry: PlanEntry,
    delta_MN: Tensor,
    leaks: PerSide,
    free: PerSide,
    rounded: PerSide,
) -> AuditRow:
    """Return what the table tells of a weight.

    Args:
        free: the leakage of a random change.
        rounded: that of what rounding adds, as a share of it.
    """
    rounding = rounding_share(before_MN, after_MN)
    floor_u, floor_v = (
        None if one is None or share is None else rounding * share for one, share in zip(free, rounded, strict=True)
    )
    return AuditRow(
        name=entry.name,
        shape=entry.shape,
        k=entry.k,
        constraint=entry.constraint,
        leak_u=leaks[0],
        leak_v=leaks[1],
        unconstrained_u=free[0],
        unconstrained_v=free[1],
        floor_u=floor_u,
        floor_v=floor_v,
        relative_change=delta_MN.norm().item() / max(_norm(before_MN), TINY),
    )


def least_leakage(delta_MN: Tensor, a: int, b: int) -> tuple[float, float]:
    """Return the shares of a change D in the A output and the B input directions that it leaves alone best.

        leak_u^2 = (s_(M-A+1)^2 + ... + s_M^2) / |D|^2        leak_v^2 = (s_(N-B+1)^2 + ... + s_N^2) / |D|^2

    with s the singular values of D, descending, 0 beyond min(M, N): no A and B directions have less. To 1e-8.
    """
    if not bool(delta_MN.isfinite().all()):
        return float("nan"), float("nan")
    energy_S = singular_values(delta_MN).square()
    norm = energy_S.sum().sqrt().item()
    m, n = delta_MN.shape
    counts = (max(len(energy_S) - side + count, 0) for side, count in ((m, a), (n, b)))
    tails = (energy_S[len(energy_S) - count :].sum().sqrt().item() for count in counts)
    u, v = (tail / norm if norm else 0.0 for tail in tails)
    return u, v


LARGEST_RANDOM = 256
"""Longest side of the matrix that ``_least_of_random`` takes in place of a longer one."""


@cache
def _least_of_random(shape: tuple[int, int], counts: tuple[int, int]) -> tuple[float, float]:
    """Return what ``least_leakage`` is of a random change; it depends on the ratios of the four numbers."""
    scale = min(1.0, LARGEST_RANDOM / max(shape))
    m, n = (max(1, round(side * scale)) for side in shape)
    a, b = (round(count * scale) for count in counts)
    drawn = torch.randn(m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return least_leakage(drawn, min(a, m), min(b, n))


def check_shapes(entry: PlanEntry, before_MN: Tensor, after_MN: Tensor) -> None:
    """Raise unless a weight has one shape before and after."""
    if before_MN.shape != after_MN.shape:
        raise LoricaError(f"{entry.name}: shape {tuple(before_MN.shape)} before and {tuple(after_MN.shape)} after")


def _norm(matrix: Tensor) -> float:
    """Return the Frobenius norm in float64."""
    return _sum(matrix, lambda rows: matrix[rows].double().square().sum()) ** 0.5


def _leaks(delta_MN: Tensor, directions: Protected, constraint: str) -> PerSide:
    """Return the leakage of each side, None for a side without protected directions."""
    u_MA, v_NB = directions
    if constraint == "block":
        d = delta_MN.double()
        norm = d.norm()
        leak_u = leak_v = 0.0 if norm == 0 else ((u_MA.T @ d @ v_NB).norm() / norm).item()
    else:
        leak_u, leak_v = leakage(delta_MN, u_MA, v_NB)
    return leak_u if u_MA.shape[1] else None, leak_v if v_NB.shape[1] else None


def _unconstrained(directions: Protected, constraint: str) -> PerSide:
    """Return what a random change would leak on each side, None for a side without protected directions."""
    free_u, free_v = ((basis.shape[1] / basis.shape[0]) ** 0.5 for basis in directions)
    if constraint == "block":
        free_u = free_v = free_u * free_v
    return free_u or None, free_v or None
