"""A basis that is not stored but read off the weight whose singular directions it leaves out."""

from __future__ import annotations

import torch
from torch import Tensor

from lorica.subspace.basis import Basis


class Derived(Basis):
    """Reflector's Q, its Z read off the weight A (D x S) itself: K x (K + S) numbers instead of D x K.

    Singular directions of A are U = A A^+ U, so that Z = Y L^-T of ``orthonormal.reflector`` is

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
