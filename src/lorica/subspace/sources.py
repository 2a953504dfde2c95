"""From a plan's entry and a weight to the two bases of its free directions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lorica.errors import LoricaError
from lorica.subspace.basis import Basis, free_basis
from lorica.subspace.linalg import split
from lorica.subspace.plan import PlanEntry


class Protected(NamedTuple):
    """Orthonormal protected directions of one weight, float64: U (M x A) and V (N x B); A or B may be 0."""

    u_MA: Tensor
    v_NB: Tensor


def protected_directions(weight_MN: Tensor, entry: PlanEntry, moment_NN: Tensor | None = None) -> Protected:
    """Return the directions that an entry protects.

    ``weight``: the top k left and right singular vectors of W. ``activation``: the top k eigenvectors of
    the input second moment A = E[x x^T], for the input side. A side that the constraint leaves alone gets
    zero columns (``block`` keeps both: it constrains their product), and so do both sides where k = 0.

    Args:
        weight_MN: W, (out, in).
        entry: source, constraint and k.
        moment_NN: A, needed for ``activation``.
    """
    if entry.k == 0:
        return Protected(*(torch.zeros(d, 0, dtype=torch.float64, device=weight_MN.device) for d in weight_MN.shape))
    if entry.source == "activation":
        if moment_NN is None:
            raise LoricaError(
                f"{entry.name}: source 'activation' needs calibration inputs, which a saved plan does not hold; "
                "make the plan anew with lorica.plan(calibration=...)"
            )
        _, vectors = torch.linalg.eigh(moment_NN.double())
        v_NB = vectors.flip(1)[:, : entry.k].contiguous().to(weight_MN.device)
        return Protected(v_NB.new_zeros(weight_MN.shape[0], 0), v_NB)
    try:
        parts = split(weight_MN, entry.k)
    except LoricaError as error:
        raise LoricaError(f"{entry.name}: {error}") from error
    u, v = parts.u_MK, parts.v_NK
    if entry.constraint == "input":
        u = u[:, :0]
    if entry.constraint == "output":
        v = v[:, :0]
    return Protected(u, v)


def free_bases(directions: Protected, dtype: torch.dtype) -> tuple[Basis, Basis]:
    """Return (Q_U, Q_V), the bases of the free output and input directions, stored in ``dtype``."""
    return free_basis(directions.u_MA, dtype), free_basis(directions.v_NB, dtype)
