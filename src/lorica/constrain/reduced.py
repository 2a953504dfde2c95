"""The gradient of a weight in reduced coordinates, without the dense gradient where that is cheaper.

Shape suffixes: T tokens, M output rows, N input columns, P / Q free output / input directions.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorica.subspace.basis import Basis, Everything

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


def cheapest(costs: dict[str, int]) -> str:
    """Return the order with the fewest operations. A loop, because torch.compile reads no ``min(..., key=...)``."""
    best = ORDERS[0]
    for order in ORDERS:
        if costs[order] < costs[best]:
            best = order
    return best


_products: weakref.WeakKeyDictionary[Basis, tuple[weakref.ref[Tensor], int, Tensor]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def shared_product(inp: Basis, x: Tensor) -> Tensor:
    """Return ``X Q_V`` of the input that several layers get one after the other; computed once, for the first.

    It is kept as long as that input lives, and by the layers for their backward pass, which then need the input itself
    no more.
    """
    source, version, product = _products.get(inp, (None, 0, x))
    if source is None or source() is not x or version != x._version:
        product = inp.reduce(x)
        drop = partial(_drop, weakref.ref(inp))
        _products[inp] = (weakref.ref(x, drop), x._version, product)
    return product


def _drop(inp: weakref.ref[Basis], source: weakref.ref[Tensor]) -> None:
    held = inp()
    if held is not None and _products.get(held, (None,))[0] is source:
        del _products[held]


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
        order = cheapest(order_flops(x_TN.shape[0], out, inp))
    if order == "input-first":
        return out.reduce_columns(dy_TM.T @ inp.reduce(x_TN))
    if order == "output-first":
        return inp.reduce(out.reduce(dy_TM).T @ x_TN)
    if order == "both":
        return out.reduce(dy_TM).T @ inp.reduce(x_TN)
    return out.reduce_columns(inp.reduce(dy_TM.T @ x_TN))


def lift(core_PQ: Tensor, out: Basis, inp: Basis) -> Tensor:
    """Return ``Q_U M Q_V^T`` (M x N), the weight change that the reduced coordinates stand for."""
    if out.free * inp.flops() + inp.dim * out.flops() <= inp.free * out.flops() + out.dim * inp.flops():
        return out.expand_columns(inp.expand(core_PQ))
    return inp.expand(out.expand_columns(core_PQ))


Across = Callable[[Tensor, Tensor, Tensor, tuple[Basis, Basis]], Callable[[], Tensor]]
"""Makes the gradient of a sharded core, of dY, X, W and the bases, with other processes; returns what waits for it."""


class ReducedLinear(torch.autograd.Function):
    """``y = x W^T + b`` whose backward pass returns dX and the gradient of the core, never of W.

    Where ``X Q_V`` is at hand (``shared_product``) it is kept for the backward pass instead of X. The gradient of a
    sharded core is the mean of all processes', on its way while this one computes dX.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        core_PQ: Tensor,
        weight_MN: Tensor,
        bias: Tensor | None,
        out: Basis,
        inp: Basis,
        product: Tensor | None = None,
        across: Across | None = None,
    ) -> Tensor:
        ctx.save_for_backward(x if product is None else product, weight_MN)
        ctx.out, ctx.inp = out, Everything(inp.free) if product is not None else inp
        ctx.x_dtype, ctx.core_dtype = x.dtype, core_PQ.dtype
        ctx.across = across
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, weight_MN, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_MN = ctx.saved_tensors
        dy_TM = dy.reshape(-1, dy.shape[-1])
        dx = dcore = dbias = under_way = None
        if ctx.needs_input_grad[1]:
            # Under autocast the output, and so dY, is narrower than the saved input and weight.
            x_TN = x.reshape(-1, x.shape[-1]).to(dy.dtype)
            if ctx.across is None:
                dcore = core_gradient(dy_TM, x_TN, ctx.out.on(weight_MN), ctx.inp.on(weight_MN.T)).to(ctx.core_dtype)
            else:
                under_way = ctx.across(dy_TM, x_TN, weight_MN, (ctx.out, ctx.inp))
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight_MN.to(dy.dtype)).to(ctx.x_dtype)
        if under_way is not None:
            dcore = under_way().to(ctx.core_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
            dbias = dy_TM.sum(0).to(ctx.bias_dtype)
        return dx, dcore, None, dbias, *[None] * (len(ctx.needs_input_grad) - 4)
