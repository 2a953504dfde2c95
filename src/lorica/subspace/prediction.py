"""What a plan and a change of the weights mean for what a model predicts, to second order, from Kronecker factors.

Shape suffixes: M outputs, N inputs, D either, A / B protected output / input directions, K directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

from lorica.subspace.calibration import Batch, Progress
from lorica.subspace.factor import Factor, Factors
from lorica.subspace.measure import Wanted, measure
from lorica.subspace.memory import KEPT_AS, memory_rank
from lorica.subspace.plan_entry import Constraint, PlanEntry
from lorica.subspace.sources import Protected


class EnergyShares(NamedTuple):
    """Shares of tr A in one set of directions: the protected ones, random ones, the best there are."""

    protected: float
    random: float
    best: float


def energy_in(factor: Factor, basis_DK: Tensor) -> float:
    """Return ``tr(Q^T A Q)``, the energy in the span of Q.

    Args:
        factor: A.
        basis_DK: Q, orthonormal columns.
    """
    basis = basis_DK.double()
    return (factor.above_floor(basis.device).T @ basis).square().sum().item() + factor.floor * basis.shape[1]


def energy_shares(factor: Factor, basis_DK: Tensor) -> EnergyShares | None:
    """Return how much of the energy of a side lies in its protected directions.

        protected = tr(V^T A V) / tr A        random = K / D        best = (a_1 + ... + a_K) / tr A

    with a_i the eigenvalues of A in descending order. ``random`` is the expectation over subspaces of K directions
    drawn uniformly, whatever A is; no subspace of K directions holds more than ``best``.

    Args:
        factor: A, or any positive multiple of it.
        basis_DK: V, orthonormal columns.

    Returns:
        None where there is no energy: a layer that saw nothing but zeros.
    """
    trace, k = factor.trace, basis_DK.shape[1]
    if trace <= 0:
        return None
    known = factor.energies_R[:k]
    best = float(known.sum()) + factor.floor * (k - len(known))
    return EnergyShares(energy_in(factor, basis_DK) / trace, k / factor.dim, best / trace)


def expected_divergence(factors: Factors, delta_MN: Tensor) -> float:
    """Return how far a model's predictions are expected to move by a change D of one weight.

        E KL(p || q) ~ tr(B D A D^T) / 2        nats per prediction

    with p the predictions before and q those after. To second order in D, and as far as the Fisher matrix of the weight
    is ``B kron A``.

    Args:
        factors: A and B, both measured.
        delta_MN: D, (out, in), on any device.

    Source:
        Martens and Grosse 2015, arXiv 1503.05671 (K-FAC).
    """
    assert factors.inputs is not None
    assert factors.outputs is not None
    d = delta_MN.double()
    left_MR, right_NR = (side.above_floor(d.device) for side in (factors.outputs, factors.inputs))
    low, high = factors.outputs.floor, factors.inputs.floor
    left_RN, right_MR = left_MR.T @ d, d @ right_NR
    terms = (left_RN @ right_NR).square().sum() + high * left_RN.square().sum()
    return float(terms + low * right_MR.square().sum() + low * high * d.square().sum()) / 2


@dataclass(frozen=True)
class Outlook:
    """What the protection of one weight, or of several together, leaves open.

    Attributes:
        inputs, outputs: shares of the energy of A and B that are protected; None where there is none.
        left: ``tr(B kron A)`` over the free directions.
        free: degrees of freedom of these.
        whole: ``tr B tr A``.
        size: numbers of the weight.
    """

    inputs: EnergyShares | None
    outputs: EnergyShares | None
    left: float
    free: int
    whole: float
    size: int

    @classmethod
    def of(cls, factors: Factors, directions: Protected, constraint: Constraint) -> Self:
        """Return that of one weight.

        Args:
            factors: A and B, both measured.
            directions: U and V; without columns where the constraint leaves a side alone.
            constraint: how U and V constrain a change.
        """
        a, b = factors.inputs, factors.outputs
        assert a is not None
        assert b is not None
        (m, k_u), (n, k_v) = (side.shape for side in directions)
        outputs, inputs = energy_shares(b, directions.u_MA), energy_shares(a, directions.v_NB)
        held_u, held_v = (0.0 if side is None else side.protected for side in (outputs, inputs))
        if constraint == "block":
            open_share, free = 1 - held_u * held_v, m * n - k_u * k_v
        else:
            open_share, free = (1 - held_u) * (1 - held_v), (m - k_u) * (n - k_v)
        whole = b.trace * a.trace
        return cls(inputs, outputs, max(open_share, 0.0) * whole, free, whole, m * n)

    @classmethod
    def together(cls, parts: Sequence[Outlook]) -> Self:
        """Return that of several weights: energies add up, and of shares the mean over the weights is told."""
        left, whole = sum(part.left for part in parts), sum(part.whole for part in parts)
        free, size = sum(part.free for part in parts), sum(part.size for part in parts)
        shares = (_mean([part.inputs for part in parts]), _mean([part.outputs for part in parts]))
        return cls(*shares, left, free, whole, size)

    @property
    def expected(self) -> float:
        """Forgetting expected of a random update in the free directions, over that of one of its norm in all.

            (tr(B kron A) over the free directions / how many they are) / (tr B tr A / (M N))

        0 where nothing is free or nothing can be forgotten.
        """
        return self.left / self.free / (self.whole / self.size) if self.free and self.whole > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the shares and ``expected``."""
        sides = {"inputs": self.inputs, "outputs": self.outputs}
        return {name: side and side._asdict() for name, side in sides.items()} | {"expected": self.expected}


def _mean(shares: Iterable[EnergyShares | None]) -> EnergyShares | None:
    known = [one for one in shares if one is not None]
    return EnergyShares(*map(fmean, zip(*known, strict=True))) if known else None


def kind_of(name: str) -> str:
    """Return what kind of layer a name tells of: ``mlp.up_proj`` of ``model.layers.0.mlp.up_proj``."""
    return ".".join([part for part in name.split(".") if not part.isdigit()][-2:])


def both_factors(
    model: nn.Module,
    entries: Sequence[PlanEntry],
    calibration: Sequence[Batch],
    nbytes: float,
    progress: Progress | None = None,
) -> dict[str, Factors]:
    """Return A and B of the weights of a plan, whatever its source, on the CPU; as many directions as fit.

    Args:
        model: the plan's.
        entries: of the plan.
        calibration: batches as the model takes them; see ``measure``.
        nbytes: how much all of them take together at most.
        progress: see ``measure``.
    """
    rank = memory_rank([dim for entry in entries for dim in entry.shape], nbytes)
    wanted = {entry.name: Wanted(entry.shape, inputs=rank, outputs=rank) for entry in entries}
    layers = {entry.name: model.get_submodule(entry.name) for entry in entries}

    @cache  # what layers have in common is kept once
    def aside(factor: Factor) -> Factor:
        return factor.aside(KEPT_AS)

    found = measure(model, layers, calibration, wanted, progress=progress)
    return {
        name: Factors(*(None if side is None else aside(side) for side in (one.inputs, one.outputs)))
        for name, one in found.items()
    }
