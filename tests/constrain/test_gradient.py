"""The reduced gradient against the dense one, and the cost that decides how it is computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lorica.constrain.linear import SubspaceLinear
from lorica.constrain.reduced import ORDERS, ReducedLinear, core_gradient, lift, order_flops
from lorica.subspace.basis import Basis, Everything, Explicit, Reflector
from lorica.subspace.orthonormal import complement, reflector
from tests.builders import matrix

KINDS = ("everything", "explicit", "reflector")
M, N, T = 14, 10, 9


def basis(kind: str, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Basis:
    if kind == "everything":
        return Everything(d)
    u = torch.linalg.qr(matrix(d, d // 2, seed, torch.float64)).Q
    return Explicit(complement(u).to(dtype)) if kind == "explicit" else Reflector(reflector(u).to(dtype))


def wide(side: Basis) -> torch.Tensor:
    return side.matrix().double()


@pytest.mark.parametrize("order", [*ORDERS, None])
@pytest.mark.parametrize("out_kind", KINDS)
@pytest.mark.parametrize("in_kind", KINDS)
def test_the_core_gradient_is_the_reduced_dense_gradient(out_kind: str, in_kind: str, order: str | None) -> None:
    out, inp = basis(out_kind, M), basis(in_kind, N, seed=1)
    x, dy = matrix(T, N, 2), matrix(T, M, 3)
    dense = dy.double().T @ x.double()
    expected = wide(out).T @ dense @ wide(inp)
    error = (core_gradient(dy, x, out, inp, order).double() - expected).norm() / expected.norm()
    assert error <= 1e-6


@pytest.mark.parametrize("out_kind", KINDS)
@pytest.mark.parametrize("in_kind", KINDS)
def test_lift_is_the_dense_product(out_kind: str, in_kind: str) -> None:
    out, inp = basis(out_kind, M, torch.float64), basis(in_kind, N, torch.float64, 1)
    core = matrix(out.free, inp.free, 4, torch.float64)
    lifted = lift(core, out, inp)
    torch.testing.assert_close(lifted, wide(out) @ core @ wide(inp).T)
    assert lifted.is_contiguous()  # added to W0: across memory that takes several times as long


@pytest.mark.parametrize("out_kind", KINDS)
@pytest.mark.parametrize("in_kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(out_kind: str, in_kind: str, bias: bool) -> None:
    out, inp = basis(out_kind, 6, torch.float64), basis(in_kind, 4, torch.float64, 1)
    base = matrix(6, 4, 5, torch.float64)

    def layer(x: torch.Tensor, core: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        folded = base + lift(core.detach(), out, inp)
        return ReducedLinear.apply(x, core, folded, b, out, inp)

    x = matrix(6, 4, 6, torch.float64).reshape(2, 3, 4).requires_grad_()
    core = matrix(out.free, inp.free, 7, torch.float64).requires_grad_()
    b = matrix(1, 6, 8, torch.float64)[0].requires_grad_() if bias else None
    assert torch.autograd.gradcheck(layer, (x, core, b))


@pytest.mark.parametrize("shape", [(T, N), (2, 3, N), (N,)], ids=str)
def test_inputs_and_bias_get_the_gradients_of_the_plain_layer(shape: tuple[int, ...]) -> None:
    plain = torch.nn.Linear(N, M)
    ours = SubspaceLinear.wrap(plain, basis("reflector", M), basis("explicit", N, seed=1))
    x = torch.randn(shape, requires_grad=True)
    x_ours = x.detach().clone().requires_grad_()
    dy = torch.randn((*shape[:-1], M))
    y = F.linear(x, plain.weight, plain.bias)
    y.backward(dy)
    bias_grad, plain.bias.grad, plain.weight.grad = plain.bias.grad.clone(), None, None
    y_ours = ours(x_ours)
    y_ours.backward(dy)
    assert torch.equal(y_ours, y)
    torch.testing.assert_close(x_ours.grad, x.grad)
    torch.testing.assert_close(ours.bias.grad, bias_grad)
    assert ours.weight.grad is None


def test_nothing_is_computed_for_what_needs_no_gradient() -> None:
    ours = SubspaceLinear.wrap(torch.nn.Linear(N, M), basis("reflector", M), basis("explicit", N, seed=1))
    ours.bias.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        y = ours(torch.randn(T, N))
    forward = counter.get_total_flops()
    assert forward == 2 * T * M * N
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    costs = order_flops(T, ours.out_basis, ours.in_basis)
    assert counter.get_total_flops() == min(costs.values())


@given(
    st.integers(1, 40),
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
    st.integers(2, 24),
    st.integers(2, 24),
)
def test_counted_operations_are_the_ones_that_run(tokens: int, out_kind: str, in_kind: str, m: int, n: int) -> None:
    out, inp = basis(out_kind, m), basis(in_kind, n, seed=1)
    dy, x = torch.ones(tokens, m), torch.ones(tokens, n)
    counted = order_flops(tokens, out, inp)
    assert set(counted) == set(ORDERS)
    for order in ORDERS:
        with FlopCounterMode(display=False) as counter:
            core_gradient(dy, x, out, inp, order)
        assert counter.get_total_flops() == counted[order], order
    with FlopCounterMode(display=False) as counter:
        core_gradient(dy, x, out, inp)
    assert counter.get_total_flops() == min(counted.values())


@pytest.mark.parametrize(("tokens", "order"), [(1, "both"), (100_000, "dense")])
def test_no_order_is_best_everywhere(tokens: int, order: str) -> None:
    side = Reflector(reflector(torch.linalg.qr(matrix(64, 30, 0, torch.float64)).Q))
    costs = order_flops(tokens, side, side)
    assert min(costs, key=costs.__getitem__) == order


@given(st.integers(2, 12), st.integers(2, 12), st.sampled_from(KINDS), st.sampled_from(KINDS))
def test_lift_takes_the_cheaper_side_first(m: int, n: int, out_kind: str, in_kind: str) -> None:
    out, inp = basis(out_kind, m), basis(in_kind, n, seed=1)
    with FlopCounterMode(display=False) as counter:
        lift(torch.ones(out.free, inp.free), out, inp)
    first_in = out.free * inp.flops() + n * out.flops()
    first_out = inp.free * out.flops() + m * inp.flops()
    assert counter.get_total_flops() == min(first_in, first_out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_have_wide_cores(dtype: torch.dtype) -> None:
    plain = torch.nn.Linear(N, M, dtype=dtype)
    ours = SubspaceLinear.wrap(plain, basis("reflector", M), basis("explicit", N, seed=1))
    x = matrix(T, N, 2, dtype)
    y = ours(x)
    y.float().square().sum().backward()
    assert y.dtype == dtype
    assert ours.core.grad.dtype == torch.float32
    dy = 2 * y.detach().double()
    expected = wide(ours.out_basis).T @ dy.T @ x.double() @ wide(ours.in_basis)
    assert (ours.core.grad - expected).norm() / expected.norm() < 8 * torch.finfo(dtype).eps
