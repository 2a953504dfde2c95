"""The proof: how much of a weight change lies in the protected directions, from the weights themselves.

Shape suffixes: M output rows, N input columns, A / B protected output / input directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.constrain.checkpoint import Weights, open_weights
from lorica.constrain.planning import UNFREEZE_RANK_RATIO
from lorica.constrain.targets import is_target_key, natural_order
from lorica.errors import LoricaError
from lorica.subspace.plan import Plan, PlanEntry
from lorica.subspace.ranks import share_to_count
from lorica.subspace.sources import protected_directions

TOLERANCE = 1e-5
"""The largest share of a float32 change that may lie in protected directions."""

_TINY = torch.finfo(torch.float64).tiny

FLOOR_FACTOR = 1.3
"""How far above the rounding floor of the stored dtype a leakage may be."""


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
    d = delta_MN.double()
    norm = d.norm()
    if norm == 0:
        return 0.0, 0.0
    return ((u_MA.double().T @ d).norm() / norm).item(), ((d @ v_NB.double()).norm() / norm).item()


def rounding_share(before_MN: Tensor, after_MN: Tensor) -> float:
    """Return how large the rounding error of the stored weights must be, relative to the change.

    A number w of a dtype with eps is rounded to a grid of step ``2^floor(log2 |w|) eps``, which leaves an
    error of variance step^2 / 12, or the whole change where that is smaller. How large the change of one
    entry was cannot be read off that entry once it is rounded (most small ones are lost entirely), so the
    mean over the weight stands for it. No constraint can be seen more exactly than this share, times the
    protected share of the directions.
    """
    after = after_MN.double()
    delta = after - before_MN.double()
    eps = max(torch.finfo(before_MN.dtype).eps, torch.finfo(after_MN.dtype).eps)
    exponent = torch.frexp(after).exponent
    step = torch.ldexp(torch.full_like(after, eps), exponent - 1)
    error = (step.square() / 12).clamp_max(delta.square().mean())
    norm = delta.norm()
    return 0.0 if norm == 0 else (error.sum().sqrt() / norm).item()


@dataclass(frozen=True)
class AuditRow:
    """What happened to one weight. All but ``name``, ``k`` and ``constraint`` are shares of norms.

    Attributes:
        leak_u, leak_v: share of the change in protected output / input directions; for ``block`` both are
            the share of ``U^T D V``. None for a side that the plan does not protect.
        unconstrained_u, unconstrained_v: what a random change of this shape would have.
        floor_u, floor_v: what rounding to the stored dtype alone would cause.
        relative_change: |D| / |W before|.
    """

    name: str
    shape: tuple[int, int]
    k: int
    constraint: str
    leak_u: float | None
    leak_v: float | None
    unconstrained_u: float | None
    unconstrained_v: float | None
    floor_u: float | None
    floor_v: float | None
    relative_change: float

    @property
    def holds(self) -> bool:
        """Whether each protected side is within the tolerance, or within rounding where that is coarser."""
        sides = ((self.leak_u, self.floor_u), (self.leak_v, self.floor_v))
        return all(leak <= max(TOLERANCE, FLOOR_FACTOR * (floor or 0.0)) for leak, floor in sides if leak is not None)

    def figures(self) -> str:
        """Return the figures of the row, as the report's table prints them."""
        floor = max((value for value in (self.floor_u, self.floor_v) if value is not None), default=None)
        leaks = [self.relative_change, self.leak_u, self.leak_v]
        free = [self.unconstrained_u, self.unconstrained_v]
        cells = [f"{self.k}", *map(_small, leaks), *("-" if x is None else f"{x:.2f}" for x in free), _small(floor)]
        return " ".join(f"{cell:>8}" for cell in cells) + ("" if self.holds else "  LEAKS")

    @property
    def visible(self) -> bool:
        """Whether the stored dtype is fine enough to tell a constrained change of this size from any other."""
        sides = ((self.floor_u, self.unconstrained_u), (self.floor_v, self.unconstrained_v))
        return all(FLOOR_FACTOR * floor < free for floor, free in sides if floor is not None and free is not None)

    @property
    def worst(self) -> float:
        """The larger leakage of the two sides."""
        return max(leak for leak in (self.leak_u, self.leak_v, 0.0) if leak is not None)


