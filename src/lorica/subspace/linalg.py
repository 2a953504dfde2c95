"""The split of a weight into its singular directions: pure functions on tensors.

Shape suffixes: M output rows, N input columns, S = min(M, N), D either dimension, K protected directions.
Everything is computed in float64; the caller rounds once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lorica.errors import LoricaError
from lorica.subspace.orthonormal import is_orthonormal
from lorica.subspace.resplit import Eigen, misfit, refreshed, symmetric_product

ROWS = 1024
"""So many rows of a weight are converted to float64 at a time: no float64 copy of the whole weight is made."""


Pair = tuple[Tensor, Tensor]
"""Directions of one weight's outputs (M x A) and inputs (N x B)."""


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


@dataclass(frozen=True)
class HalfSplit:
    """All that is not cheap in the split of one weight: the other half follows, for any k, from ``U = W V / S``.

    Attributes:
        sigma_S: all singular values, descending, float64.
        short_SS: all singular vectors of the short side in columns, float64, contiguous. That is V of a tall or
            square weight (M >= N) and U of a wide one.
    """

    sigma_S: Tensor
    short_SS: Tensor


def split(weight_MN: Tensor, k: int, *, method: Literal["gram", "svd"] = "gram") -> Split:
    """Return the top ``k`` singular triplets of a weight and its whole spectrum.

    ``gram`` (default) takes the eigenvectors of the Gram matrix of the short side in float64 and derives
    the long side, ``U = W V / S``: about a tenth of the work of a full SVD, and exact to 1e-11 where a
    float32 SVD is exact to 2e-4. Forming the Gram matrix squares the condition number, so directions whose
    singular value is below about 1e-4 of the largest cannot be derived that way; when ``k`` reaches that
    far (rank-deficient and zero matrices) the full SVD is taken instead. A random projection is no
    alternative: at these ranks it finds another subspace.

    The work is done on the GPU where there is one with room, otherwise where the weight is, with all the threads
    that torch has. Beside the results, ``gram`` holds four S x S matrices (two are the eigensolver's own) and
    ``ROWS`` rows in float64; there is no float64 copy of the weight.

    Args:
        weight_MN: a matrix of any float dtype, on any device; the results are on the same.
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
    check_count(weight_MN, k)
    return _split_svd(weight_MN, k) if method == "svd" else whole_split(weight_MN, half_split(weight_MN), k)


def check_count(weight_MN: Tensor, k: int) -> None:
    """Raise unless the weight is a matrix and has k directions."""
    if weight_MN.dim() != 2:
        raise ValueError(f"split needs a matrix, got shape {tuple(weight_MN.shape)}")
    if not 0 <= k <= min(weight_MN.shape):
        raise LoricaError(f"k = {k} is out of range for a {_by(weight_MN)} weight: 0 to {min(weight_MN.shape)}")


def half_split(weight_MN: Tensor, old_SS: Tensor | None = None) -> HalfSplit:
    """Return the spectrum of a weight and the singular vectors of its short side.

    Args:
        weight_MN: a matrix of any float dtype.
        old_SS: ``short_SS`` of a weight that this one may have grown out of, most of its directions protected (see
            ``refreshed``). A wrong one costs a moment and changes nothing.

    Raises:
        LoricaError: the weight holds NaN or inf.
    """
    scale, at_work = _largest(weight_MN), _at_work(weight_MN)
    gram_SS = _gram(at_work, scale)
    eigen = None if old_SS is None else refreshed(gram_SS, old_SS.to(gram_SS))
    if eigen is None:
        values, vectors = torch.linalg.eigh(gram_SS)
        eigen = Eigen(values.flip(0), vectors.flip(1).contiguous())
    sigma_S = eigen.values_S.clamp_min(0).sqrt() * scale
    return HalfSplit(sigma_S.to(weight_MN.device), eigen.vectors_SS.to(weight_MN.device))


def whole_split(weight_MN: Tensor, half: HalfSplit, k: int) -> Split:
    """Return the top k triplets of a weight, given its half split; by the full SVD where they do not follow from it."""
    at_work = _at_work(weight_MN)
    short = half.short_SS[:, :k].contiguous()
    basis, sigma = short.to(at_work.device), half.sigma_S[:k].to(at_work.device)
    long = _image(at_work, basis).div_(sigma.clamp_min(torch.finfo(torch.float64).tiny))
    if not is_orthonormal(long):
        return _split_svd(weight_MN, k)
    long = long.to(weight_MN.device)
    return Split(short, half.sigma_S, long) if _is_wide(weight_MN) else Split(long, half.sigma_S, short)


def is_split_of(half: HalfSplit, weight_MN: Tensor, tolerance: float = 1e-9) -> bool:
    """Return whether a half split of fitting shape is that of this weight, at the cost of a few thin products.

    It is measured, see ``misfit``: neither of the two norms may exceed ``tolerance``.
    """
    scale, at_work = _largest(weight_MN), _at_work(weight_MN)

    def gram(x_SP: Tensor) -> Tensor:
        return torch.stack([rows.T @ (rows @ x_SP) for _, rows in _rows(at_work, scale)]).sum(0)

    values = (half.sigma_S / scale).square()
    return max(misfit(gram, Eigen(values.to(at_work.device), half.short_SS.to(at_work.device)))) <= tolerance


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


def _is_wide(weight_MN: Tensor) -> bool:
    return weight_MN.shape[0] < weight_MN.shape[1]


def _largest(weight_MN: Tensor) -> float:
    """Return the largest entry, 1 for a zero weight: the Gram matrix of 1e-200 or 1e200 would under- or overflow."""
    low, high = (float(end) for end in weight_MN.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise LoricaError(f"the {_by(weight_MN)} weight holds NaN or inf; it cannot be split")
    return max(-low, high) or 1.0


def _rows(weight_MN: Tensor, scale: float = 1.0) -> Iterator[tuple[slice, Tensor]]:
    """Yield the weight along its long side, ``ROWS`` at a time, in float64 and divided by ``scale``."""
    long_by_short = weight_MN.T if _is_wide(weight_MN) else weight_MN
    for start in range(0, len(long_by_short), ROWS):
        where = slice(start, start + ROWS)
        yield where, long_by_short[where].to(torch.float64, copy=True).div_(scale)


def _gram(weight_MN: Tensor, scale: float) -> Tensor:
    size = min(weight_MN.shape)
    result = torch.zeros(size, size, dtype=torch.float64, device=weight_MN.device)
    for _, rows in _rows(weight_MN, scale):
        result += symmetric_product(rows, rows)
    return result


def _image(weight_MN: Tensor, basis_SK: Tensor) -> Tensor:
    result = basis_SK.new_empty(max(weight_MN.shape), basis_SK.shape[1])
    for where, rows in _rows(weight_MN):
        torch.mm(rows, basis_SK, out=result[where])
    return result


def _at_work(weight_MN: Tensor) -> Tensor:
    """Return a weight in host memory on the GPU, where there is one with room for its split; any other as it is."""
    weight_MN = weight_MN.detach()
    if weight_MN.device.type != "cpu" or not torch.cuda.is_available():
        return weight_MN
    short, long = sorted(weight_MN.shape)
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free = torch.cuda.mem_get_info()[0] + cached
    needed = weight_MN.nbytes + 8 * (6 * short**2 + 2 * short * long)
    return weight_MN.cuda() if needed <= free else weight_MN


def _split_svd(weight_MN: Tensor, k: int) -> Split:
    scale = _largest(weight_MN)
    w_MN = _at_work(weight_MN).to(torch.float64, copy=True).div_(scale)
    driver = "gesvd" if w_MN.is_cuda else None  # CUDA's default, gesvdj, loses accuracy above 2048
    u_MS, sigma_S, vh_SN = torch.linalg.svd(w_MN, full_matrices=False, driver=driver)
    parts = (u_MS[:, :k].contiguous(), sigma_S * scale, vh_SN[:k].T.contiguous())
    return Split(*(part.to(weight_MN.device) for part in parts))
