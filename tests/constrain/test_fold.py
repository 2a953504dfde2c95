"""The user does nothing for the fold: however the core was changed, the next forward sees the right weight."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import LBFGS, SGD, AdamW

import lorica
from lorica.constrain.linear import SubspaceLayer, SubspaceLinear
from lorica.errors import LoricaError
from tests.builders import (
    Stack,
    batch,
    half,
    matrix,
    plan_for,
    protected_tiny,
    tiny,
    train,
    trainable,
)
from tests.constrain.folding import adamw, assert_folded, expected_weight, forward, loss_of, small


def write_data(core: nn.Parameter) -> None:
    core.data.copy_(matrix(*core.shape, seed=3))


def replace_data(core: nn.Parameter) -> None:
    core.data = matrix(*core.shape, seed=3)


def subtract_from_data(core: nn.Parameter) -> None:
    core.data -= 0.1


def write_in_place(core: nn.Parameter) -> None:
    with torch.no_grad():
        core.add_(0.1)


def write_one_entry(core: nn.Parameter) -> None:
    with torch.no_grad():
        core[0, 0] = 1.0


def set_vector(core: nn.Parameter) -> None:
    vector_to_parameters(parameters_to_vector([core]) + 0.1, [core])


def initialise(core: nn.Parameter) -> None:
    nn.init.normal_(core)


WRITES = (write_data, replace_data, subtract_from_data, write_in_place, write_one_entry, set_vector, initialise)


@pytest.mark.parametrize("use", ["forward", "state_dict", "release"])
@pytest.mark.parametrize("write", WRITES)
def test_a_core_written_by_hand(write: Callable[[nn.Parameter], None], use: str) -> None:
    model = small()
    for layer in model.layers:
        write(layer.core)
    wanted = [expected_weight(layer) for layer in model.layers]
    if use == "forward":
        forward(model)
    saved = model.state_dict() if use == "state_dict" else None
    if use == "release":
        lorica.release(model)
    for i, (layer, weight) in enumerate(zip(model.layers, wanted, strict=True)):
        found = saved[f"layers.{i}.weight"] if saved else layer.weight
        torch.testing.assert_close(found.detach().double(), weight, rtol=1e-5, atol=1e-6)


def test_a_core_that_was_replaced() -> None:
    model = small()
    for layer in model.layers:
        layer.core = nn.Parameter(matrix(*layer.core.shape, seed=4))
    forward(model)
    assert_folded(model)


def test_reading_folds_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    adamw(model).step()
    monkeypatch.setattr(SubspaceLayer, "fold", lambda _: pytest.fail("folded without a change"))
    loss_of(model).backward()
    forward(model)
    model.state_dict()


def test_a_step_folds_once_and_only_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    folded: list[SubspaceLayer] = []
    original = SubspaceLayer.fold
    monkeypatch.setattr(SubspaceLayer, "fold", lambda layer: (folded.append(layer), original(layer))[1])
    first = SGD([model.layers[0].core], lr=0.1)
    loss_of(model).backward()
    first.step()
    forward(model)
    assert folded == [model.layers[0]]


def test_several_optimizers_at_once() -> None:
    model = small()
    optimizers = [SGD([model.layers[0].core], lr=0.1), AdamW([model.layers[1].core], lr=0.1, fused=True)]
    for step in range(3):
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_folded(model)


def test_a_closure_sees_every_trial_point() -> None:
    model = small()
    optimizer = LBFGS(trainable(model), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        for layer in model.layers:
            torch.testing.assert_close(layer.weight.detach().double(), expected_weight(layer), rtol=1e-5, atol=1e-6)
        loss.backward()
        losses.append(loss.item())
        return loss

    optimizer.step(closure)
    assert losses[-1] < losses[0]
    assert_folded(model)


@pytest.mark.parametrize("kind", ["plain", "fused", "foreach"])
@pytest.mark.reliability("R31")
def test_a_step_with_zero_gradient_changes_nothing(kind: str) -> None:
    model = small()
    optimizer = adamw(model, **({} if kind == "plain" else {kind: True}))
    before = copy.deepcopy(model.state_dict())
    for parameter in trainable(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    loss_of(model).backward()
    optimizer.step()
    trained = copy.deepcopy(model.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0  # as in get_optimizer_state_dict of torch's distributed checkpoints
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert all(torch.equal(trained[key], value) for key, value in model.state_dict().items())


def test_a_bf16_weight_is_the_float32_sum_rounded_once() -> None:
    model = Stack([(40, 48)], dtype=torch.bfloat16)
    lorica.protect(model, plan_for(model, half))
    (layer,) = model.layers
    layer.core.data.copy_(matrix(*layer.core.shape, seed=3))
    forward(model)
    once = (layer.base.float() + layer.delta()).to(torch.bfloat16)
    twice = layer.base + layer.delta().to(torch.bfloat16)
    assert torch.equal(layer.weight, once)
    assert not torch.equal(layer.weight, twice)


def test_a_copy_trains_on_its_own() -> None:
    model = protected_tiny()
    train(model, adamw(model), 2, partial(batch, model))
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    twin = copy.deepcopy(model)
    train(twin, adamw(twin), 2, partial(batch, twin))
    assert_folded(twin)
    assert all(torch.equal(kept[key], value) for key, value in model.state_dict().items())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(twin.state_dict()[name], kept[name])
    assert type(lorica.release(twin).model.layers[0].mlp.up_proj) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, SubspaceLinear)


def test_a_copy_of_a_stale_model_is_folded_too() -> None:
    model = small()
    for layer in model.layers:
        write_data(layer.core)
    twin = copy.deepcopy(model)
    forward(twin)
    assert_folded(twin)


def test_an_unpickled_model_still_folds() -> None:
    model = pickle.loads(pickle.dumps(small()))
    optimizer = adamw(model, fused=True)
    loss_of(model).backward()
    optimizer.step()
    forward(model)
    assert_folded(model)


def reloaded(*values: Any) -> Any:
    file = io.BytesIO()
    torch.save(values, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("copied", [lambda *v: pickle.loads(pickle.dumps(v)), reloaded], ids=["pickle", "torch.load"])
def test_an_unpickled_core_is_watched_as_before(copied: Callable[..., Any], write: Callable[..., None]) -> None:
    (model,) = copied(small())
    forward(model)
    for layer in model.layers:
        write(layer.core)
    forward(model)
    assert_folded(model)


def test_a_model_and_its_optimizer_are_pickled_together() -> None:
    model = small()
    model, optimizer = pickle.loads(pickle.dumps((model, adamw(model))))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(layer.core) for layer in model.layers]
    loss_of(model).backward()
    optimizer.step()
    assert_folded(model)


def test_a_model_cast_after_protect_says_so() -> None:
    model = small()
    model.to(torch.bfloat16)
    with pytest.raises(LoricaError, match=r"cast to torch\.bfloat16; cast the model before"):
        forward(model)


def test_biases_train_where_the_plan_opens_them() -> None:
    model = tiny("opt")
    plan = lorica.plan(model, 0.5, train_also=[r"fc1\.bias"])
    lorica.protect(model, plan)
    biases = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    train(model, adamw(model), 2, partial(batch, model))
    for name, parameter in model.named_parameters():
        if name in biases:
            assert torch.equal(parameter, biases[name]) != name.endswith("fc1.bias")