@dataclass
class AuditReport:
    """The audit of a whole update.

    Attributes:
        rows: one per weight of the plan.
        elsewhere: relative change of every other tensor that changed, by key.
        assumed: why this plan was audited, when none was given or recorded.
    """

    rows: list[AuditRow]
    elsewhere: dict[str, float] = field(default_factory=dict)
    assumed: str = ""

    @property
    def holds(self) -> bool:
        """Whether the constraint holds in every weight of the plan."""
        return all(row.holds for row in self.rows)

    @property
    def worst(self) -> float:
        """The largest leakage of all weights."""
        return max((row.worst for row in self.rows), default=0.0)

    def to_records(self) -> list[dict[str, Any]]:
        """Return the rows as plain dictionaries, for the run record."""
        return [asdict(row) | {"shape": list(row.shape), "holds": row.holds} for row in self.rows]

    def table(self) -> str:
        """Return the audit as text."""
        width = max((len(row.name) for row in self.rows), default=6)
        heads = ("k", "change", "leak U", "leak V", "free U", "free V", "floor")
        lines = [f"{'weight':{width}} " + " ".join(f"{head:>8}" for head in heads)]
        lines += [f"{row.name:{width}} {row.figures()}" for row in self.rows]
        lines.append("leak: share of the change in protected directions; free: the same for an unconstrained change;")
        lines.append("floor: what rounding to the stored dtype causes by itself")
        if self.elsewhere:
            largest = sorted(self.elsewhere.items(), key=lambda item: -item[1])
            shown = ", ".join(f"{key} ({change:.1e})" for key, change in largest[:5])
            more = ", ..." if len(largest) > 5 else ""
            lines.append(f"{len(largest)} tensors outside the plan changed: {shown}{more}")
        return "\n".join([*lines, self.verdict()])

    def verdict(self) -> str:
        """Return the result in one sentence."""
        leaking = sum(not row.holds for row in self.rows)
        total = len(self.rows)
        unseen = sum(not row.visible for row in self.rows)
        result = f"{leaking} of {total} weights leak" if leaking else f"the constraint holds in all {total} weights"
        if unseen:
            result += f", of which {unseen} changed too little for their dtype to tell"
        return f"{self.assumed}{'; ' if self.assumed else ''}{result}; worst leakage {self.worst:.1e}"

    def __str__(self) -> str:
        return self.table()


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def audit_weight(before_MN: Tensor, after_MN: Tensor, entry: PlanEntry, moment_NN: Tensor | None = None) -> AuditRow:
    """Audit one weight against directions computed anew from the weight before.

    Args:
        before_MN, after_MN: (out, in), in the dtypes they are stored in.
        entry: what was to be protected.
        moment_NN: input second moment, for ``source="activation"``.
    """
    if before_MN.shape != after_MN.shape:
        raise LoricaError(f"{entry.name}: shape {tuple(before_MN.shape)} before and {tuple(after_MN.shape)} after")
    u, v = protected_directions(before_MN, entry, moment_NN)
    before = before_MN.double()
    delta = after_MN.double() - before
    norm = delta.norm().item()
    if entry.constraint == "block":
        leak_u = leak_v = 0.0 if norm == 0 else ((u.T @ delta @ v).norm().item() / norm)
        open_u = open_v = (entry.k / before.shape[0]) ** 0.5 * (entry.k / before.shape[1]) ** 0.5
    else:
        leak_u, leak_v = leakage(delta, u, v)
        open_u, open_v = ((basis.shape[1] / basis.shape[0]) ** 0.5 for basis in (u, v))
    rounding = rounding_share(before_MN, after_MN)
    has_u, has_v = u.shape[1] > 0, v.shape[1] > 0
    return AuditRow(
        name=entry.name,
        shape=entry.shape,
        k=entry.k,
        constraint=entry.constraint,
        leak_u=leak_u if has_u else None,
        leak_v=leak_v if has_v else None,
        unconstrained_u=open_u if has_u else None,
        unconstrained_v=open_v if has_v else None,
        floor_u=rounding * open_u if has_u else None,
        floor_v=rounding * open_v if has_v else None,
        relative_change=norm / max(before.norm().item(), _TINY),
    )


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

    Args:
        before, after: models, folders of safetensors, or single ``.safetensors`` files.
        plan: what was to be protected. Default: the plan recorded in ``after/lorica.json``, else a uniform
            two-sided plan on all linear layers of the blocks.
        unfreeze_rank_ratio: of that uniform plan (0.25 by default).
        progress: called as ``progress(name, done, total)``.

    Raises:
        LoricaError: no safetensors, no weight in common, a weight that the plan names is missing, or the
            plan's directions cannot be recomputed from the weights (``activation`` without calibration).
    """
    old, new = open_weights(before), open_weights(after)
    common = [key for key in old.keys() if key in new]
    if not common:
        first, second = next(iter(old.keys())), next(iter(new.keys()))
        raise LoricaError(f"{old} and {new} have no tensor in common: {first} against {second}")
    plan, assumed = _plan_for(plan, old, new, unfreeze_rank_ratio)
    _check_directions_are_known(plan, new)
    rows = []
    for done, entry in enumerate(plan.entries, start=1):
        key = f"{entry.name}.weight"
        rows.append(audit_weight(old.matrix(key), new.matrix(key), entry, plan.moment(entry.name)))
        if progress:
            progress(entry.name, done, len(plan))
    planned = {f"{entry.name}.weight" for entry in plan.entries}
    elsewhere = dict(_changes(old, new, [key for key in common if key not in planned]))
    return AuditReport(rows, elsewhere, assumed)


def _check_directions_are_known(plan: Plan, new: Weights) -> None:
    measured = [e.name for e in plan.entries if e.source == "activation" and plan.moment(e.name) is None]
    if measured:
        raise LoricaError(
            f"{new}: the plan protects input directions that were measured while training ({measured[0]} and "
            f"{len(measured) - 1} more) and are not in the weights; the audit made then is in lorica.json under "
            "'leakage'. To audit the weights' own top directions instead, give unfreeze_rank_ratio"
        )


def _changes(old: Weights, new: Weights, keys: list[str]) -> Iterator[tuple[str, float]]:
    for key in keys:
        a, b = old.tensor(key), new.tensor(key)
        if a.shape != b.shape or (a.dtype == b.dtype and torch.equal(a, b)) or not a.is_floating_point():
            continue
        change = (b.double() - a.double()).norm().item() / max(a.double().norm().item(), _TINY)
        if change > 0:
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
