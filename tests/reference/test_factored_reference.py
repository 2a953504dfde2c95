"""What the factored form and the reduced form have in common, and what they do not.

The sets of weights are the same, and so is the gradient that both see; the steps are not. With
``g = Q_U^T G Q_V`` (the gradient of our core), ``U_low = Q_U a`` and ``V_low = Q_V b``, one small SGD step is

    ours       dM = -lr g
    factored   dM = -lr (g b S^2 b^T  +  a diag(a^T g b) b^T  +  a S^2 a^T g)  +  O(lr^2)

so the factored form rescales the same gradient by the small singular values it starts from.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from lorica.constrain.linear import SubspaceLinear
from lorica.subspace.free_basis import free_basis
from lorica.subspace.linalg import split
from tests.builders import SHAPES, leakage, matrix
from tests.reference.factored import FactoredLinear

SHAPED = [pytest.param(*SHAPES[name], id=name) for name in ("wide", "tall", "square", "odd")]


def both(m: int, n: int, k: int) -> tuple[FactoredLinear, SubspaceLinear]:
    """Return the two forms of one float64 layer."""
    plain = nn.Linear(n, m, bias=False, dtype=torch.float64)
    plain.weight.data.copy_(matrix(m, n, dtype=torch.float64))
    parts = split(plain.weight, k)
    factored = FactoredLinear(plain.weight, k)
    bases = (free_basis(side, torch.float64) for side in (parts.u_MK, parts.v_NK))
    return factored, SubspaceLinear.wrap(plain, *bases)


def half(m: int, n: int) -> int:
    return min(m, n) // 2


def bases_of(ours: SubspaceLinear) -> tuple[Tensor, Tensor]:
    return ours.out_basis.matrix().double(), ours.in_basis.matrix().double()


@pytest.mark.parametrize(("m", "n"), SHAPED)
def test_the_same_split_and_the_same_function_at_the_start(m: int, n: int) -> None:
    factored, ours = both(m, n, half(m, n))
    q_u, q_v = bases_of(ours)
    eye_m, eye_n = torch.eye(m, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(q_u @ q_u.T, eye_m - factored.u_high @ factored.u_high.T)
    torch.testing.assert_close(q_v @ q_v.T, eye_n - factored.v_high @ factored.v_high.T)
    x = matrix(5, n, 1, torch.float64)
    torch.testing.assert_close(factored(x), ours(x))


@given(
    st.sampled_from([SHAPES[name] for name in ("wide", "tall", "square", "odd")]), st.integers(1, 5), st.integers(0, 99)
)
def test_every_update_of_ours_is_one_of_the_factored_form(shape: tuple[int, int], k: int, seed: int) -> None:
    factored, ours = both(*shape, k)
    q_u, q_v = bases_of(ours)
    ours.core.data.copy_(matrix(*ours.core.shape, seed, torch.float64))
    ours.refresh()
    # M0 + M has no more than min(M, N) - K directions, which is how many the factored form has.
    start = q_u.T @ (factored.u_low * factored.s_low) @ factored.v_low.T @ q_v
    x, s, yh = torch.linalg.svd(start.detach() + ours.core.detach(), full_matrices=False)
    assert len(s) == len(factored.s_low)
    with torch.no_grad():
        factored.u_low.copy_(q_u @ x)
        factored.s_low.copy_(s)
        factored.v_low.copy_(q_v @ yh.T)
    torch.testing.assert_close(factored.weight, ours.weight)


@pytest.mark.parametrize(("m", "n"), SHAPED)
def test_every_sgd_update_of_the_factored_form_is_one_of_ours(m: int, n: int) -> None:
    factored, ours = both(m, n, half(m, n))
    q_u, q_v = bases_of(ours)
    before = factored.weight.detach().clone()
    optimizer = SGD(factored.parameters(), lr=0.05, momentum=0.9)
    for step in range(20):
        factored(matrix(9, n, step, torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    change = factored.weight.detach() - before
    assert change.norm() > 1e-3
    assert max(leakage(before, factored.weight, half(m, n))) < 1e-12
    torch.testing.assert_close(q_u @ (q_u.T @ change @ q_v) @ q_v.T, change)


def gradients(factored: FactoredLinear, ours: SubspaceLinear) -> Tensor:
    """Let both forms see the same batch and return the dense gradient."""
    n = ours.matrix.shape[1]
    x, target = matrix(9, n, 1, torch.float64), matrix(9, ours.matrix.shape[0], 2, torch.float64)
    dense = ours.base.clone().requires_grad_()
    for y in (factored(x), ours(x), x @ dense.T):
        (y - target).square().sum().backward()
    return dense.grad


@pytest.mark.parametrize(("m", "n"), SHAPED)
def test_both_see_the_same_reduced_gradient(m: int, n: int) -> None:
    factored, ours = both(m, n, half(m, n))
    q_u, q_v = bases_of(ours)
    dense = gradients(factored, ours)
    g = ours.core.grad
    torch.testing.assert_close(g, q_u.T @ dense @ q_v)
    a, b, s = q_u.T @ factored.u_low, q_v.T @ factored.v_low, factored.s_low
    torch.testing.assert_close(factored.u_low.grad, q_u @ (g @ b * s))
    torch.testing.assert_close(factored.v_low.grad, q_v @ (g.T @ a * s))
    torch.testing.assert_close(factored.s_low.grad, (a.T @ g @ b).diagonal())


@pytest.mark.parametrize(("m", "n"), SHAPED)
def test_one_small_sgd_step_is_the_derived_one(m: int, n: int) -> None:
    factored, ours = both(m, n, half(m, n))
    q_u, q_v = bases_of(ours)
    gradients(factored, ours)
    g, lr = ours.core.grad, 1e-7
    a, b, s = ((q_u.T @ factored.u_low).detach(), (q_v.T @ factored.v_low).detach(), factored.s_low.detach())
    expected = -(g @ b * s**2 @ b.T + a * (a.T @ g @ b).diagonal() @ b.T + a * s**2 @ a.T @ g)
    SGD(factored.parameters(), lr=lr).step()
    SGD([ours.core], lr=lr).step()
    step = (q_u.T @ (factored.weight.detach() - ours.base) @ q_v) / lr
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    torch.testing.assert_close((ours.weight - ours.base) / lr, -q_u @ g @ q_v.T, rtol=1e-4, atol=1e-4)
    assert (step * g).sum() < 0  # both descend
    assert torch.cosine_similarity(step.flatten(), -g.flatten(), dim=0) < 0.999  # along different paths


def test_hooks_alone_do_not_hold_an_element_wise_optimizer() -> None:
    factored, _ = both(16, 16, 8)
    before = factored.weight.detach().clone()
    optimizer = AdamW(factored.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(20):
        factored(matrix(9, 16, step, torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert min(leakage(before, factored.weight, 8)) > 1e-2
