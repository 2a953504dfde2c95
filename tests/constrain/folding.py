"""A small protected model, and whether its weights are what its cores say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

import lorica
from lorica.constrain.linear import SubspaceLayer
from lorica.constrain.protect import protected_layers
from tests.builders import Stack, half, plan_for, trainable


def expected_weight(layer: SubspaceLayer) -> Tensor:
    """Return ``W0 + Q_U M Q_V^T`` from the dense bases, in float64."""
    lifted = layer.out_basis.matrix().double() @ layer.core.detach().double() @ layer.in_basis.matrix().double().T
    return layer.base.double() + lifted


def assert_folded(model: nn.Module, *, moved: bool = True) -> None:
    layers = protected_layers(model)
    assert layers
    for layer in layers.values():
        torch.testing.assert_close(layer.matrix.detach().double(), expected_weight(layer), rtol=1e-5, atol=1e-6)
        assert torch.equal(layer.matrix, layer.base) != moved


def adamw(model: nn.Module, **options: Any) -> AdamW:
    return AdamW(trainable(model), lr=1e-2, **options)


def small() -> Stack:
    model = Stack([(8, 12), (12, 8)])
    lorica.protect(model, plan_for(model, half))
    return model


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    return model(model.inputs(seed))


def forward(model: nn.Module) -> None:
    with torch.no_grad():
        loss_of(model)
