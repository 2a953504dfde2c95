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

from lorica.subspace.linalg import complement, reflector


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


class Derived(Basis):
    """Reflector's Q, its Z read off the weight A (D x S) itself: K x (K + S) numbers instead of D x K.

    Singular directions of A are U = A A^+ U, so that Z = Y L^-T of ``linalg.reflector`` is

        Z = [H; 0] + A B        H = -P L^-T        B = -A^+ U L^-T

    A may be the weight that came in or any that the constraint let it become: A^T U, and so A B, stays the same.
    The form for the long side of a weight, D > K + S.
    """

    head_KK: Tensor
    tail_SK: Tensor

    def __init__(self, head_KK: Tensor, tail_SK: Tensor, dim: int) -> None:
        super().__init__(dim, dim - head_KK.shape[0])
        self.register_buffer("head_KK", head_KK, persistent=False)
        self.register_buffer("tail_SK", tail_SK, persistent=False)

    def on(self, weight_DS: Tensor) -> Basis:
        return _ReadOff(self, weight_DS)

    def flops(self) -> int:
        s, k = self.tail_SK.shape
        return 2 * (k * k + 2 * s * k + s * (self.dim + self.free))


class _ReadOff(Basis):
    """``Derived`` together with the weight that it is read off."""

    def __init__(self, parts: Derived, weight_DS: Tensor) -> None:
        super().__init__(parts.dim, parts.free)
        self._parts = (parts, weight_DS)  # in a tuple: neither a submodule nor a parameter of this one

    def _cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        parts, weight_DS = self._parts
        return parts.head_KK.to(dtype), parts.tail_SK.to(dtype), weight_DS.to(dtype)

    def reduce(self, rows: Tensor) -> Tensor:
        head_KK, tail_SK, weight_DS = self._cast(rows.dtype)
        k = head_KK.shape[0]
        along = rows[..., :k] @ head_KK + (rows @ weight_DS) @ tail_SK
        return rows[..., k:] - 2 * (along @ tail_SK.T) @ weight_DS[k:].T

    def expand(self, rows: Tensor) -> Tensor:
        head_KK, tail_SK, weight_DS = self._cast(rows.dtype)
        k = head_KK.shape[0]
        along = (rows @ weight_DS[k:]) @ tail_SK
        result = -2 * (along @ tail_SK.T) @ weight_DS.T
        result[..., :k] -= 2 * along @ head_KK.T
        result[..., k:] += rows
        return result

    def reduce_columns(self, columns: Tensor) -> Tensor:
        head_KK, tail_SK, weight_DS = self._cast(columns.dtype)
        k = head_KK.shape[0]
        along = torch.addmm(head_KK.T @ columns[:k], tail_SK.T, weight_DS.T @ columns)
        return torch.addmm(columns[k:], weight_DS[k:], tail_SK @ along, alpha=-2)

    def expand_columns(self, columns: Tensor) -> Tensor:
        head_KK, tail_SK, weight_DS = self._cast(columns.dtype)
        k = head_KK.shape[0]
        along = (tail_SK.T @ (weight_DS[k:].T @ columns)).mul_(-2)
        result = weight_DS @ (tail_SK @ along)
        result[:k] += head_KK @ along
        result[k:] += columns
        return result

    def flops(self) -> int:
        return self._parts[0].flops()

    def matrix(self) -> Tensor:
        parts, weight_DS = self._parts
        return self.reduce(torch.eye(self.dim, dtype=parts.head_KK.dtype, device=weight_DS.device))


DERIVED_ERROR = 1e-6
"""Largest relative error of a Z that is read off the weight: directions of small singular values drown in rounding."""

READABLE = (1e-20, 1e20)
"""Singular values of a weight that Z can be read off: products with others under- or overflow in float32."""


def free_basis(protected_DK: Tensor, dtype: torch.dtype, weight_DS: Tensor | None = None) -> Basis:
    """Return the cheapest basis of the complement of the given directions.

    It depends on the protected subspace alone, not on the signs or the order of its columns.

    Args:
        protected_DK: orthonormal columns, float64. K = 0 constrains nothing. On the meta device only the form
            of the basis is made, without values.
        dtype: of the stored numbers; float32, or float64 for float64 weights. The constraint is exact to
            the rounding of this dtype, which is why float16 and bfloat16 are no choice.
        weight_DS: the weight that these are singular directions of, this side first: allows ``Derived``, where that
            is smaller and, measured, exact to ``DERIVED_ERROR``.
    """
    dim, k = protected_DK.shape
    if k == 0:
        return Everything(dim)
    if k >= dim - k:
        return Explicit(_values(complement, protected_DK, dim - k).to(dtype))
    z_DK = _values(reflector, protected_DK, k)
    smaller = weight_DS is not None and k + weight_DS.shape[1] < dim
    derived = read_off(protected_DK, z_DK, weight_DS, dtype) if weight_DS is not None and smaller else None
    return derived or Reflector(z_DK.to(dtype))


def read_off(protected_DK: Tensor, z_DK: Tensor, weight_DS: Tensor, dtype: torch.dtype) -> Derived | None:
    """Return the ``Derived`` basis whose Z is ``z_DK``, or None where it would not be exact enough.

    From Z and U alone, H U = [-P; 0] gives P and Z^T Y = L^T gives L.
    """
    dim, k = protected_DK.shape
    if protected_DK.is_meta:
        blank = torch.empty(0, dtype=dtype, device="meta")
        return Derived(blank.new_empty(k, k), blank.new_empty(weight_DS.shape[1], k), dim)
    minus_p_KK = protected_DK[:k] - 2 * z_DK[:k] @ (z_DK.T @ protected_DK)
    upper_KK = z_DK[:k].T @ minus_p_KK - z_DK.T @ protected_DK
    pulled_SK = weight_DS.double().T @ protected_DK
    scale = pulled_SK.square().sum(0)
    if not bool(((scale >= READABLE[0] ** 2) & (scale <= READABLE[1] ** 2)).all()):
        return None
    parts = (minus_p_KK, -pulled_SK / scale)
    head, tail = (torch.linalg.solve_triangular(upper_KK, part, upper=True, left=False).to(dtype) for part in parts)
    error_DK = weight_DS.to(dtype) @ tail
    error_DK[:k] += head
    error_DK -= z_DK.to(dtype)
    exact = bool(error_DK.norm() <= DERIVED_ERROR * z_DK.norm())
    return Derived(head, tail, dim) if exact else None


def _values(form: Callable[[Tensor], Tensor], protected_DK: Tensor, columns: int) -> Tensor:
    """Return a form of the directions, without values where they have none."""
    return protected_DK.new_empty(protected_DK.shape[0], columns) if protected_DK.is_meta else form(protected_DK)
