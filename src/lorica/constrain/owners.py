"""What is done with whole weights that FSDP2 has sharded: each is brought together at one process, its owner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lorica.constrain.linear import WRAPPERS
from lorica.constrain.sharded import shared_out, turns
from lorica.constrain.transport import group_of, to_owners
from lorica.errors import LoricaError

Made = TypeVar("Made")


class Alike(NamedTuple):
    """Layers whose weights can travel together.

    Attributes:
        group: the processes that they are sharded over.
        owners: the rank in the group of each layer's owner, by the layer's name.
    """

    group: dist.ProcessGroup
    owners: dict[str, int]


def shared_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[Alike]:
    """Give each layer an owner; every process comes to the same result by itself.

    Raises:
        LoricaError: a weight is not sharded as FSDP2 does it.
    """
    if layers and not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise LoricaError("the model's weights are sharded, but not by FSDP2; Lorica does not know tensor parallelism")
    found: dict[tuple[dist.ProcessGroup, torch.dtype], list[str]] = {}
    for name, layer in layers.items():
        weight = sharded_weight(layer)
        found.setdefault((group_of(weight), weight.dtype), []).append(name)
    return [
        Alike(group, dict(zip(names, _owners([layers[name] for name in names], group), strict=True)))
        for (group, _), names in found.items()
    ]


def _owners(layers: Sequence[nn.Module], group: dist.ProcessGroup) -> list[int]:
    return shared_out([sharded_weight(layer).numel() for layer in layers], group.size())


def sharded_weight(layer: nn.Module) -> DTensor:
    """Return the parameter that FSDP2 has put in the place of a layer's weight."""
    weight = layer.get_parameter("weight")
    assert isinstance(weight, DTensor)
    return weight


def at_owners(
    alike: Alike,
    layers: Mapping[str, nn.Module],
    work: Callable[[str, Tensor], Made],
    tell: Callable[[str], None] = lambda name: None,
) -> dict[str, Made]:
    """Return what this process makes of its own weights; while it works on one, the others work on theirs.

    Args:
        layers: by name.
        work: gets a layer's name and its whole weight (M x N).
        tell: called with the name of each weight that is done, here or elsewhere.

    Raises:
        LoricaError: one of them could not be worked on; in every process.
    """
    made: dict[str, Made] = {}
    problem: Exception | None = None
    for name, whole, names in _whole_weights(alike, layers):
        if name is not None and whole is not None and problem is None:
            try:
                made[name] = work(name, whole.T if WRAPPERS[type(layers[name])].transposed else whole)
            except Exception as error:  # the others wait for this process, and have to hear of it
                problem = error
        for one in names:
            tell(one)
    agree(problem, alike.group)
    return made


def _whole_weights(
    alike: Alike, layers: Mapping[str, nn.Module]
) -> Iterator[tuple[str | None, Tensor | None, list[str]]]:
    """Yield a weight of this process's own, if it has one more, and the names of all that are brought together."""
    for turn in turns(((owner, name) for name, owner in alike.owners.items()), alike.group.size()):
        whole = to_owners([None if name is None else sharded_weight(layers[name]) for name in turn], alike.group)
        yield turn[alike.group.rank()], whole, [name for name in turn if name is not None]


def agree(problem: Exception | None, group: dist.ProcessGroup) -> None:
    """Raise in every process if one has a problem: its own words there, and a reference to them in the others."""
    flag = torch.tensor([group.rank() + 1 if problem else 0], device=device_of(group))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    if problem is not None:
        raise problem
    if flag.item():
        raise LoricaError(f"process {int(flag) - 1} could not protect its share of the weights; see its message")


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Return where the tensors have to be that a group of processes exchanges."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def told_to_all(own: Mapping[str, Tensor], sizes: Mapping[str, int], alike: Alike) -> dict[str, Tensor]:
    """Return the vectors that the owners have, in every process; float64, on the CPU.

    Args:
        own: of this process's layers.
        sizes: how long each layer's vector is.
    """
    names = list(alike.owners)
    parts = [own[name].double().cpu() if name in own else torch.zeros(sizes[name]).double() for name in names]
    flat = torch.cat(parts).to(device_of(alike.group))
    dist.all_reduce(flat, group=alike.group)
    return dict(zip(names, flat.cpu().split([sizes[name] for name in names]), strict=True))
