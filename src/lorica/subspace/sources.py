"""From a plan's entry and a weight to the two bases of its free directions.

Shape suffixes: M output rows, N input columns, S = min(M, N), D either dimension, A / B protected output / input
directions, K directions, J more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lorica.errors import LoricaError
from lorica.subspace.factor import Factor, Factors
from lorica.subspace.linalg import Pair, split
from lorica.subspace.plan_entry import PlanEntry
from lorica.subspace.store import SplitStore

DEPENDENT = 1e-6
"""A unit vector with less than this outside a basis adds no direction to it: that much is rounding of float32."""


class Protected(NamedTuple):
    """Orthonormal protected directions of one weight, float64: U (M x A) and V (N x B); A or B may be 0."""

    u_MA: Tensor
    v_NB: Tensor


def protected_directions(
    weight_MN: Tensor,
    entry: PlanEntry,
    factors: Factors | None = None,
    learned: Pair | None = None,
    store: SplitStore | None = None,
) -> Protected:
    """Return the directions that an entry protects.

    ``weight``: the top k left and right singular vectors of W. ``activation``: the top k eigenvectors of
    the input second moment A = E[x x^T], for the input side. ``curvature``: these, and for the output side the top
    ones of the second moment B of the loss's gradients g by the outputs. ``hybrid``: for the input side
    singular vectors and eigenvectors of A, see ``hybrid_inputs``; for the output side the top k left singular
    vectors. To these are added the directions that finished tasks learned in: ``U = orth([U_source, P])``,
    ``V = orth([V_source, R])``.

    A side that the constraint leaves alone gets zero columns (``block`` keeps both: it constrains their
    product).

    Args:
        weight_MN: W, (out, in).
        entry: source, constraint and k.
        factors: A and B, as far as the source needs them.
        learned: P (M x J) and R (N x J), orthonormal columns, on any device; needed where the entry counts any.
        store: where splits are kept; without one the weight is split anew, which is what an audit should do.
    """
    return directions_and_spectrum(weight_MN, entry, factors, learned, store)[0]


def directions_and_spectrum(
    weight_MN: Tensor,
    entry: PlanEntry,
    factors: Factors | None = None,
    learned: Pair | None = None,
    store: SplitStore | None = None,
) -> tuple[Protected, Tensor | None]:
    """Return ``protected_directions`` and all singular values of the weight, None where it was not split for them."""
    (u, v), sigma_S = _of_source(weight_MN, entry, factors, store)
    if learned is None:
        if any(entry.learned):
            raise LoricaError(
                f"{entry.name}: the plan protects directions that finished tasks learned in, which a saved plan does "
                "not hold; set its 'learned' to [0, 0]: method osft adds them with protect_learned"
            )
        return Protected(u, v), sigma_S
    p, r = learned
    directions = Protected(
        u if entry.constraint == "input" else extended(u, p.to(u)),
        v if entry.constraint == "output" else extended(v, r.to(v)),
    )
    return directions, sigma_S


def _of_source(
    weight_MN: Tensor, entry: PlanEntry, factors: Factors | None, store: SplitStore | None
) -> tuple[Protected, Tensor | None]:
    k_u, k_v = entry.given
    sigma_S = None
    directions = [torch.zeros(size, 0, dtype=torch.float64, device=weight_MN.device) for size in weight_MN.shape]
    if entry.source in ("weight", "hybrid") and entry.k:
        try:
            k = min(entry.k, *weight_MN.shape)
            parts = split(weight_MN, k) if store is None else store.split(weight_MN, k, entry.name)
        except LoricaError as error:
            raise LoricaError(f"{entry.name}: {error}") from error
        directions, sigma_S = [parts.u_MK, parts.v_NK], parts.sigma_S
    factors = factors or Factors()
    if entry.source == "curvature" and k_u:
        directions[0] = _principal(entry, factors.outputs, k_u, weight_MN.device)
    if entry.source in ("activation", "curvature") and k_v:
        directions[1] = _principal(entry, factors.inputs, k_v, weight_MN.device)
    if entry.source == "hybrid" and k_v:
        principal_NK = _principal(entry, factors.inputs, k_v, weight_MN.device)
        directions[1] = hybrid_inputs(principal_NK, directions[1], k_v)
    u, v = (side[:, :count] for side, count in zip(directions, (k_u, k_v), strict=True))
    return Protected(u, v), sigma_S


def _principal(entry: PlanEntry, factor: Factor | None, k: int, device: torch.device) -> Tensor:
    if factor is None:
        raise LoricaError(
            f"{entry.name}: source {entry.source!r} needs calibration inputs, which a saved plan does not hold; "
            "make the plan anew with lorica.plan(calibration=...)"
        )
    if k > len(factor.energies_R):
        raise LoricaError(
            f"{entry.name}: {k} directions of a side are to be protected, of which the plan measured "
            f"{len(factor.energies_R)}; make the plan anew with as many, lorica.plan(effective_rank=...)"
        )
    return factor.directions(k, device)


def hybrid_inputs(principal_NK: Tensor, singular_NS: Tensor, k: int) -> Tensor:
    """Return k orthonormal input directions, half of them from the inputs and half from the weight.

    They span the first ceil(k / 2) principal directions of the inputs, then, in order and as far as they are
    not in the span yet, the right singular vectors of the weight, and where these are used up, the further
    principal directions. Without singular vectors they are the top k principal directions.

    Args:
        principal_NK: the first k eigenvectors of the input second moment, largest first.
        singular_NS: right singular vectors of the weight, largest first.
        k: 0 to N.
    """
    half = (k + 1) // 2 if singular_NS.shape[1] else k
    basis = principal_NK[:, :half].contiguous()
    candidates = torch.cat([singular_NS, principal_NK[:, half:]], dim=1)
    while basis.shape[1] < k and candidates.shape[1]:
        missing = k - basis.shape[1]
        basis, candidates = extended(basis, candidates[:, :missing]), candidates[:, missing:]
    return basis


def extended(basis_DK: Tensor, vectors_DJ: Tensor) -> Tensor:
    """Return an orthonormal basis with what some unit vectors have outside its span appended (0 to J columns)."""
    fresh_DJ = vectors_DJ
    for _ in range(2):
        fresh_DJ = fresh_DJ - basis_DK @ (basis_DK.T @ fresh_DJ)
    if fresh_DJ.shape[1] == 0 or basis_DK.shape[1] >= basis_DK.shape[0]:
        return basis_DK
    u, sigma, _ = torch.linalg.svd(fresh_DJ, full_matrices=False, driver="gesvd" if fresh_DJ.is_cuda else None)
    return torch.cat([basis_DK, u[:, sigma > DEPENDENT]], dim=1)
