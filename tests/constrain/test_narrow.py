"""Weights narrower than float32: what nothing protects learns as fully as what is protected."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import lorica
from lorica.constrain.linear import SubspaceLinear
from lorica.constrain.protect import protected_layers
from tests.builders import Stack, batch, plan_for, tiny, train, trainable

NARROW = (torch.bfloat16, torch.float16)


def test_small_steps_add_up() -> None:
    """Each step is far below the grid of the stored weight; their sum is not lost."""
    plain, model = (Stack([(40, 48)], dtype=torch.bfloat16) for _ in range(2))
    before = plain.layers[0].weight.detach().clone()
    lorica.protect(model, plan_for(model, 0))
    for one in (plain, model):
        optimizer = AdamW(trainable(one), lr=1e-4, weight_decay=0.0)
        for step in range(20):
            one(one.inputs(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    (layer,) = model.layers
    assert (layer.delta() != 0).float().mean() > 0.99
    assert torch.equal(layer.weight, (before.float() + layer.delta()).to(torch.bfloat16))
    exact, lost = ((one.layers[0].weight.double() - before.double()).norm() for one in (model, plain))
    assert layer.delta().norm() == pytest.approx(exact.item(), rel=0.15)
    assert lost < 0.8 * exact


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32, torch.float64], ids=str)
def test_the_weight_that_trains_is_never_narrow(dtype: torch.dtype) -> None:
    model = Stack([(6, 8)], dtype=dtype)
    (plain,) = model.layers
    lorica.protect(model, lorica.plan(model, 1.0))
    (parameter,) = trainable(model)
    assert parameter.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert parameter.numel() == 6 * 8
    assert (model.layers[0] is plain) == (dtype not in NARROW)
    lorica.release(model)
    assert model.layers[0] is plain
    assert plain.weight.dtype == dtype


def test_the_gradient_is_that_of_the_plain_layer() -> None:
    plain, model = (Stack([(6, 8), (8, 6)], dtype=torch.bfloat16) for _ in range(2))
    lorica.protect(model, lorica.plan(model, 1.0))
    for one in (plain, model):
        one(one.inputs(0)).backward()
    for dense, layer in zip(plain.layers, model.layers, strict=True):
        assert torch.equal(layer.core.grad, dense.weight.grad.float())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_narrow_model_of_free_and_protected_layers(name: str) -> None:
    model = tiny(name, torch.bfloat16)
    modules = dict(model.named_modules())
    plan = lorica.plan(model, 0.5, rank_pattern={"c_fc" if name == "gpt2" else "up_proj": 0}, train_also=["norm|ln_"])
    lorica.protect(model, plan)
    free = [entry.name for entry in plan.entries if entry.k == 0]
    assert set(protected_layers(model)) == set(plan.names()) > set(free)
    opened = [p for n, p in model.named_parameters() if p.requires_grad and not n.endswith(".core")]
    assert {p.dtype for p in opened} == {torch.bfloat16}, "train_also trains in its own dtype"
    train(model, AdamW(trainable(model), lr=5e-3), 3, partial(batch, model))
    lorica.release(model)
    assert dict(model.named_modules()) == modules
    report = lorica.audit(tiny(name, torch.bfloat16), model, plan)
    assert report.holds, report.table()
    verdicts = {row.name: row.verdict for row in report.rows}
    assert {n for n, verdict in verdicts.items() if verdict == "nothing is protected"} == set(free)


def test_a_checkpoint_of_a_free_narrow_layer_is_loaded() -> None:
    one, two = (lorica.protect(m, plan_for(m, 0)) for m in (Stack([(6, 8)], dtype=torch.bfloat16) for _ in range(2)))
    nn.init.normal_(one.layers[0].core)
    two.load_state_dict(one.state_dict())
    assert isinstance(two.layers[0], SubspaceLinear)
    assert torch.equal(two.layers[0].weight, one.layers[0].weight)
