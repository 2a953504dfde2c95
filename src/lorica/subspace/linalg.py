"""The split of a weight and orthonormal bases of what it leaves free: pure functions on tensors.

Shape suffixes: M output rows, N input columns, S = min(M, N), D either dimension, K protected directions.
Everything is computed in float64; the caller rounds once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lorica.errors import LoricaError

ORTHONORMALITY = 1e-9
"""Largest entry of ``Q^T Q - I`` that a float64 basis may have before it is computed another way."""


@dataclass(frozen=True)
class Split:
    """The singular value decomposition of one weight, ``W = U diag(S) V^T``, cut after ``k`` directions.

    Attributes:
        u_MK: the first k left singular vectors, float64.
        sigma_S: all singular values, descending, float64.
        v_NK: the first k right singular vectors, float64.
    """

    u_MK: Tensor
    sigma_S: Tensor
    v_NK: Tensor


def split(weight_MN: Tensor, k: int, *, method: Literal["gram", "svd"] = "gram") -> Split:
    """Return the top ``k`` singular triplets of a weight and its whole spectrum.

    ``gram`` (default) takes the eigenvectors of the Gram matrix of the short side in float64 and derives
    the long side, ``U = W V / S``: about a tenth of the work of a full SVD, and exact to 1e-11 where a
    float32 SVD is exact to 2e-4. Forming the Gram matrix squares the condition number, so directions whose
    singular value is below about 1e-4 of the largest cannot be derived that way; when ``k`` reaches that
    far (rank-deficient and zero matrices) the full SVD is taken instead. A random projection is no
    alternative: at these ranks it finds another subspace.

    Args:
        weight_MN: a matrix of any float dtype, on any device.
        k: how many directions to return, 0 <= k <= min(M, N).
        method: ``gram`` or ``svd`` (the cross-check).

    Raises:
        LoricaError: the weight holds NaN or inf, or k is out of range.
        ValueError: an unknown method, or not a matrix.

    Source:
        arXiv 2504.07097, section 3: the split before each task.
    """
    if method not in ("gram", "svd"):
        raise ValueError(f"split method {method!r} is unknown; known: gram, svd")
    if weight_MN.dim() != 2:
        raise ValueError(f"split needs a matrix, got shape {tuple(weight_MN.shape)}")
    if not 0 <= k <= min(weight_MN.shape):
        raise LoricaError(f"k = {k} is out of range for a {_by(weight_MN)} weight: 0 to {min(weight_MN.shape)}")
    if not bool(torch.isfinite(weight_MN).all()):
        raise LoricaError(f"the {_by(weight_MN)} weight holds NaN or inf; it cannot be split")
    w_MN = weight_MN.detach().double()
    scale = w_MN.abs().max()
    if scale > 0:  # the Gram matrix of entries near 1e-200 or 1e200 would under- or overflow
        w_MN = w_MN / scale
    result = _split_svd(w_MN, k) if method == "svd" else _split_gram(w_MN, k)
    return Split(result.u_MK, result.sigma_S * scale, result.v_NK)


def singular_values(weight_MN: Tensor) -> Tensor:
    """Return all singular values of a weight, descending, in float64."""
    return split(weight_MN, 0).sigma_S


POINTS = 64
"""So many singular values are kept of a spectrum that is only to be drawn."""


def spectrum_points(sigma_S: Tensor, most: int = POINTS) -> dict[str, list[Any]]:
    """Return at most ``most`` singular values at even distances, the first and the last among them.

    Returns:
        ``index``: which ones, counted from 0; ``sigma``: their values, six digits.
    """
    last = len(sigma_S) - 1
    count = min(most, last + 1)
    index = sorted({round(last * i / max(count - 1, 1)) for i in range(count)})
    return {"index": index, "sigma": [float(f"{sigma_S[i].item():.6g}") for i in index]}


def _by(weight: Tensor) -> str:
    return " x ".join(str(size) for size in weight.shape)


def _split_gram(w_MN: Tensor, k: int) -> Split:
    wide = w_MN.shape[0] < w_MN.shape[1]
    long_by_short = w_MN.T if wide else w_MN
    eigenvalues, vectors = torch.linalg.eigh(long_by_short.T @ long_by_short)
    sigma_S = eigenvalues.flip(0).clamp_min(0).sqrt()
    short = vectors.flip(1)[:, :k].contiguous()
    long = long_by_short @ short / sigma_S[:k].clamp_min(torch.finfo(torch.float64).tiny)
    if not is_orthonormal(long):
        return _split_svd(w_MN, k)
    return Split(short, sigma_S, long) if wide else Split(long, sigma_S, short)


def _split_svd(w_MN: Tensor, k: int) -> Split:
    driver = "gesvd" if w_MN.is_cuda else None  # CUDA's default, gesvdj, loses accuracy above 2048
    u_MS, sigma_S, vh_SN = torch.linalg.svd(w_MN, full_matrices=False, driver=driver)
    return Split(u_MS[:, :k].contiguous(), sigma_S, vh_SN[:k].T.contiguous())


def is_orthonormal(basis_DK: Tensor, tolerance: float = ORTHONORMALITY) -> bool:
    """Return whether the columns are orthonormal to ``tolerance``, entry by entry."""
    gram_KK = basis_DK.T @ basis_DK
    gram_KK.diagonal().sub_(1)
    return gram_KK.numel() == 0 or bool(gram_KK.abs().max() <= tolerance)


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
    x, sigma, yh = torch.linalg.svd(basis_DK[:k])
    polar_KK = x @ yh
    y_DK = -basis_DK.clone()
    y_DK[:k] -= polar_KK
    gram_KK = 2 * (torch.eye(k, dtype=basis_DK.dtype, device=basis_DK.device) + (yh.T * sigma) @ yh)
    lower_KK = torch.linalg.cholesky(gram_KK)
    return torch.linalg.solve_triangular(lower_KK, y_DK.T, upper=False).T.contiguous()


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
    u, sigma, _ = torch.linalg.svd(stacked, full_matrices=False)
    return u[:, sigma > tolerance].contiguous()
