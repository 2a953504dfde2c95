"""``lorica.protect`` on a model that FSDP2 has sharded: the split is shared out, and no process holds all of anything.

Each weight is brought together at one process, its owner, who splits it and keeps W0 and the bases; see ``sharded``.
The cores are sharded as the weights are, over the same processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, zeros
from transformers.pytorch_utils import Conv1D

from lorica.constrain.owners import Alike, at_owners, sharded_weight, shared_layers, told_to_all
from lorica.constrain.sharded import Shards
from lorica.subspace.basis import Basis, Everything, Explicit, Reflector
from lorica.subspace.derived import Derived
from lorica.subspace.plan_entry import PlanEntry

_FORMS: tuple[type[Basis], ...] = (Everything, Explicit, Reflector, Derived)


class Held(NamedTuple):
    """What the owner of a weight keeps: W0 (M x N), Q_U and Q_V; elsewhere they have no values."""

    base: Tensor
    bases: tuple[Basis, Basis]


def split_sharded(
    model: nn.Module,
    entries: Sequence[PlanEntry],
    modules: Mapping[str, nn.Linear | Conv1D],
    split: Callable[[PlanEntry, Tensor, torch.device], Held],
    tell: Callable[[str], None],
) -> dict[str, tuple[Held, Shards]]:
    """Return what ``SubspaceLayer.wrap_sharded`` takes, of layers whose weights FSDP2 has sharded.

    All processes have to call this.

    Args:
        model: holds the layers.
        entries: what the plan says of those that are to be split.
        modules: all layers of the plan, by name.
        split: makes the bases of a whole weight (M x N); it also gets the device that the parts of the weight lie on.
        tell: called with the name of each weight after its split, here or elsewhere.

    Raises:
        LoricaError: a weight is not sharded as FSDP2 does it, or cannot be split; in every process.
    """
    planned = {entry.name: entry for entry in entries}
    layers = {name: module for name, module in modules.items() if isinstance(module.weight, DTensor)}
    found: dict[str, tuple[Held, Shards]] = {}

    def work(name: str, whole_MN: Tensor) -> Held:
        return split(planned[name], whole_MN, sharded_weight(layers[name]).device)

    for every in shared_layers(model, layers):  # of the plan: the owners that measured for it have what they need
        alike = every._replace(owners={name: owner for name, owner in every.owners.items() if name in planned})
        if not alike.owners:
            continue
        own = at_owners(alike, layers, work, tell)
        for name, form in _forms(alike, planned, own).items():
            weight = sharded_weight(layers[name])
            held = own.get(name, Held(torch.empty(0, dtype=weight.dtype), form))
            found[name] = (held, Shards(alike.group, alike.owners[name], _no_change(form, weight), weight))
    return found


def _forms(alike: Alike, planned: Mapping[str, PlanEntry], own: Mapping[str, Held]) -> dict[str, tuple[Basis, Basis]]:
    """Return the bases of all weights without values; which form each has, its owner alone can tell."""
    kinds = {name: torch.tensor([_FORMS.index(type(basis)) for basis in held.bases]) for name, held in own.items()}
    told = told_to_all(kinds, dict.fromkeys(alike.owners, 2), alike)
    found = {}
    for name, (out, inp) in told.items():
        (m, n), (a, b) = planned[name].shape, planned[name].protected
        found[name] = (_form(_FORMS[int(out)], m, a, n), _form(_FORMS[int(inp)], n, b, m))
    return found


def _form(kind: type[Basis], dim: int, k: int, other: int) -> Basis:
    """Return a basis without values, of one side of a weight whose other side has ``other`` dimensions."""
    blank = torch.empty(0, device="meta")
    if kind is Everything:
        return Everything(dim)
    if kind is Explicit:
        return Explicit(blank.new_empty(dim, dim - k))
    if kind is Reflector:
        return Reflector(blank.new_empty(dim, k))
    return Derived(blank.new_empty(k, k), blank.new_empty(other, k), dim)


def _no_change(form: tuple[Basis, Basis], weight: DTensor) -> DTensor:
    """Return M = 0, sharded as the weight is, and lying where it does."""
    out, inp = form
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    core = zeros(out.free, inp.free, dtype=wide, device_mesh=weight.device_mesh, placements=weight.placements)
    there = core.to(weight.device)
    assert isinstance(there, DTensor)
    return there
