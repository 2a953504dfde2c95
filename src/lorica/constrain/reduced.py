"""The gradient of a weight in reduced coordinates, without the dense gradient where that is cheaper.

Shape suffixes: T tokens, M output rows, N input columns, P / Q free output / input directions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.subspace.basis import Basis

ORDERS = ("input-first", "output-first", "both", "dense")
"""Ways to associate the product ``Q_U^T (dY^T X) Q_V``."""


def order_flops(tokens: int, out: Basis, inp: Basis) -> dict[str, int]:
    """Return the floating point operations of each order of products for a batch of ``tokens`` rows."""
    m, n, p, q = out.dim, inp.dim, out.free, inp.free
    return {
        "input-first": tokens * (inp.flops() + 2 * m * q) + q * out.flops(),
        "output-first": tokens * (out.flops() + 2 * p * n) + p * inp.flops(),
        "both": tokens * (out.flops() + inp.flops() + 2 * p * q),
        "dense": tokens * 2 * m * n + m * inp.flops() + q * out.flops(),
    }


def core_gradient(dy_TM: Tensor, x_TN: Tensor, out: Basis, inp: Basis, order: str | None = None) -> Tensor:
    """Return ``Q_U^T (dY^T X) Q_V`` (P x Q), in the order of products with the fewest operations.

    Args:
        dy_TM: gradient of the layer's output.
        x_TN: the layer's input.
        out: Q_U.
        inp: Q_V.
        order: one of ``ORDERS``; None chooses by counted operations.
    """
    if order is None:
        costs = order_flops(x_TN.shape[0], out, inp)
        order = min(costs, key=costs.__getitem__)
    if order == "input-first":
        return out.reduce((dy_TM.T @ inp.reduce(x_TN)).T).T
    if order == "output-first":
        return inp.reduce(out.reduce(dy_TM).T @ x_TN)
    if order == "both":
        return out.reduce(dy_TM).T @ inp.reduce(x_TN)
    return out.reduce(inp.reduce(dy_TM.T @ x_TN).T).T


def lift(core_PQ: Tensor, out: Basis, inp: Basis) -> Tensor:
    """Return ``Q_U M Q_V^T`` (M x N), the weight change that the reduced coordinates stand for."""
    if out.free * inp.flops() + inp.dim * out.flops() <= inp.free * out.flops() + out.dim * inp.flops():
        return out.expand(inp.expand(core_PQ).T).T
    return inp.expand(out.expand(core_PQ.T).T)


class ReducedLinear(torch.autograd.Function):
    """``y = x W^T + b`` whose backward pass returns dX and the gradient of the core, never of W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, core_PQ: Tensor, weight_MN: Tensor, bias: Tensor | None, out: Basis, inp: Basis
    ) -> Tensor:
        ctx.save_for_backward(x, weight_MN)
        ctx.out, ctx.inp = out, inp
        ctx.core_dtype = core_PQ.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, weight_MN, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_MN = ctx.saved_tensors
        # Under autocast the output, and so dY, is narrower than the saved input and weight.
        dx = (dy @ weight_MN.to(dy.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        dy_TM = dy.reshape(-1, dy.shape[-1])
        dcore = dbias = None
        if ctx.needs_input_grad[1]:
            x_TN = x.reshape(-1, x.shape[-1]).to(dy.dtype)
            dcore = core_gradient(dy_TM, x_TN, ctx.out, ctx.inp).to(ctx.core_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
            dbias = dy_TM.sum(0).to(ctx.bias_dtype)
        return dx, dcore, None, dbias, None, None
