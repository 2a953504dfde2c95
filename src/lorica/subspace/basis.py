"""Bases of the free directions of one side of a weight, in the form that costs least.

A side of dimension D with K protected directions leaves F = D - K free. Each kind below is an orthonormal
D x F matrix Q that only differs in how it is stored; none of them is ever a branch for the caller.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class Basis(nn.Module):
    """An orthonormal basis Q (D x F) of the free directions of one side.

    Attributes:
        dim: D.
        free: F = D - K.
        shared: whether several layers that get the same input hold this one object.
    """

    shared = False

    def __init__(self, dim: int, free: int) -> None:
        super().__init__()
        self.dim = dim
        self.free = free

    def on(self, weight_DS: Tensor) -> Basis:
        """Return a basis that can be multiplied by; ``weight_DS`` is the weight, with this side's dimension first."""
        return self

    def mapped(self, form: Callable[[Tensor], Tensor]) -> Self:
        """Return this basis with a function applied to each of its stored tensors, such as one that moves them."""
        twin = copy.copy(self)
        twin._buffers = {name: form(buffer) for name, buffer in self.named_buffers(recurse=False)}
        return twin

    def reduce(self, rows: Tensor) -> Tensor:
        """Return ``rows Q``: (..., D) to (..., F), in the dtype of ``rows``."""
        raise NotImplementedError

    def expand(self, rows: Tensor) -> Tensor:
        """Return ``rows Q^T``: (..., F) to (..., D), in the dtype of ``rows``."""
        raise NotImplementedError

    def reduce_columns(self, columns: Tensor) -> Tensor:
        """Return ``Q^T columns``: (D, ...) to (F, ...), laid out in rows; ``reduce`` of the transpose would not be."""
        raise NotImplementedError

    def expand_columns(self, columns: Tensor) -> Tensor:
        """Return ``Q columns``: (F, ...) to (D, ...), laid out in rows."""
        raise NotImplementedError

    def flops(self) -> int:
        """Floating point operations of each of these four for one row or column."""
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

    def reduce_columns(self, columns: Tensor) -> Tensor:
        return columns

    def expand_columns(self, columns: Tensor) -> Tensor:
        return columns

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

    def reduce_columns(self, columns: Tensor) -> Tensor:
        return self.q_DF.to(columns.dtype).T @ columns

    def expand_columns(self, columns: Tensor) -> Tensor:
        return self.q_DF.to(columns.dtype) @ columns

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
        k, flat = z_DK.shape[1], rows.reshape(-1, self.dim)
        reduced = torch.addmm(flat[:, k:], flat @ z_DK, z_DK[k:].T, alpha=-2)
        return reduced.view(*rows.shape[:-1], self.free)

    def expand(self, rows: Tensor) -> Tensor:
        z_DK = self.z_DK.to(rows.dtype)
        k = z_DK.shape[1]
        result = -2 * (rows @ z_DK[k:]) @ z_DK.T
        result[..., k:] += rows
        return result

    def reduce_columns(self, columns: Tensor) -> Tensor:
        z_DK = self.z_DK.to(columns.dtype)
        k = z_DK.shape[1]
        return torch.addmm(columns[k:], z_DK[k:], z_DK.T @ columns, alpha=-2)

    def expand_columns(self, columns: Tensor) -> Tensor:
        z_DK = self.z_DK.to(columns.dtype)
        k = z_DK.shape[1]
        result = z_DK @ (z_DK[k:].T @ columns).mul_(-2)
        result[k:] += columns
        return result

    def flops(self) -> int:
        return 2 * self.z_DK.shape[1] * (self.dim + self.free)

    def matrix(self) -> Tensor:
        return self.reduce(torch.eye(self.dim, dtype=self.z_DK.dtype, device=self.z_DK.device))
