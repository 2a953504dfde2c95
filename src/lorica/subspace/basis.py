"""Bases of the free directions of one side of a weight, in the form that costs least.

A side of dimension D with K protected directions leaves F = D - K free. Each kind below is an orthonormal
D x F matrix Q that only differs in how it is stored; none of them is ever a branch for the caller.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorica.subspace.linalg import complement, reflector


class Basis(nn.Module):
    """An orthonormal basis Q (D x F) of the free directions of one side.

    Attributes:
        dim: D.
        free: F = D - K.
    """

    def __init__(self, dim: int, free: int) -> None:
        super().__init__()
        self.dim = dim
        self.free = free

    def reduce(self, rows: Tensor) -> Tensor:
        """Return ``rows Q``: (..., D) to (..., F), in the dtype of ``rows``."""
        raise NotImplementedError

    def expand(self, rows: Tensor) -> Tensor:
        """Return ``rows Q^T``: (..., F) to (..., D), in the dtype of ``rows``."""
        raise NotImplementedError

    def flops(self) -> int:
        """Floating point operations of ``reduce`` or ``expand`` for one row."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """Return Q itself. Its size is D x F: for tests and pictures, not for training steps."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"dim={self.dim}, free={self.free}"


class Everything(Basis):
    """Q = I: this side is not constrained."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)

    def reduce(self, rows: Tensor) -> Tensor:
        return rows

    def expand(self, rows: Tensor) -> Tensor:
        return rows

    def flops(self) -> int:
        return 0

    def matrix(self) -> Tensor:
        return torch.eye(self.dim)


class Explicit(Basis):
    """Q stored as it is: D x F numbers. The cheaper form when most directions are protected."""

    q_DF: Tensor

    def __init__(self, q_DF: Tensor) -> None:
        super().__init__(*q_DF.shape)
        self.register_buffer("q_DF", q_DF, persistent=False)

    def reduce(self, rows: Tensor) -> Tensor:
        return rows @ self.q_DF.to(rows.dtype)

    def expand(self, rows: Tensor) -> Tensor:
        return rows @ self.q_DF.to(rows.dtype).T

    def flops(self) -> int:
        return 2 * self.dim * self.free

    def matrix(self) -> Tensor:
        return self.q_DF


class Reflector(Basis):
    """Q = the last F columns of ``I - 2 Z Z^T``: D x K numbers. The cheaper form when few are protected."""

    z_DK: Tensor

    def __init__(self, z_DK: Tensor) -> None:
        dim, k = z_DK.shape
        super().__init__(dim, dim - k)
        self.register_buffer("z_DK", z_DK, persistent=False)

    def reduce(self, rows: Tensor) -> Tensor:
        z_DK = self.z_DK.to(rows.dtype)
        k = z_DK.shape[1]
        return rows[..., k:] - 2 * (rows @ z_DK) @ z_DK[k:].T

    def expand(self, rows: Tensor) -> Tensor:
        z_DK = self.z_DK.to(rows.dtype)
        k = z_DK.shape[1]
        result = -2 * (rows @ z_DK[k:]) @ z_DK.T
        result[..., k:] += rows
        return result

    def flops(self) -> int:
        return 2 * self.z_DK.shape[1] * (self.dim + self.free)

    def matrix(self) -> Tensor:
        return self.reduce(torch.eye(self.dim, dtype=self.z_DK.dtype, device=self.z_DK.device))


def free_basis(protected_DK: Tensor, dtype: torch.dtype) -> Basis:
    """Return the cheapest basis of the complement of the given directions.

    It depends on the protected subspace alone, not on the signs or the order of its columns.

    Args:
        protected_DK: orthonormal columns, float64. K = 0 constrains nothing.
        dtype: of the stored numbers; float32, or float64 for float64 weights. The constraint is exact to
            the rounding of this dtype, which is why float16 and bfloat16 are no choice.
    """
    dim, k = protected_DK.shape
    if k == 0:
        return Everything(dim)
    if k < dim - k:
        return Reflector(reflector(protected_DK).to(dtype))
    return Explicit(complement(protected_DK).to(dtype))
