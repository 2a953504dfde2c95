"""Layers whose parameters FSDP2 shards: one process owns W0 and the bases of each, and folds it for all.

FSDP2 leaves each of R processes a part of every weight and every core, and brings the whole of them together while
they are used. W0 and the bases are no parameters: those of each layer lie whole at one process, its owner, so that each
process has those of one layer in R. The owner lends the others a basis in the backward pass (``exchange``), which they
drop after use. After the optimizer's step it gets the core, folds as on a single device, and sends each process its
part of the weight: all-to-alls of 1 / R of the numbers that a gather would move.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lorica.constrain.transport import from_owners, group_of, to_owners
from lorica.errors import LoricaError

if TYPE_CHECKING:
    from lorica.constrain.linear import SubspaceLayer


class Shards(NamedTuple):
    """Where the parts of a layer lie.

    Attributes:
        group: the processes that its parameters are sharded over.
        owner: which of them, by its rank in the group, holds W0 and the bases.
        core, weight: the sharded parameters; while the layer is used it has gathered ones in their place.
    """

    group: dist.ProcessGroup
    owner: int
    core: DTensor
    weight: DTensor

    @property
    def mine(self) -> bool:
        """Whether this process is the owner."""
        return self.group.rank() == self.owner


def settle(layers: Sequence[SubspaceLayer]) -> None:
    """Give the layers that FSDP2 has sharded meanwhile an owner each; W0 and the bases are dropped everywhere else.

    Every process comes to the same result by itself, as long as all ask for the same layers in the same order.

    Raises:
        LoricaError: the core of a layer was sharded and its weight was not.
    """
    groups: dict[dist.ProcessGroup, list[tuple[SubspaceLayer, DTensor, DTensor]]] = {}
    for layer in layers:
        core, weight = layer.core, layer.weight
        if layer.shards is not None or not isinstance(core, DTensor):
            continue
        if not isinstance(weight, DTensor):
            raise LoricaError("FSDP2 has sharded the core of a layer and not its weight: leave ignored_params out")
        groups.setdefault(group_of(weight), []).append((layer, core, weight))
    for group, alike in groups.items():
        load = _loads.setdefault(group.group_name, [0] * group.size())
        owners = shared_out([layer.held for layer, _, _ in alike], group.size(), load)
        for owner, (layer, *tensors) in zip(owners, alike, strict=True):
            layer.shard(Shards(group, owner, *tensors))


_loads: dict[str, list[int]] = {}
"""What the processes of each group own by now: layers are settled as they come to be used, some by themselves."""


def shared_out(sizes: Sequence[int], ranks: int, load: list[int] | None = None) -> list[int]:
    """Return an owner for each of several things: the largest goes first, each to the process that has the least.

    Args:
        sizes: of the things.
        ranks: how many owners there are.
        load: what each has already; it is added to.
    """
    load, owners = [0] * ranks if load is None else load, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = load.index(min(load))
        load[owners[index]] += sizes[index]
    return owners


Owned = TypeVar("Owned")


def turns(owned: Iterable[tuple[int, Owned]], ranks: int) -> Iterator[list[Owned | None]]:
    """Deal things out in turns: each has one of every owner's, by rank, or None where one has no more."""
    queues: list[list[Owned]] = [[] for _ in range(ranks)]
    for owner, one in owned:
        queues[owner].append(one)
    yield from (list(turn) for turn in itertools.zip_longest(*queues))


@torch.no_grad()
def fold(layers: Sequence[SubspaceLayer]) -> None:
    """Set the weights of sharded layers to ``W0 + Q_U M Q_V^T``; all processes of their groups have to call it.

    In turns, with one layer of each owner at a time, so that no process holds more than one whole weight.
    """
    alike: dict[tuple[Any, ...], list[SubspaceLayer]] = {}
    for layer in layers:
        shards = _shards(layer)
        alike.setdefault((shards.group, shards.core.dtype, shards.weight.dtype), []).append(layer)
    for (group, *_), same in alike.items():
        for turn in turns(((_shards(layer).owner, layer) for layer in same), group.size()):
            _fold_turn(turn, group)


def _fold_turn(turn: Sequence[SubspaceLayer | None], group: dist.ProcessGroup) -> None:
    own = turn[group.rank()]
    core_PQ = to_owners([None if layer is None else _shards(layer).core for layer in turn], group)
    whole = None if own is None or core_PQ is None else own.folded(core_PQ)
    from_owners(whole, [None if layer is None else _shards(layer).weight for layer in turn], group)


def _shards(layer: SubspaceLayer) -> Shards:
    assert layer.shards is not None
    return layer.shards
