"""The change of one tensor, without loss, in either direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from lorica.artefacts.bits import Unsigned, added, bits, difference, from_bits, pack, taken_off, unfolded, unpack
from lorica.artefacts.lowrank import EXPONENTS, Factors, factors
from lorica.errors import LoricaError


@dataclass(frozen=True)
class Change:
    """What leads from one tensor to another of the same dtype and shape, and back, bit for bit.

    With a prediction L of the change (``Factors``; none: L = 0) and ``bits`` the bit pattern as a whole number:

        P = round(before + L)        after = P + residual        (sum of bit patterns)
        P = after - residual         before = round(P - L) + undo

    L is exact in float64 and the two roundings are single IEEE operations per number, so P is the same wherever
    it is computed. ``undo`` is zero but where rounding lost something, mostly where P is in a higher binade than
    the number it came from. With L = 0 the residual is the plain difference and ``undo`` is zero.

    Attributes:
        residual: folded differences of bit patterns, flat.
        factors: L, or None.
        undo: the same as ``residual`` for the way back; None without factors.
    """

    residual: Unsigned
    factors: Factors | None = None
    undo: Unsigned | None = None

    @classmethod
    def between(cls, before: Tensor, after: Tensor) -> Self:
        """Return the change from one tensor to another of its dtype and shape."""
        found = factors(before, after)
        if found is None:
            return cls(difference(bits(after), bits(before)))
        predicted = _rounded(before, found)
        back = _rounded(predicted, found, -1)
        return cls(difference(bits(after), bits(predicted)), found, difference(bits(before), bits(back)))

    def after(self, before: Tensor) -> Tensor:
        """Return the tensor after the change."""
        predicted = before if self.factors is None else _rounded(before, self.factors)
        return from_bits(added(bits(predicted), self.residual), before)

    def before(self, after: Tensor) -> Tensor:
        """Return the tensor before the change."""
        predicted = from_bits(taken_off(bits(after), self.residual), after)
        if self.factors is None or self.undo is None:
            return predicted
        return from_bits(added(bits(_rounded(predicted, self.factors, -1)), self.undo), after)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the packed parts by name."""
        parts = {"residual": pack(self.residual)}
        if self.factors is not None and self.undo is not None:
            a, b = self.factors.a_MR, self.factors.b_NR
            zeros = [np.zeros(side.numel(), np.uint32) for side in (a, b)]
            parts["undo"] = pack(self.undo)
            parts["a"], parts["b"] = (pack(difference(bits(side), z)) for side, z in zip((a, b), zeros, strict=True))
            parts["grid"] = torch.tensor([a.shape[1], self.factors.exponent])
        return parts

    @classmethod
    def from_tensors(cls, parts: Mapping[str, Tensor], like: Tensor) -> Self:
        """Return the change whose packed parts these are.

        Args:
            parts: of ``to_tensors``.
            like: a tensor of the dtype and shape that change.

        Raises:
            LoricaError: the parts do not fit together.
        """
        flat = bits(like)
        residual = unpack(parts["residual"], flat.size, flat.itemsize)
        if "grid" not in parts:
            return cls(residual)
        r, exponent = parts["grid"].tolist()
        if like.dim() != 2 or not 0 < r <= min(like.shape) or exponent not in EXPONENTS:
            raise LoricaError(f"damaged: {r} directions, step 2^{exponent}, for a tensor of shape {tuple(like.shape)}")
        a, b = (_whole(parts[name], size, r) for name, size in zip("ab", like.shape, strict=True))
        return cls(residual, Factors(a, b, exponent), unpack(parts["undo"], flat.size, flat.itemsize))


def _whole(packed: Tensor, rows: int, columns: int) -> Tensor:
    return torch.from_numpy(unfolded(unpack(packed, rows * columns, 4)).view(np.int32)).reshape(rows, columns)


def _rounded(tensor: Tensor, change: Factors, sign: int = 1) -> Tensor:
    moved = tensor.double() + sign * change.matrix()
    # By way of float32, as a direct conversion to a narrow dtype may or may not do.
    return moved if tensor.dtype == torch.float64 else moved.float().to(tensor.dtype)
