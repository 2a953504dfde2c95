"""The eigenvectors of a Gram matrix from those of an earlier one of which only a block has changed.

Between two tasks ``W' = W + Q_U M Q_V^T``: the protected singular triplets of W are still singular triplets of W', but
for the rounding of W' to its dtype. In the old basis V the new Gram matrix is therefore nearly diagonal outside of
one block, and its eigenvectors follow from a small eigenproblem and a few matrix products.

Shape suffixes: S the short side of the weight, F directions that changed, P probes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FIRST = 8
"""So many of the largest old directions are looked at before anything is spent: protected ones have hardly moved."""

UNMOVED = 1e-5
"""Residual, over the largest eigenvalue, above which one of these has moved: a wrong hint, or a coarse dtype."""

LARGEST_BLOCK = 0.5
"""Share of all directions that the block may have; beyond it little would be saved."""

SECOND_ORDER = 3e-15
"""What a first-order rotation may leave behind, over the largest eigenvalue, before its pair joins the block."""

LARGEST_ANGLE = 1e-4
"""Largest first-order rotation: the basis stays orthonormal to its fourth power."""

ROUNDING = 1e-15
"""Entries of T, over the largest eigenvalue, that its computation in float64 leaves where exact ones were 0."""

ROUNDS = 3
"""How often the block may grow by directions that its new eigenvalues came close to."""

EXACT = 2e-15
"""Largest misfit of a result that is kept, times S. The eigensolver itself leaves 0.2e-15 S."""


class Eigen(NamedTuple):
    """Eigenvalues, descending, and orthonormal eigenvectors in columns, float64."""

    values_S: Tensor
    vectors_SS: Tensor


def refreshed(gram_SS: Tensor, old_SS: Tensor) -> Eigen | None:
    """Return the eigenvectors of a Gram matrix G, given those of an earlier one; None where that is not exact.

    With ``T = V^T G V``, every pair of directions whose rotation by perturbation theory,

        E_ij = T_ij / (T_jj - T_ii),

    would leave more than rounding behind belongs to a block that is diagonalised outright: what training changed,
    and any direction so close to another that the first order does not tell them apart. The other pairs are rotated
    by ``I + E + E^2 / 2``. What was protected need not be known: it is what is found unchanged. Nor need ``old_SS``
    have anything to do with G: the result is measured, and is as exact as the eigensolver's or not returned.

    Args:
        gram_SS: symmetric, positive semi-definite, float64.
        old_SS: orthonormal columns, float64, the largest directions first.
    """
    if not _looks_unmoved(gram_SS, old_SS):
        return None
    basis_SS = old_SS.clone()
    t_SS = symmetric_product(old_SS, gram_SS @ old_SS)
    rotation_SS = _block_diagonalised(t_SS, basis_SS)
    if rotation_SS is None:
        return None
    values = t_SS.diagonal() + (t_SS * rotation_SS).sum(0)
    coarse = rotation_SS.float()  # its square is far too small to need more
    rotation_SS.sub_(symmetric_product(coarse, coarse), alpha=0.5)  # E^T E = -E^2
    basis_SS.addmm_(basis_SS.clone(), rotation_SS)
    order = values.argsort(descending=True)
    result = Eigen(values[order], basis_SS[:, order].contiguous())
    return result if max(misfit(gram_SS.matmul, result)) <= EXACT * len(values) else None


def misfit(gram: Callable[[Tensor], Tensor], eigen: Eigen, probes: int = 16) -> tuple[float, float]:
    """Return how far a result is from an eigendecomposition of G, and its vectors are from orthonormal.

        |G V - V L|_F / l_1        |V^T V - I|_F

    Both norms are estimated from random combinations of the columns, always the same ones: for Gaussian z the
    expectation of ``|R z|^2`` is ``|R|_F^2``. That takes a few products with a thin matrix instead of square ones.

    Args:
        gram: multiplies a thin matrix (S x P) by G.
        eigen: what is to be checked.
        probes: P.
    """
    values, vectors = eigen
    generator = torch.Generator().manual_seed(0)
    z_SP = torch.randn(len(values), probes, generator=generator, dtype=torch.float64).to(values.device)
    combined = vectors @ z_SP
    residual = gram(combined) - vectors @ (values[:, None] * z_SP)
    skewness = vectors.T @ combined - z_SP
    largest = values.max().clamp_min(torch.finfo(torch.float64).tiny)
    return float(residual.norm() / largest) / probes**0.5, float(skewness.norm()) / probes**0.5


def symmetric_product(a_RS: Tensor, b_RS: Tensor, blocks: int = 8) -> Tensor:
    """Return ``A^T B`` where that is known to be symmetric, exactly so: little more than half of the work."""
    size = a_RS.shape[1]
    result = a_RS.new_empty(size, size)
    step = -(-size // blocks)
    for start in range(0, size, step):
        stop = min(start + step, size)
        strip = a_RS[:, start:stop].T @ b_RS[:, :stop]
        strip[:, start:] = (strip[:, start:] + strip[:, start:].T) / 2
        result[start:stop, :stop] = strip
        result[:start, start:stop] = strip[:, :start].T
    return result


def _looks_unmoved(gram_SS: Tensor, old_SS: Tensor) -> bool:
    first = old_SS[:, :FIRST]
    image = gram_SS @ first
    values = (first * image).sum(0)
    residual = (image - first * values).norm(dim=0)
    return bool((residual <= UNMOVED * values.max()).all())


def _block_diagonalised(t_SS: Tensor, basis_SS: Tensor) -> Tensor | None:
    """Diagonalise, in place, the block that the first order is not enough for; return the rotation of the rest."""
    member = torch.zeros(len(t_SS), dtype=torch.bool, device=t_SS.device)
    for _ in range(ROUNDS):
        rotation = _first_order(t_SS)
        entangled = _entangled(t_SS, rotation)
        if not entangled.any():
            return rotation
        member |= entangled
        if member.sum() > LARGEST_BLOCK * len(member):
            return None
        block = member.nonzero()[:, 0]
        rows = t_SS[block]
        values, turn_FF = torch.linalg.eigh(rows[:, block])
        rows = turn_FF.T @ rows
        rows[:, block] = torch.diag(values)
        t_SS[block], t_SS[:, block] = rows, rows.T
        basis_SS[:, block] = basis_SS[:, block] @ turn_FF
    return None


def _first_order(t_SS: Tensor) -> Tensor:
    """Return E, 0 where two eigenvalues are as good as equal and T holds nothing but rounding between them."""
    values = t_SS.diagonal()
    rotation = t_SS / (values[None] - values[:, None])
    noise = t_SS.abs() <= ROUNDING * values.max()
    rotation[noise & ~(rotation.abs() <= LARGEST_ANGLE)] = 0  # 0 / 0 is among them
    return rotation.fill_diagonal_(0)


def _entangled(t_SS: Tensor, rotation_SS: Tensor) -> Tensor:
    """Return which directions have a partner that the first order does not tell them from."""
    left_behind = torch.linalg.vector_norm(t_SS * rotation_SS, torch.inf, dim=0)
    angle = torch.linalg.vector_norm(rotation_SS, torch.inf, dim=0)
    return (left_behind > SECOND_ORDER * t_SS.diagonal().max()) | (angle > LARGEST_ANGLE)
