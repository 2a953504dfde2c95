"""``lorica.protect`` on a model that FSDP2 has sharded: the split is shared out, and no process holds all of anything.

Each weight is brought together at one process, its owner, who splits it and keeps W0 and the bases; see ``sharded``.
The cores are sharded as the weights are, over the same processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, zeros
from transformers.pytorch_utils import Conv1D

from lorica.constrain.linear import WRAPPERS
from lorica.constrain.sharded import Shards, shared_out, turns
from lorica.constrain.transport import group_of, to_owners
from lorica.errors import LoricaError
from lorica.subspace.basis import Basis, Everything, Explicit, Reflector
from lorica.subspace.derived import Derived
from lorica.subspace.plan import PlanEntry

_FORMS: tuple[type[Basis], ...] = (Everything, Explicit, Reflector, Derived)


class Held(NamedTuple):
    """What the owner of a weight keeps: W0 (M x N), Q_U and Q_V; elsewhere they have no values."""

    base: Tensor
    bases: tuple[Basis, Basis]


def split_sharded(
    model: nn.Module,
    entries: Sequence[PlanEntry],
    modules: Mapping[str, nn.Linear | Conv1D],
    split: Callable[[PlanEntry, Tensor], Held],
    tell: Callable[[str], None],
) -> dict[str, tuple[Held, Shards]]:
    """Return what ``SubspaceLayer.wrap_sharded`` takes, of layers whose weights FSDP2 has sharded.

    All processes have to call this.

    Args:
        model: holds the layers.
        entries: what the plan says of each.
        modules: the layers, by name.
        split: makes the bases of a whole weight (M x N).
        tell: called with the name of each weight after its split, here or elsewhere.

    Raises:
        LoricaError: a weight is not sharded as FSDP2 does it, or cannot be split; in every process.
    """
    found: dict[str, tuple[Held, Shards]] = {}
    if entries and not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise LoricaError("the model's weights are sharded, but not by FSDP2; Lorica does not know tensor parallelism")
    for (group, _), here in _alike(entries, modules).items():
        owners = shared_out([entry.shape[0] * entry.shape[1] for entry in here], group.size())
        own = _split(list(zip(owners, here, strict=True)), modules, split, tell, group)
        for entry, owner, form in zip(here, owners, _forms(here, own, group), strict=True):
            weight = _sharded(modules[entry.name])
            held = own.get(entry.name, Held(torch.empty(0, dtype=weight.dtype), form))
            found[entry.name] = (held, Shards(group, owner, _no_change(form, weight), weight))
    return found


def _sharded(module: nn.Module) -> DTensor:
    weight = module.get_parameter("weight")
    assert isinstance(weight, DTensor)
    return weight


def _alike(
    entries: Sequence[PlanEntry], modules: Mapping[str, nn.Linear | Conv1D]
) -> dict[tuple[dist.ProcessGroup, torch.dtype], list[PlanEntry]]:
    """Return the entries by what can travel together."""
    found: dict[tuple[dist.ProcessGroup, torch.dtype], list[PlanEntry]] = {}
    for entry in entries:
        weight = _sharded(modules[entry.name])
        found.setdefault((group_of(weight), weight.dtype), []).append(entry)
    return found


def _split(
    owned: Sequence[tuple[int, PlanEntry]],
    modules: Mapping[str, nn.Linear | Conv1D],
    split: Callable[[PlanEntry, Tensor], Held],
    tell: Callable[[str], None],
    group: dist.ProcessGroup,
) -> dict[str, Held]:
    """Return what this process keeps of its own weights; while it splits one, the others split theirs."""
    held: dict[str, Held] = {}
    problem: LoricaError | None = None
    for turn in turns(owned, group.size()):
        own = turn[group.rank()]
        whole = to_owners([None if one is None else _sharded(modules[one.name]) for one in turn], group)
        if own is not None and whole is not None and problem is None:
            try:
                held[own.name] = split(own, whole.T if WRAPPERS[type(modules[own.name])].transposed else whole)
            except LoricaError as error:  # the others wait for this process, and have to hear of it
                problem = error
        for one in turn:
            if one is not None:
                tell(one.name)
    _agree(problem, group)
    return held


def _agree(problem: LoricaError | None, group: dist.ProcessGroup) -> None:
    """Raise in every process if one has a problem: its own words there, and a reference to them in the others."""
    flag = torch.tensor([group.rank() + 1 if problem else 0], device=_device(group))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    if problem is not None:
        raise problem
    if flag.item():
        raise LoricaError(f"process {int(flag) - 1} could not protect its share of the weights; see its message")


def _device(group: dist.ProcessGroup) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def _forms(
    entries: Sequence[PlanEntry], own: Mapping[str, Held], group: dist.ProcessGroup
) -> list[tuple[Basis, Basis]]:
    """Return the bases of all weights without values; which form each has, its owner alone can tell."""
    kinds = torch.zeros(len(entries), 2, dtype=torch.long)
    for row, entry in zip(kinds, entries, strict=True):
        if entry.name in own:
            row.copy_(torch.tensor([_FORMS.index(type(basis)) for basis in own[entry.name].bases]))
    told = kinds.to(_device(group))
    dist.all_reduce(told, group=group)
    return [
        (
            _form(_FORMS[out], entry.shape[0], entry.protected[0], entry.shape[1]),
            _form(_FORMS[inp], entry.shape[1], entry.protected[1], entry.shape[0]),
        )
        for entry, (out, inp) in zip(entries, told.tolist(), strict=True)
    ]


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
    """Return M = 0, sharded as the weight is."""
    out, inp = form
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return zeros(out.free, inp.free, dtype=wide, device_mesh=weight.device_mesh, placements=weight.placements)
