"""The proof: how much of a weight change lies in the protected directions, from the weights themselves.

Shape suffixes: M output rows, N input columns, A / B protected output / input directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lorica.constrain.audit_report import AuditReport, AuditRow
from lorica.constrain.checkpoint import Stripped, Weights, open_weights, prefix_apart
from lorica.constrain.plan_options import UNFREEZE_RANK_RATIO
from lorica.constrain.targets import is_target_key, natural_order
from lorica.errors import LoricaError
from lorica.subspace.factor import Factors
from lorica.subspace.linalg import ROWS, Pair, spectrum_points
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import MEASURED, PlanEntry
from lorica.subspace.ranks import share_to_count
from lorica.subspace.sources import Protected, directions_and_spectrum

_TINY = torch.finfo(torch.float64).tiny


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
    if before_MN.shape != after_MN.shape:
        raise LoricaError(f"{entry.name}: shape {tuple(before_MN.shape)} before and {tuple(after_MN.shape)} after")
    sigma_S = None
    if directions is None:
        directions, sigma_S = directions_and_spectrum(before_MN, entry, factors, learned)
    delta = _change(before_MN, after_MN, slice(None))
    leak_u, leak_v = _leaks(delta, directions, entry.constraint)
    master = None if master_delta_MN is None else _leaks(master_delta_MN, directions, entry.constraint)
    free_u, free_v = _unconstrained(directions, entry.constraint)
    rounding = rounding_share(before_MN, after_MN)
    return AuditRow(
        name=entry.name,
        shape=entry.shape,
        k=entry.k,
        constraint=entry.constraint,
        leak_u=leak_u,
        leak_v=leak_v,
        unconstrained_u=free_u,
        unconstrained_v=free_v,
        floor_u=None if free_u is None else rounding * free_u,
        floor_v=None if free_v is None else rounding * free_v,
        relative_change=delta.norm().item() / max(_norm(before_MN), _TINY),
        master_leak_u=None if master is None else master[0],
        master_leak_v=None if master is None else master[1],
        spectrum=None if sigma_S is None else spectrum_points(sigma_S),
    )


def _norm(matrix: Tensor) -> float:
    """Return the Frobenius norm in float64."""
    return _sum(matrix, lambda rows: matrix[rows].double().square().sum()) ** 0.5


def _leaks(delta_MN: Tensor, directions: Protected, constraint: str) -> tuple[float | None, float | None]:
    """Return the leakage of each side, None for a side without protected directions."""
    u_MA, v_NB = directions
    if constraint == "block":
        d = delta_MN.double()
        norm = d.norm()
        leak_u = leak_v = 0.0 if norm == 0 else ((u_MA.T @ d @ v_NB).norm() / norm).item()
    else:
        leak_u, leak_v = leakage(delta_MN, u_MA, v_NB)
    return leak_u if u_MA.shape[1] else None, leak_v if v_NB.shape[1] else None


def _unconstrained(directions: Protected, constraint: str) -> tuple[float | None, float | None]:
    """Return what a random change would leak on each side, None for a side without protected directions."""
    free_u, free_v = ((basis.shape[1] / basis.shape[0]) ** 0.5 for basis in directions)
    if constraint == "block":
        free_u = free_v = free_u * free_v
    return free_u or None, free_v or None


def audit(
    before: nn.Module | str | Path,
    after: nn.Module | str | Path,
    plan: Plan | None = None,
    *,
    unfreeze_rank_ratio: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> AuditReport:
    """Compare two states of a model and return what the change did to the protected directions.

    Works on any two checkpoints of one architecture, whoever made them, one weight at a time. The
    directions are computed anew from ``before``; nothing is taken from the training run but the plan.
    Names may differ by a prefix such as GPT-2's ``transformer.``. Tensors that only one of the two has, or
    that were reshaped, are listed in ``differences``.

    Args:
        before, after: models, folders of safetensors, or single ``.safetensors`` files.
        plan: what was to be protected. Default: the plan recorded in ``after/lorica.json``, else a uniform
            two-sided plan on all linear layers of the blocks.
        unfreeze_rank_ratio: audit that uniform plan (0.25 without a record) and no recorded one.
        progress: called as ``progress(name, done, total)``.

    Raises:
        LoricaError: no safetensors, no weight in common, a weight that the plan names is missing or has
            another shape, both a plan and a ratio are given, or the plan's directions cannot be recomputed
            from the weights (measured ones without calibration, what finished tasks learned).
    """
    if plan is not None and unfreeze_rank_ratio is not None:
        raise LoricaError("plan and unfreeze_rank_ratio both say what was protected; give one of them")
    old, new = open_weights(before), open_weights(after)
    old.family, new.family = _known(old.family, new.family), _known(new.family, old.family)
    plan, assumed = _plan_for(plan, old, new, unfreeze_rank_ratio)
    _check_directions_are_known(plan, new)
    planned = [f"{entry.name}.weight" for entry in plan.entries]
    prefix = prefix_apart(planned, old, new)
    if prefix:
        old, new = Stripped(old, prefix), Stripped(new, prefix)
        planned = [key.removeprefix(prefix) for key in planned]
        assumed = f"{assumed}{'; ' if assumed else ''}names are compared without {prefix!r}"
    common = [key for key in old.keys() if key in new]
    if not common:
        raise LoricaError(f"{old} and {new} have no tensor in common: {_example(old)} against {_example(new)}")
    rows = []
    for done, (key, entry) in enumerate(zip(planned, plan.entries, strict=True), start=1):
        known = (plan.factors(entry.name), plan.learned(entry.name))
        rows.append(audit_weight(old.matrix(key), new.matrix(key), entry, *known))
        if progress:
            progress(entry.name, done, len(plan))
    differences = _differences(old, new)
    seen = {*planned, *differences}
    elsewhere = dict(_changes(old, new, [key for key in common if key not in seen]))
    return AuditReport(rows, elsewhere, differences, assumed)


def _known(family: str, other: str) -> str:
    """Return the family, or that of the other where it is not known: a single file names none."""
    return other if family == "unknown" else family


def _example(weights: Weights) -> str:
    return next(iter(weights.keys()), "none")


def _check_directions_are_known(plan: Plan, new: Weights) -> None:
    measured = (e.name for e in plan.entries if any(e.given) and e.source in MEASURED)
    unmeasured = [name for name in measured if plan.factors(name) is None]
    unlearned = [e.name for e in plan.entries if any(e.learned) and plan.learned(e.name) is None]
    missing = unmeasured or unlearned
    if missing:
        what = "directions that were measured while training" if unmeasured else "directions of finished tasks"
        raise LoricaError(
            f"{new}: the plan protects {what} ({missing[0]} and "
            f"{len(missing) - 1} more), which are not in the weights; the audit made then is in lorica.json under "
            "'leakage'. To audit the weights' own top directions, give unfreeze_rank_ratio instead of a plan"
        )


def _differences(old: Weights, new: Weights) -> dict[str, str]:
    """Return the tensors that cannot be compared, and why, by key."""
    found = {key: "only in the one before" for key in old.keys() if key not in new}
    for key in new.keys():
        if key not in old:
            found[key] = "only in the one after"
        elif old.shape(key) != new.shape(key):
            found[key] = f"{_by(old.shape(key))} before, {_by(new.shape(key))} after"
    return found


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _changes(old: Weights, new: Weights, keys: Iterable[str]) -> Iterator[tuple[str, float]]:
    for key in keys:
        a, b = old.tensor(key), new.tensor(key)
        if a.dtype == b.dtype and torch.equal(a, b):
            continue
        change = (b.double() - a.double()).norm().item() / max(a.double().norm().item(), _TINY)
        if change != 0:  # also true of NaN
            yield key, change


def _plan_for(plan: Plan | None, old: Weights, new: Weights, ratio: float | None) -> tuple[Plan, str]:
    if plan is not None:
        return plan, ""
    recorded = new.recorded_plan() if ratio is None else None
    if recorded is not None:
        return recorded, ""
    ratio = UNFREEZE_RANK_RATIO if ratio is None else ratio
    if not 0 <= ratio <= 1:
        raise LoricaError(f"unfreeze_rank_ratio = {ratio} is out of range: 0 to 1")
    entries = []
    for key in sorted(old.keys(), key=natural_order):
        if is_target_key(old.family, key, old.shape(key)):
            m, n = old.matrix(key).shape
            k = share_to_count(1 - ratio, min(m, n))
            entries.append(PlanEntry(name=key.removesuffix(".weight"), shape=(m, n), k=k))
    if not entries:
        raise LoricaError(f"{old} holds no weight that looks like a linear layer of a block; give a plan")
    assumed = f"no plan is recorded: audited as if the top {1 - ratio:.0%} were protected"
    return Plan(family=old.family, entries=entries), assumed
