"""Feasible sets given by directions, against dense projector matrices, and the bases that grow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import lorica
from lorica.constrain.accumulate import FlatBasis, SideBases
from lorica.constrain.optimizer import Block, ConstrainedOptimizer
from lorica.constrain.projections import (
    Flat,
    GradientOnly,
    ScaledGradient,
    ScaledStep,
    Sides,
    SidesBlock,
)
from lorica.errors import LoricaError
from lorica.subspace.sources import Protected
from tests.builders import matrix, top_directions

WIDE = torch.float64


def orthonormal(dim: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(matrix(dim, dim, seed, WIDE)).Q[:, :k]


def away_from(basis: Tensor) -> Tensor:
    return torch.eye(len(basis), dtype=basis.dtype) - basis @ basis.T


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_sides_are_the_dense_projectors(m: int, n: int, data: st.DataObject) -> None:
    u = orthonormal(m, data.draw(st.integers(0, m)), 1)
    v = orthonormal(n, data.draw(st.integers(0, n)), 2)
    w, g = matrix(m, n, 3, WIDE), matrix(m, n, 4, WIDE)
    sides, turned = Sides(w, Protected(u, v)), Sides(w, Protected(u, v), transposed=True)
    expected = away_from(u) @ g @ away_from(v)
    torch.testing.assert_close(sides.project(g), expected)
    torch.testing.assert_close(sides.project(expected), expected)
    torch.testing.assert_close(sides.retract(w + g), w + expected)
    torch.testing.assert_close(turned.project(g.T), expected.T)
    torch.testing.assert_close(turned.retract((w + g).T), (w + expected).T)


def test_the_block_is_the_one_of_the_weights_own_directions() -> None:
    w, g = matrix(7, 5, 1, WIDE), matrix(7, 5, 2, WIDE)
    directions = Protected(*top_directions(w, 3))
    for transposed in (False, True):
        ours, known = SidesBlock(w, directions, transposed=transposed), Block(w, *directions, transposed=transposed)
        stored, moved = (g.T, (w + g).T) if transposed else (g, w + g)
        torch.testing.assert_close(ours.project(stored), known.project(stored))
        torch.testing.assert_close(ours.retract(moved), known.retract(moved))


def test_a_small_change_of_a_large_weight_is_held_to_its_own_rounding() -> None:
    w = 100 * matrix(16, 16, 1)
    directions = Protected(torch.zeros(16, 0), orthonormal(16, 8, 2).float())
    weight = nn.Parameter(w.clone())
    optimizer = ConstrainedOptimizer(AdamW([weight], lr=1e-2), {weight: Sides(w, directions)})
    for step in range(50):
        weight.grad = matrix(16, 16, step)
        optimizer.step()
    change = weight.detach().double() - w.double()
    assert change.norm() > 0.1
    rounding = 100 * 2**-24 * 16  # of a float32 near 100 in each of 256 entries
    assert (change @ directions.v_NB.double()).norm() < rounding


def test_scaling_is_the_dense_formula_and_with_full_shares_the_projection() -> None:
    g, v = matrix(4, 6, 1, WIDE), orthonormal(6, 3, 2)
    share = torch.tensor([1.0, 0.5, 0.25], dtype=WIDE)
    expected = g @ (torch.eye(6, dtype=WIDE) - v @ torch.diag(share) @ v.T)
    torch.testing.assert_close(ScaledGradient(v, share).project(g), expected)
    torch.testing.assert_close(ScaledGradient(v, share, transposed=True).project(g.T), expected.T)
    full = ScaledGradient(v, torch.ones(3, dtype=WIDE)).project(g)
    torch.testing.assert_close(full, Sides(g, Protected(g.new_zeros(4, 0), v)).project(g))


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_a_scaled_step_is_the_plain_step_scaled(kind: type) -> None:
    w, v = matrix(4, 6, 1, WIDE), orthonormal(6, 3, 2)
    scaling = ScaledGradient(v, torch.tensor([1.0, 0.5, 0.25], dtype=WIDE))
    plain, held = nn.Parameter(w.clone()), nn.Parameter(w.clone())
    alone = kind([plain], lr=0.1)
    optimizer = ConstrainedOptimizer(kind([held], lr=0.1), {held: ScaledStep(held, scaling)})
    for step in range(3):
        before, other = held.detach().clone(), plain.detach().clone()
        plain.grad = matrix(4, 6, 5 + step, WIDE)
        held.grad = plain.grad.clone()
        alone.step()
        optimizer.step()
        decay = 1 - 0.1 * 0.01 if kind is AdamW else 1.0  # AdamW's decay depends on where the weight is
        expected = (plain.detach() - other * decay) + (before * decay - before)
        torch.testing.assert_close(held.detach() - before, scaling.project(expected))
    optimizer.zero_grad()
    before = held.detach().clone()
    optimizer.step()
    assert torch.equal(held, before)


def test_gradients_alone_hold_sgd_and_not_adamw() -> None:
    w, v = matrix(8, 8, 1, WIDE), orthonormal(8, 4, 2)
    sides = Sides(w, Protected(w.new_zeros(8, 0), v))
    leaks = {}
    for kind in (SGD, AdamW):
        weight = nn.Parameter(w.clone())
        optimizer = ConstrainedOptimizer(kind([weight], lr=0.1), {weight: GradientOnly(sides)})
        for step in range(10):
            weight.grad = matrix(8, 8, 5 + step, WIDE)
            optimizer.step()
        change = weight.detach() - w
        leaks[kind] = ((change @ v).norm() / change.norm()).item()
    assert leaks[SGD] < 1e-12
    assert leaks[AdamW] > 1e-2


def vectors(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    return [{"a": matrix(2, 3, seed + i), "b": matrix(1, 4, seed + i + 50)[0]} for i in range(count)]


def laid_out(vector: dict[str, Tensor]) -> Tensor:
    return torch.cat([vector["a"].flatten(), vector["b"]]).double()


def matrix_of_basis(basis: FlatBasis) -> Tensor:
    return torch.cat([basis.parts["a"], basis.parts["b"]], dim=1).T.double()


def test_a_flat_basis_spans_what_was_added_and_nothing_twice() -> None:
    basis = FlatBasis()
    assert len(basis) == 0
    first, second = vectors(2), vectors(2, seed=10)
    basis.add(first)
    kept = {name: part.clone() for name, part in basis.parts.items()}
    again = {name: 3 * first[0][name] - first[1][name] for name in first[0]}
    basis.add([again, *second, {name: torch.zeros_like(part) for name, part in again.items()}])
    assert len(basis) == 4
    assert all(torch.equal(basis.parts[name][:2], part) for name, part in kept.items())
    b = matrix_of_basis(basis)
    torch.testing.assert_close(b.T @ b, torch.eye(4, dtype=WIDE), atol=1e-6, rtol=0)
    everything = torch.stack([laid_out(vector) for vector in (*first, *second)], dim=1)
    torch.testing.assert_close(b @ (b.T @ everything), everything, atol=1e-6, rtol=0)


def test_what_is_not_finite_is_not_remembered() -> None:
    broken = torch.full((2, 3), torch.nan)
    with pytest.raises(LoricaError, match="a gradient to be remembered holds NaN"):
        FlatBasis().add([{"a": broken, "b": torch.ones(4)}])
    with pytest.raises(LoricaError, match=r"x: what the task did to it cannot be remembered: the 2 x 3 .* NaN"):
        SideBases().add("x", broken, 1)


def flat() -> tuple[dict[str, nn.Parameter], FlatBasis, Tensor]:
    parameters = {name: nn.Parameter(part.clone()) for name, part in vectors(1, seed=30)[0].items()}
    basis = FlatBasis()
    basis.add(vectors(3))
    return parameters, basis, matrix_of_basis(basis)


def test_the_joint_projection_is_the_dense_one() -> None:
    parameters, basis, b = flat()
    constraint = Flat(parameters, basis)
    gradients = vectors(1, seed=20)[0]
    projected = dict(zip(parameters, constraint.project(list(gradients.values())), strict=True))
    g = laid_out(gradients)
    torch.testing.assert_close(laid_out(projected), g - b @ (b.T @ g), atol=1e-6, rtol=1e-5)
    moved = {name: parameter.detach() + gradients[name] for name, parameter in parameters.items()}
    back = dict(zip(parameters, constraint.retract(list(moved.values())), strict=True))
    start = laid_out({name: parameter.detach() for name, parameter in parameters.items()})
    torch.testing.assert_close(laid_out(back), start + laid_out(projected), atol=1e-6, rtol=1e-5)


def test_the_joint_constraint_holds_under_adamw_also_for_a_weight_without_gradient() -> None:
    parameters, basis, b = flat()
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = ConstrainedOptimizer(AdamW(parameters.values(), lr=0.1), {}, joint=Flat(parameters, basis))
    optimizer.step()  # no gradient at all
    assert all(torch.equal(parameter, start[name]) for name, parameter in parameters.items())
    for step in range(20):
        parameters["a"].grad = matrix(2, 3, step)
        optimizer.step()
        optimizer.zero_grad()
    change = laid_out({name: parameter.detach() - start[name] for name, parameter in parameters.items()})
    assert change.norm() > 0.1
    assert change[6:].norm() > 1e-3  # the other weight has to move along
    assert (b.T @ change).norm() < 1e-5 * change.norm()


def test_a_joint_constraint_on_a_stranger_is_refused() -> None:
    parameters, basis, _ = flat()
    with pytest.raises(LoricaError, match="1 of the 2 constrained weights are not in the optimizer"):
        ConstrainedOptimizer(SGD([parameters["a"]], lr=0.1), {}, joint=Flat(parameters, basis))


def test_side_bases_keep_what_is_there_and_append_the_top_directions() -> None:
    bases = SideBases()
    bases.add("x", matrix(7, 5, 1), 2)
    first = bases.sides["x"]
    for side, expected in zip(first, top_directions(matrix(7, 5, 1), 2), strict=True):
        torch.testing.assert_close(side.double() @ side.double().T, expected @ expected.T, atol=1e-6, rtol=0)
    bases.add("x", matrix(7, 5, 2), 2)
    for old, side, added in zip(first, bases.sides["x"], top_directions(matrix(7, 5, 2), 2), strict=True):
        assert torch.equal(side[:, :2], old)
        assert side.shape[1] == 4
        side = side.double()
        torch.testing.assert_close(side.T @ side, torch.eye(4, dtype=WIDE), atol=1e-6, rtol=0)
        torch.testing.assert_close(side @ (side.T @ added), added, atol=1e-6, rtol=0)


def test_side_bases_take_no_direction_that_is_not_there() -> None:
    bases = SideBases()
    bases.add("one", torch.outer(torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, 1.0])), 2)
    assert [side.shape[1] for side in bases.sides["one"]] == [1, 1]
    torch.testing.assert_close(bases.sides["one"].u_MA.abs(), torch.tensor([[0.6], [0.8], [0.0]]))
    bases.add("none", torch.zeros(3, 2), 2)
    assert [side.shape for side in bases.sides["none"]] == [(3, 0), (2, 0)]
    for step in range(3):  # a full basis takes nothing more
        bases.add("full", matrix(3, 2, step), 2)
    assert [side.shape for side in bases.sides["full"]] == [(3, 3), (2, 2)]


def test_an_optimizer_without_a_joint_constraint_is_as_before() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    assert lorica.ConstrainedOptimizer(SGD([weight], lr=0.1), {}).joint is None
