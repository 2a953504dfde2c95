from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import lorica
from lorica.constrain.protect import protected_layers
from tests.builders import batch, protected_tiny, tiny, train, trainable


def trained(name: str = "llama", unfreeze_rank_ratio: float = 0.5, steps: int = 2) -> tuple[nn.Module, AdamW]:
    model = protected_tiny(name, unfreeze_rank_ratio)
    optimizer = AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, steps, partial(batch, model))
    return model, optimizer


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama-tied"])
def test_a_resumed_run_is_the_uninterrupted_run(name: str) -> None:
    straight, optimizer = trained(name, steps=2)
    saved = {key: value.clone() for key, value in straight.state_dict().items()}
    resumed = protected_tiny(name)
    resumed.load_state_dict(saved)
    other = AdamW(trainable(resumed), lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, each in ((straight, optimizer), (resumed, other)):
        train(model, each, 2, lambda step, model=model: batch(model, step + 2))
    finals = [model.state_dict() for model in (straight, resumed)]
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])


def test_only_cores_are_added_to_the_keys() -> None:
    plain, model = tiny("llama"), protected_tiny("llama")
    added = set(model.state_dict()) - set(plain.state_dict())
    assert added == {f"{name}.core" for name in protected_layers(model)}
    assert set(plain.state_dict()) <= set(model.state_dict())


def test_the_cores_alone_are_enough() -> None:
    model, _ = trained()
    cores = {key: value for key, value in model.state_dict().items() if key.endswith(".core")}
    fresh = protected_tiny()
    fresh.load_state_dict(cores, strict=False)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_state_of_another_base_model_is_refused(ratio: float) -> None:
    model, _ = trained(unfreeze_rank_ratio=ratio) if ratio else (protected_tiny(unfreeze_rank_ratio=0.0), None)
    torch.manual_seed(1)
    other = type(model)(model.config)
    lorica.protect(other, lorica.plan(other, ratio))
    with pytest.raises(RuntimeError, match="core was saved by an update that began at another model"):
        other.load_state_dict(model.state_dict())


@pytest.mark.parametrize("strict", [True, False])
def test_a_plain_state_is_refused_while_protected(strict: bool) -> None:
    model = protected_tiny()
    before = {key: value.clone() for key, value in model.state_dict().items() if key.endswith("proj.weight")}
    torch.manual_seed(1)
    plain = type(model)(model.config)
    with pytest.raises(RuntimeError, match=r"is a plain weight: call lorica\.release before loading it"):
        model.load_state_dict(plain.state_dict(), strict=strict)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_bf16_states_round_trip() -> None:
    def build() -> nn.Module:
        model = tiny("llama", torch.bfloat16)
        return lorica.protect(model, lorica.plan(model, 0.5))

    model, fresh = build(), build()
    train(model, AdamW(trainable(model), lr=1e-2), 2, partial(batch, model))
    fresh.load_state_dict(model.state_dict())
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in model.state_dict().items())
