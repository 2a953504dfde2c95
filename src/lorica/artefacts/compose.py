"""Sums of updates that were made from one model, and what keeps them from disturbing each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from lorica.artefacts.file import Update
from lorica.artefacts.overlap import Overlap, overlap
from lorica.constrain.audit_weight import rounding_share
from lorica.constrain.checkpoint import TRANSPOSED_FAMILIES, Weights
from lorica.errors import LoricaError


class ScaledSum:
    """Each tensor as ``round(W0 + s sum_i (W_i - W0))``, computed in float64."""

    def __init__(self, updates: Sequence[Update], scale: float) -> None:
        self.updates, self.scale = updates, scale
        for update in updates:
            for key in update.header.changed():
                dtype = update.header.tensors[key].dtype
                if not getattr(torch, dtype.removeprefix("torch.")).is_floating_point:
                    raise LoricaError(f"{update}: {key} holds whole numbers ({dtype}), which cannot be scaled or added")

    def __call__(self, key: str, tensor: Tensor) -> Tensor:
        changes = [change(update, key, tensor) for update in self.updates if update.header.tensors[key].changed]
        if not changes:
            return tensor
        result = (tensor.double() + self.scale * torch.stack(changes).sum(0)).to(tensor.dtype)
        if not bool(torch.isfinite(result).all()):
            raise LoricaError(f"--scale {self.scale:g}: {key} leaves the range of {tensor.dtype}")
        return result


def change(update: Update, key: str, before: Tensor) -> Tensor:
    """Return by how much an update moves a tensor of the model it was made from, float64."""
    d = update.apply(key, before).double() - before.double()
    if not bool(torch.isfinite(d).all()):
        raise LoricaError(f"{update}: {key} holds NaN or inf, which cannot be scaled or added")
    return d


def largest_overlap(weights: Weights, updates: Sequence[Update]) -> dict[str, Any]:
    """Return the largest overlap of any two updates in any tensor of the model they were made from, and where.

    Returns:
        ``value`` and what else ``Overlap`` has (0 where no tensor is changed by two of them), ``tensor`` and
        ``between``, the two updates.
    """
    largest: dict[str, Any] = {"value": 0.0, **asdict(Overlap(0.0, 0.0)), "tensor": None, "between": []}
    for one, two in combinations(updates, 2):
        for key, found in _overlaps(weights, one, two):
            if largest["tensor"] is None or found.value > largest["value"]:
                largest = {"value": found.value, **asdict(found), "tensor": key, "between": [str(one), str(two)]}
    return largest


def _overlaps(weights: Weights, one: Update, two: Update) -> Iterator[tuple[str, Overlap]]:
    for key in one.header.changed():
        if two.header.tensors[key].changed:
            before = weights.tensor(key)
            d, e = (change(update, key, before) for update in (one, two))
            rounding = rounding_share(before, before + d), rounding_share(before, before + e)
            found = overlap(d, e, rounding)
            stored_in_out = weights.family in TRANSPOSED_FAMILIES
            yield key, replace(found, inputs=found.outputs, outputs=found.inputs) if stored_in_out else found


def check_overlap(found: dict[str, Any], allowed: float) -> None:
    """Raise a ``LoricaError`` with the number and the place if two updates overlap by more than is allowed."""
    if found["value"] <= allowed:
        return
    one, two = found["between"]
    enough = math.ceil(100 * found["value"]) / 100
    noise = f"; rounding alone may cause {found['rounding']:.2g}" if found["rounding"] > allowed else ""
    raise LoricaError(
        f"{one} and {two} overlap by {found['value']:.3g} in {found['tensor']} (0: disjoint, 1: the same directions; "
        f"allowed is {allowed:g}{noise}): each would disturb what the other taught. Train one on top of the other, "
        f"or compose them all the same with --allow_overlap {enough:g}"
    )
