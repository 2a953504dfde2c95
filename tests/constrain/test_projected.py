"""The projected engine: gradients, retraction, and what an optimizer wrapper must do."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

import lorica
from lorica.constrain.optimizer import Block
from lorica.errors import LoricaError
from tests.builders import Stack, free_part, half, matrix, plan_for, tiny, top_directions, trainable


def block(m: int, n: int, k: int, *, transposed: bool = False) -> tuple[Block, torch.Tensor]:
    w = matrix(m, n, 1, torch.float64)
    return Block(w, *top_directions(w, k), transposed=transposed), w


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_projection_and_retraction_are_the_literal_formulas(m: int, n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, min(m, n)))
    constraint, w = block(m, n, k)
    g, moved = matrix(m, n, 2, torch.float64), w + matrix(m, n, 3, torch.float64)
    expected = free_part(w, g, k, "block")
    projected = constraint.project(g)
    torch.testing.assert_close(projected, expected)
    torch.testing.assert_close(constraint.project(projected), projected)  # idempotent
    other = matrix(m, n, 4, torch.float64)
    assert (projected * other).sum() == pytest.approx((g * constraint.project(other)).sum())  # symmetric
    back = constraint.retract(moved)
    torch.testing.assert_close(back - w, free_part(w, moved - w, k, "block"))
    torch.testing.assert_close(constraint.retract(back), back)


def test_a_transposed_weight_has_the_transposed_constraint() -> None:
    (plain, w), (transposed, _) = block(7, 5, 3), block(7, 5, 3, transposed=True)
    g = matrix(7, 5, 2, torch.float64)
    torch.testing.assert_close(transposed.project(g.T), plain.project(g).T)
    torch.testing.assert_close(transposed.retract((w + g).T), plain.retract(w + g).T)


def constrained(max_grad_norm: float | None = None, lr: float = 0.1) -> tuple[Stack, lorica.ConstrainedOptimizer]:
    model = Stack([(8, 12), (12, 8)], bias=False)
    constraints = lorica.block_constraints(model, plan_for(model, half, "block"))
    return model, lorica.ConstrainedOptimizer(SGD(trainable(model), lr=lr), constraints, max_grad_norm=max_grad_norm)


def test_clipping_counts_only_what_is_kept() -> None:
    model, optimizer = constrained(max_grad_norm=1e-3)
    before = [layer.weight.detach().clone() for layer in model.layers]
    model(model.inputs(0)).backward()
    optimizer.step()
    moved = torch.stack([(w.weight - old).norm() for w, old in zip(model.layers, before, strict=True)]).norm()
    assert moved.item() == pytest.approx(0.1 * 1e-3, rel=1e-2)


def test_a_closure_is_projected_too() -> None:
    (by_hand, plain), (model, optimizer) = constrained(), constrained()
    by_hand(by_hand.inputs(0)).backward()
    plain.step()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(model.inputs(0))
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(model(model.inputs(0)).item(), rel=0.2)
    for a, b in zip(by_hand.layers, model.layers, strict=True):
        torch.testing.assert_close(a.weight, b.weight)
        torch.testing.assert_close(a.weight.grad, b.weight.grad)


def test_lbfgs_stays_on_the_set() -> None:
    model = Stack([(8, 12)], bias=False)
    before = model.layers[0].weight.detach().clone()
    constraints = lorica.block_constraints(model, plan_for(model, half, "block"))
    optimizer = lorica.ConstrainedOptimizer(LBFGS(trainable(model), lr=0.1), constraints)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(model.inputs(0))
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    u, v = top_directions(before, 4)
    d = model.layers[0].weight.detach().double() - before.double()
    assert (u.T @ d @ v).norm() <= 1e-5 * d.norm()


def test_it_is_an_optimizer_to_schedulers_and_checkpoints() -> None:
    model, optimizer = constrained()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is optimizer.inner.param_groups
    assert optimizer.state is optimizer.inner.state
    scheduler = LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    model(model.inputs(0)).backward()
    optimizer.step()
    scheduler.step()
    assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(0.05)
    optimizer.zero_grad()
    assert all(layer.weight.grad is None for layer in model.layers)
    saved = copy.deepcopy(optimizer.state_dict())
    _, fresh = constrained(lr=0.7)
    fresh.load_state_dict(saved)
    assert fresh.inner.param_groups[0]["lr"] == pytest.approx(0.05)


def test_a_zero_gradient_moves_no_weight_beyond_rounding() -> None:
    model, optimizer = constrained()
    before = [layer.weight.detach().clone() for layer in model.layers]
    for layer in model.layers:
        layer.weight.grad = torch.zeros_like(layer.weight)
    for _ in range(100):
        optimizer.step()
    for layer, old in zip(model.layers, before, strict=True):
        assert (layer.weight - old).norm() <= 1e-6 * old.norm()


def test_release_restores_the_flags() -> None:
    model = tiny("llama")
    lorica.block_constraints(model, lorica.plan(model, constraint="block"))
    assert not model.lm_head.weight.requires_grad
    lorica.release(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gpt2_is_constrained_in_its_own_layout() -> None:
    model = tiny("gpt2")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = lorica.plan(model, 0.5, constraint="block", target_modules=[r"mlp\.c_fc"])
    constraints = lorica.block_constraints(model, plan)
    optimizer = lorica.ConstrainedOptimizer(AdamW(trainable(model), lr=1e-2), constraints)
    ids = torch.arange(3, 10)[None]
    for _ in range(5):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for entry in plan.entries:
        weight = model.get_parameter(f"{entry.name}.weight").detach()
        old = before[f"{entry.name}.weight"].T
        u, v = top_directions(old, entry.k)
        d = weight.T.double() - old.double()
        assert d.norm() > 0
        assert (u.T @ d @ v).norm() <= 1e-5 * d.norm()


def test_what_cannot_be_constrained_is_refused() -> None:
    model = Stack([(8, 12)], bias=False)
    with pytest.raises(LoricaError, match=r"layers\.0: constraint 'two-sided' is held by lorica\.protect"):
        lorica.block_constraints(model, plan_for(model, half))
    low = Stack([(8, 12)], bias=False, dtype=torch.bfloat16)
    with pytest.raises(LoricaError, match=r"layers\.0 is torch\.bfloat16; constraint 'block' needs float32"):
        lorica.block_constraints(low, plan_for(low, half, "block"))
    constraints = lorica.block_constraints(model, plan_for(model, half, "block"))
    with pytest.raises(LoricaError, match="1 of the 1 constrained weights are not in the optimizer"):
        lorica.ConstrainedOptimizer(SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), constraints)
