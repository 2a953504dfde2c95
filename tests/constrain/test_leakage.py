"""The constraint after real steps, measured with directions of this test's own.

Every optimizer is a row; every row must hold for every shape and every constraint.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from transformers.optimization import Adafactor

import lorica
from lorica.subspace.plan_entry import Constraint
from tests.builders import CONSTRAINTS, SHAPES, Stack, free_part, leakage, plan_for, top_directions, trainable

STEPS = 50
TOLERANCE = 1e-5

Factory = Callable[[Iterable[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Factory] = {
    "sgd-momentum": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: AdamW(p, lr=1e-2, weight_decay=0.0),
    "adamw-decay": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-foreach": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, scale_parameter=False, relative_step=False),
}


def k_of(m: int, n: int) -> int:
    return max(1, min(m, n) // 2)


def run(model: nn.Module, optimizer: Optimizer, *, clip: float | None = None, accumulate: int = 1) -> None:
    for step in range(STEPS):
        for part in range(accumulate):
            (model(model.inputs(step * accumulate + part)) / accumulate).backward()
        if clip:
            nn.utils.clip_grad_norm_(trainable(model), clip)
        optimizer.step()
        optimizer.zero_grad()


def moves(constraint: str, m: int, n: int, k: int) -> bool:
    """Whether a constraint leaves a weight any freedom."""
    rows, columns = m - k * (constraint != "input"), n - k * (constraint != "output")
    return rows > 0 and columns > 0


def assert_holds(before: torch.Tensor, after: torch.Tensor, constraint: str, tolerance: float = TOLERANCE) -> None:
    k = k_of(*before.shape)
    if not moves(constraint, *before.shape, k):
        assert torch.equal(before, after)
        return
    leak_u, leak_v = leakage(before, after, k)
    assert constraint == "input" or leak_u <= tolerance
    assert constraint == "output" or leak_v <= tolerance


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.reliability("R29")
def test_leakage_after_fifty_steps(optimizer: str, constraint: Constraint) -> None:
    model = Stack(SHAPES.values())
    before = [layer.weight.detach().clone() for layer in model.layers]
    lorica.protect(model, plan_for(model, k_of, constraint))
    run(model, OPTIMIZERS[optimizer](trainable(model)))
    for old, layer in zip(before, model.layers, strict=True):
        assert_holds(old, layer.weight, constraint)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.reliability("R29")
def test_leakage_with_clipping_and_accumulation(constraint: Constraint) -> None:
    model = Stack(SHAPES.values())
    before = [layer.weight.detach().clone() for layer in model.layers]
    lorica.protect(model, plan_for(model, k_of, constraint))
    run(model, OPTIMIZERS["adamw-decay"](trainable(model)), clip=0.1, accumulate=3)
    for old, layer in zip(before, model.layers, strict=True):
        assert_holds(old, layer.weight, constraint)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.reliability("R29")
def test_bf16_leaks_what_rounding_leaks(constraint: Constraint) -> None:
    model = Stack(SHAPES.values(), dtype=torch.bfloat16)
    before = [layer.weight.detach().clone() for layer in model.layers]
    lorica.protect(model, plan_for(model, k_of, constraint))
    run(model, OPTIMIZERS["adamw"](trainable(model)))
    for old, layer in zip(before, model.layers, strict=True):
        k = k_of(*old.shape)
        if not moves(constraint, *old.shape, k):
            continue
        exact = free_part(old, layer.delta(), k, constraint)
        rounded = (old.double() + exact).to(torch.bfloat16)
        for leak, floor in zip(leakage(old, layer.weight, k), leakage(old, rounded, k), strict=True):
            assert leak <= 1.3 * floor


def test_projecting_gradients_alone_leaks() -> None:
    """The check of this file can fail: an element-wise optimizer leaves the space of its gradients."""
    model = Stack([SHAPES["square"]])
    (layer,) = model.layers
    before = layer.weight.detach().clone()
    u, v = (side.float() for side in top_directions(before, 8))
    layer.weight.register_hook(lambda g: g - u @ (u.T @ g) - (g @ v) @ v.T + u @ (u.T @ g @ v) @ v.T)
    run(model, AdamW([layer.weight], lr=1e-2, weight_decay=0.0))
    assert min(leakage(before, layer.weight, 8)) > 1e-2
    with pytest.raises(AssertionError):
        assert_holds(before, layer.weight, "two-sided")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.reliability("R29")
def test_block_holds_on_dense_weights(optimizer: str) -> None:
    model = Stack(SHAPES.values())
    before = [layer.weight.detach().clone() for layer in model.layers]
    constraints = lorica.block_constraints(model, plan_for(model, k_of, "block"))
    inner = OPTIMIZERS[optimizer](trainable(model))
    run(model, lorica.ConstrainedOptimizer(inner, constraints, max_grad_norm=1.0))
    for old, layer in zip(before, model.layers, strict=True):
        u, v = top_directions(old, k_of(*old.shape))
        d = layer.weight.detach().double() - old.double()
        assert (u.T @ d @ v).norm() / d.norm() <= TOLERANCE
        assert (
            min(leakage(old, layer.weight, k_of(*old.shape))) > 1e-2 or old.shape[0] == 1
        )  # a looser set than two-sided


def test_block_needs_the_weights_put_back() -> None:
    model = Stack([SHAPES["square"]])
    (layer,) = model.layers
    before = layer.weight.detach().clone()
    (block,) = lorica.block_constraints(model, plan_for(model, k_of, "block")).values()
    layer.weight.register_hook(block.project)
    run(model, AdamW([layer.weight], lr=1e-2, weight_decay=0.0))
    u, v = top_directions(before, 8)
    d = layer.weight.detach().double() - before.double()
    assert (u.T @ d @ v).norm() / d.norm() > 1e-2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_everything_protected_moves_nothing(optimizer: str) -> None:
    model = Stack(SHAPES.values())
    before = copy.deepcopy(model.state_dict())
    lorica.protect(model, lorica.plan(model, 0.0))
    inner = OPTIMIZERS[optimizer](trainable(model))
    for step in range(3):
        model(model.inputs(step)).backward()
        inner.step()
    lorica.release(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_protected_is_the_inner_optimizer_bitwise(optimizer: str) -> None:
    plain, ours, projected = (Stack(SHAPES.values(), bias=False) for _ in range(3))
    lorica.protect(ours, lorica.plan(ours, 1.0))
    constraints = lorica.block_constraints(projected, lorica.plan(projected, 1.0, constraint="block"))
    assert constraints == {}
    run(plain, OPTIMIZERS[optimizer](plain.parameters()))
    run(ours, OPTIMIZERS[optimizer](trainable(ours)))
    run(projected, lorica.ConstrainedOptimizer(OPTIMIZERS[optimizer](trainable(projected)), constraints))
    lorica.release(ours)
    for one, two, three in zip(plain.parameters(), ours.parameters(), projected.parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.reliability("R27")
def test_two_equal_runs_are_bitwise_equal() -> None:
    results = []
    for _ in range(2):
        model = Stack(SHAPES.values())
        lorica.protect(model, plan_for(model, k_of))
        run(model, OPTIMIZERS["adamw-decay"](trainable(model)), clip=0.5)
        results.append(lorica.release(model).state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.slow
def test_leakage_does_not_drift() -> None:
    model = Stack([(64, 48)], bias=False)
    (layer,) = model.layers
    before = layer.weight.detach().clone()
    lorica.protect(model, plan_for(model, 24))
    for _ in range(20):
        run(model, OPTIMIZERS["adamw"](trainable(model)))
    assert_holds(before, model.layers[0].weight, "two-sided", 2e-6)
