"""The table of ``scripts/leakage_table.py`` as a module, and what both peers' tests need."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

import lorica
from lorica.constrain.protect import protected_layers


def leakage_table() -> ModuleType:
    """Import the script from its place in the repository."""
    path = Path(__file__).parents[2] / "scripts" / "leakage_table.py"
    spec = importlib.util.spec_from_file_location("leakage_table", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Protect a model by half and return the bases (Q_U, Q_V) of each weight, float64."""
    lorica.protect(model, lorica.plan(model, effective_rank=0.5))
    layers = protected_layers(model)
    return {n: (x.out_basis.matrix().double(), x.in_basis.matrix().double()) for n, x in layers.items()}


def assert_same_freedom(bases: tuple[Tensor, Tensor], u_high: Tensor, v_high: Tensor) -> None:
    """Assert that Q Q^T and a peer's I - high high^T are the same projectors, to the peer's float32 split."""
    for q, high in zip(bases, (u_high.double(), v_high.double()), strict=True):
        eye = torch.eye(len(q), dtype=torch.float64)
        torch.testing.assert_close(q @ q.T, eye - high @ high.T, rtol=0, atol=2e-4)
