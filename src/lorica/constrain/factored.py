"""The factored form of a weight, as the paper writes it: a frozen product and one that trains.

Shape suffixes: M output rows, N input columns, K protected directions, R = min(M, N) - K free ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.constrain.linear import matrix_of
from lorica.subspace.linalg import split
from lorica.subspace.sources import Protected


class FactoredLinear(nn.Module):
    """A linear layer that trains the factors of the lower part of its weight's singular value decomposition.

        W = W_high + U_low diag(S_low) V_low^T        y = x W^T + b

    U_low (M x R), S_low (R) and V_low (N x R) are the parameters; W is built anew in each forward pass, so a step
    costs more time and memory than a plain layer's. Nothing here constrains the factors: see ``osft-factored``.

    Args:
        plain: ``nn.Linear`` or GPT-2's ``Conv1D``, float32 or float64; its bias is shared.
        k: protected directions, 0 to min(M, N).

    Attributes:
        protected: U_high (M x K) and V_high (N x K).
    """

    high_MN: Tensor
    bias: nn.Parameter | None

    def __init__(self, plain: nn.Module, k: int) -> None:
        super().__init__()
        weight_MN = matrix_of(plain).detach()
        parts = split(weight_MN, min(weight_MN.shape), method="svd")
        self._plain = (plain,)  # in a tuple: not a submodule
        self.out_features, self.in_features = weight_MN.shape
        self.protected = Protected(parts.u_MK[:, :k].to(weight_MN), parts.v_NK[:, :k].to(weight_MN))
        low = (parts.u_MK[:, k:], parts.sigma_S[k:], parts.v_NK[:, k:])
        self.u_low, self.s_low, self.v_low = (nn.Parameter(part.to(weight_MN, copy=True)) for part in low)
        # What the rounded factors leave, so that the layer starts at the weight that came in to one rounding.
        self.register_buffer("high_MN", (weight_MN.double() - self._low_MN()).to(weight_MN), persistent=False)
        self.register_parameter("bias", plain._parameters.get("bias"))
        self.train(plain.training)

    @property
    def weight(self) -> Tensor:
        """W (M x N), differentiable in the factors."""
        return self.high_MN + (self.u_low * self.s_low) @ self.v_low.T

    def before(self) -> Tensor:
        """Return the weight that came in (M x N)."""
        (plain,) = self._plain
        return matrix_of(plain).detach()

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return W, computed in float64 and rounded once."""
        return (self.high_MN.double() + self._low_MN()).to(self.high_MN)

    @torch.no_grad()
    def _low_MN(self) -> Tensor:
        return (self.u_low.double() * self.s_low.double()) @ self.v_low.double().T

    @torch.no_grad()
    def unwrap(self) -> nn.Module:
        """Return the plain layer that was factored, with the trained weight."""
        (plain,) = self._plain
        matrix_of(plain).copy_(self.dense())
        plain.train(self.training)
        return plain

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        k = self.protected.u_MA.shape[1]
        return f"in_features={self.in_features}, out_features={self.out_features}, protected={k}"
