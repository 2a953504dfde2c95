"""Kronecker factors by brute force: every position's input and output gradient, one outer product after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lorica
from lorica.constrain.linear import matrix_of
from lorica.subspace.measure import Wanted

Batches = Sequence[Mapping[str, Tensor]]
Masks = dict[str, Tensor]


def planned(model: nn.Module) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in lorica.plan(model).names()}


def everything(layers: Mapping[str, nn.Module]) -> dict[str, Wanted]:
    """Return that all directions of both sides are wanted."""
    shapes = {name: matrix_of(layer).shape for name, layer in layers.items()}
    return {name: Wanted((m, n), inputs=n, outputs=m) for name, (m, n) in shapes.items()}


def by_brute_force(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches, masks: Sequence[Masks], seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A, a mean over positions, and B, a sum over them by predictions, one outer product after the other.

    Args:
        masks: for each batch which positions count: of the ``encoder``, of the rest (``main``), and which are
            ``predicted``, in the shape of the logits.
    """
    model.eval()
    caught: list[tuple[str, Tensor, Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda _, x, y, name=name: caught.append((name, x[0], y)))
        for name, layer in layers.items()
    ]
    rows: dict[str, list[list[Tensor]]] = {name: [[], []] for name in layers}
    predictions = sum(int(mask["predicted"].sum()) for mask in masks)
    for number, (batch, mask) in enumerate(zip(batches, masks, strict=True)):
        caught.clear()
        logits_RV = logits_of(model(**batch))[mask["predicted"]]
        p_RV = logits_RV.detach().softmax(-1)
        y = torch.multinomial(p_RV, 1, generator=torch.Generator().manual_seed(seed + number))
        loss = -logits_RV.log_softmax(-1).gather(1, y).sum()
        gradients = torch.autograd.grad(loss, [output for _, _, output in caught])
        for (name, x, _), gradient in zip(caught, gradients, strict=True):
            encoder = ".encoder." in f".{name}" or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
            keep = mask["encoder" if encoder else "main"].reshape(-1).tolist()
            for side, value in zip(rows[name], (x, gradient), strict=True):
                flat = value.detach().reshape(-1, value.shape[-1])
                side.extend(row for row, kept in zip(flat, keep, strict=True) if kept)
    for handle in handles:
        handle.remove()
    return {name: (mean_square(x), mean_square(g) * len(g) / predictions) for name, (x, g) in rows.items()}


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def mean_square(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.outer(row, row) for row in map(Tensor.double, rows)]).mean(0)
