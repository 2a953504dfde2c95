"""The bytes that one process receives in each optimizer step where a model trains on several; from shapes alone.

R processes shard the model, and there may be D replicas of them; a step accumulates A micro-batches. Collectives count
as their best algorithms move data: of n bytes in parts, a gather and a reduce-scatter bring each of R processes
n (R - 1) / R, an all-reduce twice that; a broadcast brings n to all but its sender.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from lorica.constrain.exchange import Exchange, cheapest_exchange, exchanges, numbers
from lorica.constrain.protect import protected_layers
from lorica.subspace.basis import Basis
from lorica.subspace.free_basis import free_basis

FORWARD, BACKWARD, LENT, GRADIENTS = "gather, forward", "gather, backward", "bases", "gradients"
RETURNED, CORES, WEIGHTS = "gradients from owners", "cores to owners", "weights to processes"
TRAFFIC = (FORWARD, BACKWARD, LENT, GRADIENTS, RETURNED, CORES, WEIGHTS)
"""What is received, in the order of the tables."""

_CORE = 4


class Matrix(NamedTuple):
    """The shape of a weight of which ``out`` and ``inp`` directions are protected.

    Attributes:
        m, n: output and input dimensions.
        out, inp: protected directions of each side.
        derived: whether a long side may be read off the weight, as it is for weights of 16 bits.
    """

    m: int
    n: int
    out: int = 0
    inp: int = 0
    derived: bool = False

    @property
    def core(self) -> int:
        """Numbers of the core: (M - out) (N - inp)."""
        return (self.m - self.out) * (self.n - self.inp)

    @property
    def sides(self) -> tuple[Basis, Basis]:
        """Q_U and Q_V without values, in the forms that ``free_basis`` chooses."""
        weight = torch.empty(self.m, self.n, device="meta")
        return _basis(weight, self.out, self.derived), _basis(weight.T, self.inp, self.derived)

    @property
    def bases(self) -> int:
        """Numbers of both bases."""
        return sum(map(numbers, self.sides))


def _basis(weight_DS: torch.Tensor, k: int, derived: bool) -> Basis:
    protected_DK = weight_DS.new_empty(weight_DS.shape[0], k, dtype=torch.float64)
    return free_basis(protected_DK, torch.float32, weight_DS if derived else None)


class Layer(NamedTuple):
    """A protected layer.

    Attributes:
        width: bytes of a number of its weight.
        ways: to make its core's gradient together.
        size: numbers of its weight.
    """

    width: int
    ways: tuple[Exchange, ...]
    size: int = 0

    @property
    def owned(self) -> int:
        """Bytes of W0 and of the bases, as their owner keeps them."""
        return self.width * self.size + _CORE * self.ways[0].lent

    def cheapest(self, shards: int) -> Exchange:
        """Return the way that R processes go, in bytes."""
        return self._in_bytes(cheapest_exchange(self.ways, shards))

    @property
    def whole(self) -> Exchange:
        """The way that lends both bases and reduces the gradient of the core itself, in bytes."""
        return self._in_bytes(self.ways[0])

    def _in_bytes(self, way: Exchange) -> Exchange:
        return Exchange(*way[:2], *(self.width * count for count in way[2:]))


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model, by how they travel and where they lie.

    Attributes:
        parameters: all of them but the cores.
        kept: of these, what FSDP2 gathers once and keeps whole until the backward pass is through: its root unit.
        unit: the largest of the other units, which are gathered in each pass; the cores that it has are not counted.
        gradients: of the parameters that train themselves: all in plain fine-tuning.
        folded: the weights that cores stand for.
        cores: of float32, as their gradients are.
        bases: as they are kept.
        layers: the layers that have cores.
    """

    parameters: int
    kept: int
    unit: int
    gradients: int
    folded: int = 0
    cores: int = 0
    bases: int = 0
    layers: tuple[Layer, ...] = ()

    @classmethod
    def of(cls, block: Sequence[Matrix], blocks: int, outside: int, kept: int, weight: int, gradient: int) -> Sizes:
        """Return the sizes of a model of equal blocks; with nothing protected that of its plain fine-tuning.

        Args:
            block: the weights of one block.
            blocks: how many.
            outside: numbers of embeddings and head, of which ``kept`` are in the root unit and the rest are one more.
            weight, gradient: bytes of a number of a weight and of its gradient.
        """
        unit = sum(matrix.m * matrix.n for matrix in block)
        total = blocks * unit + outside
        largest = max(unit, outside - kept)
        plain = cls(weight * total, weight * kept, weight * largest, gradient * total)
        if not any(matrix.out or matrix.inp for matrix in block):
            return plain
        return replace(
            plain,
            gradients=0,
            folded=weight * blocks * unit,
            cores=_CORE * blocks * sum(matrix.core for matrix in block),
            bases=_CORE * blocks * sum(matrix.bases for matrix in block),
            layers=blocks * tuple(Layer(weight, exchanges(*matrix.sides), matrix.m * matrix.n) for matrix in block),
        )


