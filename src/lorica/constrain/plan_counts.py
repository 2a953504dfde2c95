"""How many directions of each weight a plan protects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lorica.constrain.linear import matrix_of
from lorica.constrain.plan_options import checked_amount
from lorica.constrain.sharded_plan import sharded_spectra
from lorica.constrain.targets import ends_in, user_pattern
from lorica.errors import LoricaError
from lorica.subspace import ranks as policies
from lorica.subspace.factor import Factors
from lorica.subspace.marginal import Greedy, within_forgetting, within_freedom
from lorica.subspace.measure import Wanted
from lorica.subspace.observe import InputStatistics
from lorica.subspace.plan_entry import PlanEntry
from lorica.subspace.store import SplitStore

LARGEST_MARGINAL = 2048
"""Most directions of one side that ranks ``marginal`` protects: so many are measured."""


def marginal_entries(
    entries: list[PlanEntry], factors: Mapping[str, Factors], expected_forgetting: float | None
) -> list[PlanEntry]:
    """Return the entries with the counts of ``marginal``, those of ``uniform`` given."""
    greedy = Greedy(entries, factors)
    if expected_forgetting is None:
        free = sum(entry.free for entry in entries)
        counts, reached = within_freedom(greedy, free), greedy.free <= free
    else:
        counts = within_forgetting(greedy, expected_forgetting)
        reached = greedy.forgetting_share <= expected_forgetting
    if greedy.at_the_end and not reached:
        raise LoricaError(
            f"ranks 'marginal' protects at most {LARGEST_MARGINAL} directions of a side: {greedy.free:,} degrees of "
            f"freedom and {greedy.forgetting_share:.2g} of the expected forgetting are left then; ask for that much, "
            "or use ranks 'uniform'"
        )
    why = f"marginal: {greedy.forgetting_share:.3g} of an unconstrained update's forgetting expected"
    return [entry.with_counts(*counts[entry.name], why) for entry in entries]


def wanted(entry: PlanEntry, *, marginal: bool, beyond: int = 0) -> Wanted:
    """Return which sides of a layer its source looks at, and how closely.

    Args:
        beyond: directions that are told apart besides those to be protected.
    """
    if marginal:
        m, n = (min(size, LARGEST_MARGINAL) for size in entry.shape)
        return Wanted(entry.shape, inputs=n, outputs=m)
    k_u, k_v = (min(k + beyond, side) or None for k, side in zip(entry.given, entry.shape, strict=True))
    return Wanted(entry.shape, inputs=k_v, outputs=k_u if entry.source == "curvature" else None)


def counts(
    ranks: str,
    protected: float | int,
    width: int,
    spectrum: Callable[[str], Tensor],
    observed: Mapping[str, InputStatistics],
    retention: tuple[float, float],
) -> Callable[[PlanEntry], dict[str, Any]]:
    """Return what a policy says of one entry: its k, and why."""
    if ranks == "importance":
        shares = policies.importance_shares({n: one.similarity for n, one in observed.items()}, *retention)
        return lambda e: {
            "k": policies.share_to_count(shares[e.name], e.limit),
            "why": f"importance: cosine {observed[e.name].similarity:.3f}, share {shares[e.name]:.3f}",
        }
    if ranks == "energy":
        if isinstance(protected, int):
            raise LoricaError("ranks 'energy' needs a share, not a count: give unfreeze_rank_ratio")
        return lambda e: {
            "k": policies.energy_rank(spectrum(e.name), protected),
            "why": f"energy: {protected:g} of the squared spectrum",
        }
    if ranks == "effective-rank":
        return lambda e: _effective(policies.effective_rank(spectrum(e.name)), e)
    return uniform(protected, width)


def uniform(protected: float | int, width: int) -> Callable[[PlanEntry], dict[str, Any]]:
    """Return what ``uniform`` says of one entry, from its shape, source and constraint alone.

    Args:
        protected: a share of the directions (float) or a count (int).
        width: the largest min(M, N) among the weights.
    """
    why = f"uniform: {protected:g} protected"
    if isinstance(protected, float):
        return lambda e: _each_side(e, protected, width) | {"why": why}
    return lambda e: {"k": _count("effective_rank", protected, e), "why": why}


def _each_side(entry: PlanEntry, share: float, width: int) -> dict[str, int | None]:
    """Return a share's count of each side; of both, where both are measured, of each side's own directions.

    Weights with the same inputs then protect the same directions of these, however few outputs some of them have (the
    keys and values of grouped heads). More than the model's width counts as no more: the inner side of an MLP is as
    long as three of them.
    """
    if entry.source != "curvature" or entry.constraint in ("input", "output"):
        return {"k": policies.share_to_count(share, entry.limit)}
    k_u, k_v = (policies.share_to_count(share, min(size, width)) for size in entry.shape)
    return {"k": k_v, "k_output": None if k_u == k_v else k_u}


def _effective(rank: float, entry: PlanEntry) -> dict[str, Any]:
    return {"k": min(entry.limit, int(rank + 1e-9)), "why": f"effective rank {rank:.1f}"}


def spectra(
    model: nn.Module, targets: Mapping[str, nn.Module], sharded: Mapping[str, nn.Module], ranks: str
) -> Callable[[str], Tensor]:
    """Return what tells the singular values of a weight; of sharded ones they are all computed at once."""
    store = SplitStore.from_environment()

    def of(name: str, weight_MN: Tensor) -> Tensor:
        try:
            return store.singular_values(weight_MN, name)
        except LoricaError as error:
            raise LoricaError(f"{name}: {error}") from error

    known = sharded_spectra(model, sharded, of) if ranks in ("energy", "effective-rank") else {}
    return lambda name: known[name] if name in known else of(name, matrix_of(targets[name]))


def _count(option: str, amount: float | int, entry: PlanEntry) -> int:
    if isinstance(amount, float):
        return policies.share_to_count(amount, entry.limit)
    if amount > entry.limit:
        raise LoricaError(
            f"{option} = {amount} is out of range for {entry.name} ({entry.shape[0]} x {entry.shape[1]}): "
            f"0 to {entry.limit}"
        )
    return amount


def with_pattern(entries: list[PlanEntry], rank_pattern: Mapping[str, float | int]) -> list[PlanEntry]:
    """Return the entries with the counts that ``rank_pattern`` gives those whose names end in a pattern."""
    width = max(min(entry.shape) for entry in entries)
    for pattern, amount in rank_pattern.items():
        checked_amount(f"rank_pattern[{pattern!r}]", amount)
        compiled = user_pattern("rank_pattern", pattern)
        hits = [i for i, entry in enumerate(entries) if ends_in(entry.name, compiled)]
        if not hits:
            raise LoricaError(f"rank_pattern: {pattern!r} matches none of the {len(entries)} constrained weights")
        for i in hits:
            entry = entries[i].model_copy(update={"k_output": None, "why": f"rank_pattern {pattern!r}: {amount:g}"})
            if isinstance(amount, float):
                entries[i] = entry.model_copy(update=_each_side(entry, amount, width))
            else:
                entries[i] = entry.model_copy(update={"k": _count(f"rank_pattern[{pattern!r}]", amount, entry)})
    return entries
