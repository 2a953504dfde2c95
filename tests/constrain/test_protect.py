"""What ``protect`` and ``release`` do to a model, and what they refuse."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.constrain.linear import SubspaceConv1D, SubspaceLinear
from lorica.constrain.protect import plan_of, protected_layers
from lorica.errors import LoricaError
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import PlanEntry
from tests.builders import Stack, batch, half, matrix, plan_for, tiny, train, trainable


def counts(plan: Plan) -> dict[str, int]:
    return {entry.name: entry.k for entry in plan.entries}


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def stack() -> Stack:
    return Stack([(10, 8), (4, 10)])


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) + self.a(x)


def test_the_function_does_not_change_and_only_cores_train() -> None:
    model = stack()
    xs = model.inputs(0)
    before = model(xs)
    lorica.protect(model, plan_for(model, half))
    assert torch.equal(model(xs), before)
    assert {name for name, flag in flags(model).items() if flag} == {"layers.0.core", "layers.1.core"}
    assert plan_of(model) == plan_for(stack(), half)


def test_a_layer_without_protected_directions_stays_as_it_is() -> None:
    model = stack()
    plain = model.layers[0]
    lorica.protect(model, lorica.plan(model, rank_pattern={"layers.0": 0}))
    assert model.layers[0] is plain
    assert plain.weight.requires_grad
    assert not plain.bias.requires_grad
    assert list(protected_layers(model)) == ["layers.1"]


def test_an_edited_plan_is_honoured() -> None:
    model = stack()
    plan = lorica.plan(model)
    plan.entries[0].k = 2
    del plan.entries[1]
    lorica.protect(model, plan)
    assert tuple(model.layers[0].core.shape) == (8, 6)
    assert type(model.layers[1]) is nn.Linear
    assert not model.layers[1].weight.requires_grad


def test_release_restores_flags_after_any_number_of_calls() -> None:
    model = stack()
    model.layers[1].bias.requires_grad_(False)
    before = flags(model)
    for ratio in (1.0, 1.0, 0.5):
        lorica.protect(model, lorica.plan(model, ratio))
    lorica.release(lorica.release(model))
    assert flags(model) == before
    assert plan_of(model) is None


def test_train_also_opens_what_is_outside_and_nothing_else() -> None:
    model = tiny("llama")
    lorica.protect(model, lorica.plan(model, 0.5, train_also=["norm", "layers.0"]))
    opened = {name for name, flag in flags(model).items() if flag and not name.endswith(".core")}
    assert opened == {name for name in flags(model) if name.endswith("norm.weight")}


@pytest.mark.parametrize("pattern", ["nrom", r"q_proj\.weight"])
def test_train_also_that_opens_nothing_is_refused(pattern: str) -> None:
    model = tiny("llama")
    before = flags(model)
    with pytest.raises(LoricaError, match=re.escape(f"train_also: {pattern!r} matches no parameter outside")):
        lorica.protect(model, lorica.plan(model, 0.5, train_also=[pattern]))
    assert flags(model) == before


def test_train_also_that_is_no_pattern_is_refused_before_anything_changes() -> None:
    model = tiny("llama")
    before = flags(model)
    with pytest.raises(LoricaError, match=r"train_also: '\[' is no regular expression"):
        lorica.protect(model, lorica.plan(model, 0.5, train_also=["["]))
    assert flags(model) == before
    assert not protected_layers(model)


def one_entry(**changes: Any) -> Plan:
    return Plan(entries=[PlanEntry(**({"name": "layers.0", "shape": (10, 8), "k": 4} | changes))])


def emptied() -> Plan:
    plan = one_entry()
    plan.entries.clear()
    return plan


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (emptied(), "the plan has no entries"),
        (one_entry(name="layers.7"), r"the plan names layers\.7, which the model does not have"),
        (one_entry(shape=(8, 10)), r"the plan has layers\.0 as \(8, 10\), the model as \(10, 8\)"),
        (one_entry(constraint="block"), r"'block' is held by lorica\.ConstrainedOptimizer"),
        (one_entry(source="activation", constraint="input"), "needs calibration inputs"),
        (one_entry(name="layers"), "layers is a ModuleList, which cannot be protected"),
    ],
    ids=["empty", "name", "shape", "block", "moments", "container"],
)
def test_a_plan_that_does_not_fit_leaves_the_model_untouched(plan: Plan, message: str) -> None:
    model = stack()
    modules, before = list(model.modules()), flags(model)
    with pytest.raises(LoricaError, match=message):
        lorica.protect(model, plan)
    assert list(model.modules()) == modules
    assert flags(model) == before


def test_a_plan_names_exactly_one_layer() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.inner = nn.ModuleDict({"fc": nn.Linear(4, 4)})

    model = Two()
    lorica.protect(model, Plan(entries=[PlanEntry(name="fc", shape=(4, 4), k=2)]))
    assert list(protected_layers(model)) == ["fc"]


@pytest.mark.reliability("R17")
def test_a_weight_that_is_not_finite_is_named() -> None:
    model = stack()
    model.layers[1].weight.data[0, 0] = float("nan")
    plan = lorica.plan(model)
    with pytest.raises(LoricaError, match=r"layers\.1: the 4 x 10 weight holds NaN or inf"):
        lorica.protect(model, plan)
    assert not protected_layers(model)


def test_protecting_twice_is_refused() -> None:
    model = lorica.protect(stack(), lorica.plan(stack()))
    with pytest.raises(LoricaError, match=r"already protected; call lorica\.release"):
        lorica.protect(model, lorica.plan(stack()))
    with pytest.raises(LoricaError, match="already protected"):
        lorica.plan(model)


class Quantised(nn.Linear):
    """Stands for the layers of quantisation libraries, which subclass ``nn.Linear``."""


class Packed(torch.Tensor):
    """Stands for weights of quantisation libraries, which subclass ``Tensor`` inside a plain ``nn.Linear``."""


@pytest.mark.parametrize("kind", ["subclass", "tensor", "dtype", "meta", "offloaded"])
def test_layers_that_cannot_be_protected_are_refused_by_name(kind: str) -> None:
    model = Pair()
    if kind == "subclass":
        model.b = Quantised(4, 4)
    elif kind == "tensor":
        model.b.weight = nn.Parameter(torch.randn(4, 4).as_subclass(Packed))
    elif kind == "dtype":
        model.b.weight = nn.Parameter(model.b.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    elif kind == "offloaded":
        model.b.forward = model.b.forward
    else:
        model.b.to("meta")
    expected = {
        "subclass": "b is a Quantised, which cannot be protected",
        "tensor": "b holds Packed; load the model unquantised",
        "dtype": "b holds torch.float8_e4m3fn; load the model unquantised",
        "meta": "b has no values yet",
        "offloaded": "b has a replaced forward",
    }
    with pytest.raises(LoricaError, match=expected[kind]):
        lorica.plan(model)


def test_tied_weights_are_refused_and_shared_modules_are_not() -> None:
    tied = Pair()
    tied.b.weight = tied.a.weight
    with pytest.raises(LoricaError, match=r"a\.weight is tied to another parameter"):
        lorica.plan(tied)
    shared = Pair()
    shared.b = shared.a
    before = shared.a.weight.detach().clone()
    plain = shared.a
    lorica.protect(shared, lorica.plan(shared, 0.5))
    assert shared.a is shared.b
    assert isinstance(shared.b, SubspaceLinear)
    x = matrix(6, 4)
    for _ in range(5):
        shared(x).square().mean().backward()
    expected = torch.linalg.norm(shared.a.core.grad)
    assert expected > 0
    AdamW(trainable(shared), lr=1e-2).step()
    torch.testing.assert_close(shared(x), 2 * x @ shared.a.weight.T)
    lorica.release(shared)
    assert shared.a is plain
    assert shared.b is plain
    assert not torch.equal(plain.weight, before)


def test_conv1d_is_the_transposed_linear_layer() -> None:
    torch.manual_seed(0)
    conv, linear = Conv1D(6, 8), nn.Linear(8, 6)
    linear.weight.data.copy_(conv.weight.T)
    linear.bias.data.copy_(conv.bias)
    models = [nn.ModuleDict({"layer": layer}) for layer in (conv, linear)]
    x = matrix(5, 8)
    for model in models:
        lorica.protect(model, lorica.plan(model, 0.5))
        optimizer = AdamW(trainable(model), lr=1e-2)
        for _ in range(3):
            model["layer"](x).square().mean().backward()
            optimizer.step()
    one, two = (model["layer"] for model in models)
    assert isinstance(one, SubspaceConv1D)
    torch.testing.assert_close(one.weight.T, two.weight)
    torch.testing.assert_close(one.core, two.core)


def test_hooks_on_a_layer_survive() -> None:
    model = stack()
    calls = []
    model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    lorica.protect(model, plan_for(model, half))
    model(model.inputs(0))
    assert calls == [1]
    lorica.release(model)
    model(model.inputs(0))
    assert calls == [1, 1]


def test_progress_is_reported_for_every_weight() -> None:
    seen: list[tuple[str, int, int]] = []
    model = stack()
    lorica.protect(model, plan_for(model, half), progress=lambda *call: seen.append(call))
    assert seen == [("layers.0", 1, 2), ("layers.1", 2, 2)]


def test_training_and_evaluation_mode_are_kept() -> None:
    model = tiny("llama").eval()
    lorica.protect(model, lorica.plan(model))
    assert not any(module.training for module in model.modules())
    model.train()
    train(model, AdamW(trainable(model)), 1, lambda step: batch(model, step))
    lorica.release(model)
    assert all(module.training for module in model.modules())
