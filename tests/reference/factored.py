"""The paper's factored form of OSFT, transcribed literally and slowly: an oracle, not an implementation.

Shape suffixes: M output rows, N input columns, K protected directions, R = min(M, N) - K free ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FactoredLinear(nn.Module):
    """A linear layer whose weight is kept as two products, of which only the second trains.

        W = U_high diag(S_high) V_high^T + U_low diag(S_low) V_low^T

    The split is the singular value decomposition of the weight, cut after K directions. ``U_low``, ``S_low``
    and ``V_low`` are parameters. Hooks project their gradients away from the frozen part:

        dU_low <- dU_low - U_high (U_high^T dU_low)        dV_low <- dV_low - V_high (V_high^T dV_low)

    ``S_low`` needs no projection. The columns of ``U_low`` and ``V_low`` are not orthonormal any more after
    the first step, and nothing here makes them so. The hooks are the whole constraint: it holds exactly for
    an optimizer that steps along its gradients, such as SGD, and for no element-wise one.

    Source:
        arXiv 2504.07097, sections 3.1 and 3.2.
    """

    def __init__(self, weight_MN: Tensor, k: int, bias: Tensor | None = None) -> None:
        super().__init__()
        u, s, vh = torch.linalg.svd(weight_MN.detach(), full_matrices=False)
        self.u_high, self.s_high, self.v_high = u[:, :k], s[:k], vh[:k].T
        self.u_low, self.s_low, self.v_low = (nn.Parameter(part.clone()) for part in (u[:, k:], s[k:], vh[k:].T))
        self.bias = bias
        self.u_low.register_hook(lambda grad: grad - self.u_high @ (self.u_high.T @ grad))
        self.v_low.register_hook(lambda grad: grad - self.v_high @ (self.v_high.T @ grad))

    @property
    def weight(self) -> Tensor:
        """W (M x N), rebuilt from the factors."""
        frozen = self.u_high @ torch.diag(self.s_high) @ self.v_high.T
        return frozen + self.u_low @ torch.diag(self.s_low) @ self.v_low.T

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
