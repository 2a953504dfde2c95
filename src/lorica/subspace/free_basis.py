"""The cheapest basis of what a set of protected directions leaves free."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorica.subspace.basis import Basis, Everything, Explicit, Reflector
from lorica.subspace.derived import read_off
from lorica.subspace.orthonormal import complement, reflector


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


def _values(form: Callable[[Tensor], Tensor], protected_DK: Tensor, columns: int) -> Tensor:
    """Return a form of the directions, without values where they have none."""
    return protected_DK.new_empty(protected_DK.shape[0], columns) if protected_DK.is_meta else form(protected_DK)