def sizes_of(model: nn.Module, units: Sequence[nn.Module]) -> Sizes:
    """Return the sizes of a model that is on one device or on none, protected or not.

    Args:
        units: what FSDP2 is to gather in each pass, such as ``units_of``; what is in none of them is the root unit.
    """
    layers = list(protected_layers(model).values())
    cores = {id(layer.core) for layer in layers}

    def weights(module: nn.Module) -> list[nn.Parameter]:
        return [parameter for parameter in module.parameters() if id(parameter) not in cores]

    own, inside = weights(model), [sum(parameter.nbytes for parameter in weights(unit)) for unit in units]
    return Sizes(
        parameters=sum(parameter.nbytes for parameter in own),
        kept=sum(parameter.nbytes for parameter in own) - sum(inside),
        unit=max(inside, default=0),
        gradients=sum(parameter.nbytes for parameter in own if parameter.requires_grad),
        folded=sum(layer.matrix.nbytes for layer in layers),
        cores=sum(layer.core.nbytes for layer in layers),
        bases=sum(part.nbytes for layer in layers for side in layer.exact_bases for part in side.buffers()),
        layers=tuple(
            Layer(layer.matrix.itemsize, exchanges(*layer.exact_bases), layer.matrix.numel()) for layer in layers
        ),
    )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model, each a unit where FSDP2 is applied as its tutorials do."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [one for name, one in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return [block for blocks in outer for block in blocks]


def units_of(model: nn.Module) -> list[nn.Module]:
    """Return the units that transformers gathers in each pass: the blocks, and embeddings that are not tied."""
    embeddings, head = (getattr(model, f"get_{side}_embeddings")() for side in ("input", "output"))
    tied = head is None or embeddings.weight is head.weight
    return blocks_of(model) + ([] if tied else [embeddings])


@dataclass(frozen=True)
class Layout:
    """How a model is spread.

    Attributes:
        shards: R, the processes that its tensors are sharded over.
        replicas: D, how often the sharded model is there.
        offload: whether the parts rest on the host, from where they come to the device to be used.
    """

    shards: int
    replicas: int = 1
    offload: bool = False

    @property
    def devices(self) -> int:
        return self.shards * self.replicas

    @property
    def missing(self) -> float:
        """The part of a sharded tensor that a process has not: (R - 1) / R."""
        return (self.shards - 1) / self.shards


def received_sharded(sizes: Sizes, layout: Layout, accumulation: int = 1, *, wrapped: bool = False) -> Counter[str]:
    """Return the bytes that one process receives in each step, by kind, where FSDP2 shards the model.

    Per micro-batch, with the fraction (R - 1) / R of each:

        gather      parameters + parameters - kept
        bases       lent
        gradients   gradients + reduced, and 2 (D - 1) / D of 1 / R of gradients and cores across replicas
        from owners returned / R

    where lent, reduced and returned are those of each layer's ``Exchange``, and per step, with (R - 1) / R^2:

        fold        cores + folded

    A mean over the processes: owners get no bases of their own weights, and parts may differ by a row.

    Args:
        accumulation: A; every backward pass ends in averaged gradients, as FSDP2 has it by default.
        wrapped: FSDP2 was applied after ``protect``: it gathers the cores with the weights and averages their gradients
            in float32, for which all bases are lent.
    """
    cores = sizes.cores if wrapped else 0
    across = 2 * (layout.replicas - 1) / layout.replicas / layout.shards
    ways = [layer.whole if wrapped else layer.cheapest(layout.shards) for layer in sizes.layers]
    lent, reduced, returned = (sum(getattr(way, kind) for way in ways) for kind in ("lent", "reduced", "returned"))
    averaged = cores or sum(layer.whole.reduced for layer in sizes.layers)
    micro = {
        FORWARD: layout.missing * (sizes.parameters + cores),
        BACKWARD: layout.missing * (sizes.parameters - sizes.kept + cores),
        LENT: layout.missing * lent,
        GRADIENTS: layout.missing * (sizes.gradients + (cores or reduced)) + across * (sizes.gradients + averaged),
        RETURNED: layout.missing / layout.shards * returned,
    }
    step = {CORES: layout.missing / layout.shards * sizes.cores, WEIGHTS: layout.missing / layout.shards * sizes.folded}
    return _rounded({kind: accumulation * nbytes for kind, nbytes in micro.items()} | step)


def received_replicated(sizes: Sizes, devices: int) -> Counter[str]:
    """Return the bytes that one process receives in each step of DDP: gradients, all-reduced once, 2 (N - 1) / N."""
    return _rounded({GRADIENTS: 2 * (devices - 1) / devices * (sizes.gradients + sizes.cores)})


def _rounded(received: dict[str, float]) -> Counter[str]:
    return Counter({kind: round(nbytes) for kind, nbytes in received.items() if nbytes})
