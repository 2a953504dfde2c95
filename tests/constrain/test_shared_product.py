"""``X Q_V`` is computed once for layers that get the same input and protect the same directions of it."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

import lorica
from lorica.constrain.linear import SubspaceLinear
from lorica.constrain.protect import protected_layers
from lorica.constrain.reduced import _products, shared_product
from lorica.subspace.basis import Basis, Everything, Explicit
from lorica.subspace.orthonormal import complement
from tests.builders import batch, matrix, tiny, trainable

IDS = {"input_ids": torch.arange(32).reshape(2, 16)}


def activation_protected() -> nn.Module:
    model = tiny("llama")
    plan = lorica.plan(model, 0.25, source="activation", calibration=[IDS])
    return lorica.protect(model, plan)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(**IDS, labels=IDS["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def unshared(model: nn.Module) -> nn.Module:
    """Return a copy whose layers hold a basis each."""
    twin = copy.deepcopy(model)
    for layer in protected_layers(twin).values():
        layer.in_basis = copy.deepcopy(layer.in_basis)
        layer.in_basis.shared = False
    return twin


def groups(model: nn.Module) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for name, layer in protected_layers(model).items():
        found.setdefault(id(layer.in_basis), set()).add(name.removeprefix("model.layers."))
    return found


def test_layers_with_one_input_share_one_basis() -> None:
    shared = [names for names in groups(activation_protected()).values() if len(names) > 1]
    mlp = [{f"{i}.mlp.gate_proj", f"{i}.mlp.up_proj"} for i in (0, 1)]
    attention = [{f"{i}.self_attn.{side}_proj" for side in "qkv"} for i in (0, 1)]
    assert len(shared) == 4
    assert all(names in shared for names in mlp + attention)


def test_the_papers_source_shares_nothing() -> None:
    model = tiny("llama")
    lorica.protect(model, lorica.plan(model))
    assert all(len(names) == 1 for names in groups(model).values())
    assert not any(layer.in_basis.shared for layer in protected_layers(model).values())


def test_gradients_are_the_same_bits() -> None:
    model = activation_protected()
    one, other = gradients(model), gradients(unshared(model))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_saves_the_products_of_all_but_one() -> None:
    model = activation_protected()
    counts = []
    for each in (model, unshared(model)):
        with FlopCounterMode(display=False) as counter:
            gradients(each)
        counts.append(counter.get_total_flops())
    tokens, width, free = 32, 32, 8
    assert counts[1] - counts[0] == 2 * (2 + 1) * 2 * tokens * width * free  # blocks x (k, v and up) x one product


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_and_leaves_nothing_behind(checkpointing: bool) -> None:
    model = activation_protected()
    if checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    twin = unshared(model)
    for each in (model, twin):
        optimizer = AdamW(trainable(each), lr=1e-2)
        for seed in range(3):
            each(**batch(tiny("llama"), seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(trainable(model), trainable(twin), strict=True):
        assert torch.equal(one, other)
    gc.collect()
    assert len(_products) == 0


def one_basis() -> Basis:
    basis = Explicit(complement(torch.linalg.qr(matrix(6, 4, 0, torch.float64)).Q).float())
    basis.shared = True
    return basis


def test_an_input_that_was_written_to_is_another_input() -> None:
    basis, x = one_basis(), matrix(3, 6, 1)
    first = shared_product(basis, x)
    assert shared_product(basis, x) is first
    x.mul_(2)
    torch.testing.assert_close(shared_product(basis, x), 2 * first)
    assert shared_product(basis, x.clone()) is not shared_product(basis, x)


def test_the_input_itself_is_not_kept_for_the_backward_pass() -> None:
    basis = one_basis()
    layer = SubspaceLinear.wrap(nn.Linear(6, 5), Everything(5), basis)
    y = layer(matrix(3, 6, 1))
    kept = {tuple(tensor.shape) for tensor in y.grad_fn.saved_tensors}
    assert kept == {(3, 2), (5, 6)}
