"""Orthonormal bases and what they leave free: pure functions on tensors.

Shape suffixes: D the dimension of the space, K directions of a basis.
"""

from __future__ import annotations

import torch
from torch import Tensor

ORTHONORMALITY = 1e-9
"""Largest entry of ``Q^T Q - I`` that a float64 basis may have before it is computed another way."""


def is_orthonormal(basis_DK: Tensor, tolerance: float = ORTHONORMALITY) -> bool:
    """Return whether the columns are orthonormal to ``tolerance``, entry by entry."""
    gram_KK = basis_DK.T @ basis_DK
    gram_KK.diagonal().sub_(1)
    return gram_KK.numel() == 0 or bool(torch.stack(gram_KK.aminmax()).abs().max() <= tolerance)


def reflector(basis_DK: Tensor) -> Tensor:
    """Return Z (D x K) such that the last D - K columns of ``H = I - 2 Z Z^T`` complement the basis.

    With A the top K x K block of U and its polar form A = P Hs (P orthogonal, Hs symmetric):

        Y = [-P; 0] - U        L L^T = 2 (I + Hs) = Y^T Y        Z = Y L^-T

    H is symmetric and orthogonal, and H U = [-P; 0], so its last D - K columns are orthonormal and
    orthogonal to U. The complement of K directions costs the storage of K, not D - K, and depends on the
    subspace alone, not on signs or rotations of U.

    Args:
        basis_DK: U, float64, orthonormal columns.
    """
    k = basis_DK.shape[1]
    polar_KK, stretch_KK = polar(basis_DK[:k])
    y_DK = -basis_DK.clone()
    y_DK[:k] -= polar_KK
    stretch_KK.diagonal().add_(1)
    lower_KK = torch.linalg.cholesky(2 * stretch_KK)
    return torch.linalg.solve_triangular(lower_KK, y_DK.T, upper=False).T.contiguous()


POLAR_ERROR = 1e-7
"""Largest entry of ``P^T P - I`` that one Newton-Schulz step takes to rounding: it leaves 3/4 of its square."""


def polar(a_KK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the polar form ``A = P H``: P orthogonal, H symmetric and positive semi-definite, float64.

    ``P = A (A^T A)^(-1/2)`` by ``eigh``, and one Newton-Schulz step, ``P (3 I - P^T P) / 2``, which squares what the
    small singular values have cost. On a CPU that takes as long as the SVD; an accelerator is slow at SVDs alone. Where
    the step would not be enough, and where A is singular, the SVD is taken after all.
    """
    values, vectors = torch.linalg.eigh(a_KK.T @ a_KK)
    sigma = values.clamp_min(torch.finfo(a_KK.dtype).tiny).sqrt()
    p_KK = (a_KK @ vectors / sigma) @ vectors.T
    error_KK = p_KK.T @ p_KK
    error_KK.diagonal().sub_(1)
    if error_KK.numel() == 0 or error_KK.abs().max() <= POLAR_ERROR:
        p_KK = p_KK.addmm(p_KK, error_KK, alpha=-0.5)
    else:  # NaN and infinity too
        x, _, yh = torch.linalg.svd(a_KK, driver="gesvd" if a_KK.is_cuda else None)
        p_KK = x @ yh
    stretch_KK = p_KK.T @ a_KK
    return p_KK, (stretch_KK + stretch_KK.T) / 2


def complement(basis_DK: Tensor) -> Tensor:
    """Return an orthonormal basis (D x (D - K)) of what is orthogonal to the given orthonormal columns."""
    d, k = basis_DK.shape
    tail = torch.eye(d, dtype=basis_DK.dtype, device=basis_DK.device)[:, k:]
    if k == 0:
        return tail
    z_DK = reflector(basis_DK)
    return tail - 2 * z_DK @ z_DK[k:].T


def orthonormalise(*bases_DK: Tensor, tolerance: float = 1e-8) -> Tensor:
    """Return an orthonormal basis of the union of several column spaces (their numerical rank decides K).

    Columns are unit vectors on entry; a direction whose singular value in the stacked matrix is below
    ``tolerance`` adds nothing and is dropped.
    """
    stacked = torch.cat([basis.double() for basis in bases_DK], dim=1)
    if stacked.shape[1] == 0:
        return stacked
    u, sigma, _ = torch.linalg.svd(stacked, full_matrices=False, driver="gesvd" if stacked.is_cuda else None)
    return u[:, sigma > tolerance].contiguous()
