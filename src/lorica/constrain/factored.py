"""The factored form of a weight, as the paper writes it: a frozen product and one that trains.

Shape suffixes: M output rows, N input columns, K protected directions, R = min(M, N) - K free ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.constrain.linear import matrix_of
from lorica.subspace.linalg import split
from lorica.subspace.sources import Protected

START = ("u_high", "v_high", "u_low", "s_low", "v_low", "high_MN")


class FactoredLinear(nn.Module):
    """A linear layer that trains the factors of the lower part of its weight's singular value decomposition.

        W = W_high + U_low diag(S_low) V_low^T        y = x W^T + b

    U_low (M x R), S_low (R) and V_low (N x R) are the parameters; W is built anew in each forward pass, so a step
    costs more time and memory than a plain layer's. Nothing here constrains the factors: see ``osft-factored``.

    Args:
        plain: ``nn.Linear`` or GPT-2's ``Conv1D``, float32 or float64; its bias is shared.
        k: protected directions, 0 to min(M, N).
        start: of an interrupted run that this one goes on with; nothing is split then.

    Attributes:
        start: the tensors that it began with, which training leaves alone.
        protected: U_high (M x K) and V_high (N x K).
    """

    high_MN: Tensor
    bias: nn.Parameter | None

    def __init__(self, plain: nn.Module, k: int, start: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        weight_MN = matrix_of(plain).detach()
        self._plain = (plain,)  # in a tuple: not a submodule
        self.out_features, self.in_features = weight_MN.shape
        self.start = factors(weight_MN, k) if start is None else {name: start[name].to(weight_MN) for name in START}
        self.protected = Protected(self.start["u_high"], self.start["v_high"])
        self.u_low, self.s_low, self.v_low = (
            nn.Parameter(self.start[name].clone()) for name in ("u_low", "s_low", "v_low")
        )
        self.register_buffer("high_MN", self.start["high_MN"], persistent=False)
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
        return product(self.u_low, self.s_low, self.v_low)

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


def factors(weight_MN: Tensor, k: int) -> dict[str, Tensor]:
    """Return the tensors named in ``START``: the singular triplets above and below k, and W less the lower ones.

    All are in the dtype of the weight and laid out in rows. The difference is that to the rounded factors, so that
    a layer starts at the weight that came in to one rounding.
    """
    parts = split(weight_MN, min(weight_MN.shape), method="svd")
    u_MS, sigma_S, v_NS = (part.to(weight_MN) for part in (parts.u_MK, parts.sigma_S, parts.v_NK))
    low = (u_MS[:, k:], sigma_S[k:], v_NS[:, k:])
    high_MN = (weight_MN.double() - product(*low)).to(weight_MN)
    named = zip(START, (u_MS[:, :k], v_NS[:, :k], *low, high_MN), strict=True)
    return {name: part.contiguous() for name, part in named}


def product(u_MR: Tensor, s_R: Tensor, v_NR: Tensor) -> Tensor:
    """Return ``U diag(s) V^T`` in float64."""
    return (u_MR.double() * s_R.double()) @ v_NR.double().T
