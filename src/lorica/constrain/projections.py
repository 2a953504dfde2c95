"""Feasible sets that are given by directions: per weight, scaled, or over all weights together.

Each keeps the weight W0 that it was made at, and constrains the change since: taken as W - W0 first and
projected then, it is exact to the rounding of the change, not of the weight, and does not drift with the steps.

Shape suffixes: M output rows, N input columns, A / B protected output / input directions, K directions,
P numbers of all weights together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorica.constrain.accumulate import FlatBasis
from lorica.constrain.optimizer import WeightConstraint
from lorica.subspace.sources import Protected


class Sides:
    """``U^T (W - W0) = 0`` and ``(W - W0) V = 0``; a side without directions is free.

        project(G) = (I - U U^T) G (I - V V^T)        retract(W) = W0 + project(W - W0)

    Both are orthogonal projections in the Frobenius norm.

    Args:
        weight_MN: W0, (out, in). It is kept, not copied: do not train this very tensor.
        directions: U and V, orthonormal columns.
        transposed: gradients and weights come as (in, out), as GPT-2's ``Conv1D`` stores them.
    """

    def __init__(self, weight_MN: Tensor, directions: Protected, *, transposed: bool = False) -> None:
        self.base_MN = weight_MN
        self.u_MA, self.v_NB = (side.to(weight_MN) for side in directions)
        self.transposed = transposed

    def project(self, gradient: Tensor) -> Tensor:
        return self._stored(self._free(self._stored(gradient)))

    def retract(self, weight: Tensor) -> Tensor:
        return self._stored(self.base_MN + self._free(self._stored(weight) - self.base_MN))

    def _free(self, d_MN: Tensor) -> Tensor:
        d_MN = d_MN - self.u_MA @ (self.u_MA.T @ d_MN)
        return d_MN - (d_MN @ self.v_NB) @ self.v_NB.T

    def _stored(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight


class SidesBlock(Sides):
    """``U^T (W - W0) V = 0``, what ``Block`` holds: only the product of the two sides is constrained.

    project(G) = G - U (U^T G V) V^T        retract(W) = W0 + project(W - W0)
    """

    def _free(self, d_MN: Tensor) -> Tensor:
        return d_MN - self.u_MA @ (self.u_MA.T @ d_MN @ self.v_NB) @ self.v_NB.T


class GradientOnly:
    """A constraint that only gradients obey: what AdamW then does to the weights stays.

    It holds exactly for an optimizer that steps along its gradients, such as SGD, and for no element-wise one.
    """

    def __init__(self, constraint: WeightConstraint) -> None:
        self.constraint = constraint

    def project(self, gradient: Tensor) -> Tensor:
        return self.constraint.project(gradient)

    def retract(self, weight: Tensor) -> Tensor:
        return weight


class ScaledGradient:
    """``G <- G - G V diag(s) V^T``: each input direction keeps the share 1 - s of its gradient.

    With s = 1 it is the gradient's projection off V. There is no set of weights to put them back on.

    Args:
        v_NK: V, orthonormal columns, in the dtype of the weight.
        share_K: s, 0 (free) to 1 (held).
        transposed: as for :class:`Sides`.
    """

    def __init__(self, v_NK: Tensor, share_K: Tensor, *, transposed: bool = False) -> None:
        self.v_NK, self.share_K, self.transposed = v_NK, share_K, transposed

    def project(self, gradient: Tensor) -> Tensor:
        if self.transposed:
            return gradient - (self.v_NK * self.share_K) @ (self.v_NK.T @ gradient)
        return gradient - (gradient @ self.v_NK * self.share_K) @ self.v_NK.T

    def retract(self, weight: Tensor) -> Tensor:
        return weight


class ScaledStep:
    """The same scaling, of what the optimizer does with a gradient instead of the gradient itself."""

    def __init__(self, parameter: nn.Parameter, scaling: ScaledGradient) -> None:
        self.parameter, self.scaling = parameter, scaling
        self._before: Tensor | None = None

    def project(self, gradient: Tensor) -> Tensor:
        self._before = self.parameter.detach().clone()
        return gradient

    def retract(self, weight: Tensor) -> Tensor:
        if self._before is None:  # no gradient, no step
            return weight
        before, self._before = self._before, None
        return before + self.scaling.project(weight - before)


class Flat:
    """``B^T (w - w0) = 0`` for the weights of several layers, flattened and laid end to end.

        project(g) = g - B B^T g        retract(w) = w0 + project(w - w0)

    Args:
        parameters: by name, w; a copy of each is kept as w0.
        basis: B, with a part for each of these names and no other.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], basis: FlatBasis) -> None:
        self.parameters = list(parameters.values())
        self.parts = [basis.parts[name].to(parameter) for name, parameter in parameters.items()]
        self.base = [parameter.detach().clone() for parameter in self.parameters]

    def project(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        pairs = list(zip(self.parts, gradients, strict=True))
        along_K = torch.stack([(part @ g.flatten()).double() for part, g in pairs]).sum(0)
        return [g - (along_K.to(part) @ part).view_as(g) for part, g in pairs]

    def retract(self, weights: Sequence[Tensor]) -> list[Tensor]:
        changes = self.project([w - old for w, old in zip(weights, self.base, strict=True)])
        return [old + change for old, change in zip(self.base, changes, strict=True)]
