"""The gradient of a sharded core: which bases go out to all processes for it, and what comes back.

The gradient is ``Q_U^T (dY^T X) Q_V``, and each of R processes has tokens of its own. The owner, who has both bases,
lends one of them. Then each process reduces its ``dY^T X`` on that side alone, the sum of them goes to the owner, who
does the other side and sends each process its part. It may also lend both, where nothing is left for it to do, and the
gradients are averaged in parts. What moves is the fewest numbers, and in the dtype of the weight, as FSDP2 itself
averages gradients by default.

Shape suffixes: T tokens, M output rows, N input columns, P / Q free output / input directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Shard

from lorica.constrain.reduced import core_gradient
from lorica.constrain.transport import from_owners, other_groups
from lorica.subspace.basis import Basis, Everything

if TYPE_CHECKING:
    from lorica.constrain.sharded import Shards


class Exchange(NamedTuple):
    """A way to make the gradient of a core together, and the numbers that move.

    Attributes:
        lends_out, lends_inp: whether Q_U and whether Q_V goes out to all processes.
        lent: numbers of these bases.
        reduced: numbers of what each process adds to the sum.
        returned: numbers of the gradient, where it comes from the owner.
    """

    lends_out: bool
    lends_inp: bool
    lent: int
    reduced: int
    returned: int

    def received(self, ranks: int) -> float:
        """Return the numbers that one of R processes receives, as a mean, times R / (R - 1)."""
        return self.lent + self.reduced + self.returned / ranks


def numbers(basis: Basis) -> int:
    """Return how many numbers a basis takes."""
    return sum(part.numel() for part in basis.buffers())


def exchanges(out: Basis, inp: Basis) -> tuple[Exchange, ...]:
    """Return the ways to make the gradient of a core with the bases Q_U and Q_V."""
    core = out.free * inp.free
    return (
        Exchange(True, True, numbers(out) + numbers(inp), core, 0),
        Exchange(False, True, numbers(inp), out.dim * inp.free, core),
        Exchange(True, False, numbers(out), out.free * inp.dim, core),
    )


def cheapest_exchange(ways: tuple[Exchange, ...], ranks: int) -> Exchange:
    """Return the way by which R processes receive least."""
    return min(ways, key=lambda way: way.received(ranks))


class Lent(Basis):
    """A basis that lies at its owner, who sends it to all when it is to be multiplied by.

    Args:
        basis: all but the owner keep its form alone.
        group, owner: see ``Shards``.
    """

    def __init__(self, basis: Basis, group: dist.ProcessGroup, owner: int) -> None:
        super().__init__(basis.dim, basis.free)
        kept = basis if group.rank() == owner else basis.mapped(lambda tensor: tensor.to("meta"))
        self._kept = (kept,)  # in a tuple: no submodule, whose buffers would move about with the model
        self._group, self._owner = group, owner

    @property
    def kept(self) -> Basis:
        """The basis itself; without values where another process is the owner."""
        return self._kept[0]

    def on(self, weight_DS: Tensor) -> Basis:
        """Return the basis, in the dtype of the weight; all processes have to ask for theirs in the same order."""
        parts = [
            weight_DS.new_empty(part.shape) if part.is_meta else part.to(weight_DS) for part in self.kept.buffers()
        ]
        if parts:
            flat = torch.cat([part.flatten() for part in parts])
            dist.broadcast(flat, group=self._group, group_src=self._owner)
            parts = list(flat.split([part.numel() for part in parts]))
        arrived = iter(parts)
        return self.kept.mapped(lambda part: next(arrived).view(part.shape)).on(weight_DS)

    def at_owner(self, weight_DS: Tensor) -> Basis:
        """Return the same as ``on``, where the owner alone needs it."""
        return self.kept.mapped(lambda part: part.to(weight_DS)).on(weight_DS)

    def flops(self) -> int:
        return self.kept.flops()


def mean_gradient(
    dy_TM: Tensor, x_TN: Tensor, weight_MN: Tensor, bases: tuple[Lent, Lent], shards: Shards
) -> Callable[[], DTensor]:
    """Return what waits for the mean of all processes' gradients of a core, sharded as the core is.

    Args:
        dy_TM, x_TN: gradient of the layer's output, and its input, of this process's tokens.
        weight_MN: the whole weight; in its dtype the gradient travels.
        bases: Q_U and Q_V.
        shards: where the core and its owner are; all processes have to call this and what it returns.
    """
    out, inp = bases
    way = cheapest_exchange(exchanges(out.kept, inp.kept), shards.group.size())
    sides = (
        out.on(weight_MN) if way.lends_out else Everything(out.dim),
        inp.on(weight_MN.T) if way.lends_inp else Everything(inp.dim),
    )
    summand = core_gradient(dy_TM, x_TN, *sides) / shards.core.device_mesh.size()
    summand = summand.to(weight_MN.dtype).contiguous()
    if not way.returned:
        return lambda: _in_parts(summand, shards)
    under_way = dist.reduce(summand, group=shards.group, group_dst=shards.owner, async_op=True)

    def finished() -> DTensor:
        under_way.wait()
        if not shards.mine:
            return _returned(None, summand.dtype, shards)
        gradient = summand if way.lends_out else out.at_owner(weight_MN).reduce_columns(summand)
        gradient = gradient if way.lends_inp else inp.at_owner(weight_MN.T).reduce(gradient)
        return _returned(gradient, summand.dtype, shards)

    return finished


def _in_parts(summand: Tensor, shards: Shards) -> DTensor:
    """Return the sum of all processes' summands, each with its part of it: what FSDP2 does with its own gradients."""
    core = shards.core
    summands = DTensor.from_local(summand, core.device_mesh, [Partial()] * core.device_mesh.ndim, run_check=False)
    # First the part, then over replicas: torch itself would bring the whole of it together on all of them.
    parts = [one if isinstance(one, Shard) else Partial() for one in core.placements]
    return _at_rest(summands.redistribute(placements=parts).redistribute(placements=core.placements), core)


def _returned(gradient: Tensor | None, dtype: torch.dtype, shards: Shards) -> DTensor:
    """Return the gradient of which the owner has the whole; the owners of all replicas add up theirs."""
    parts = torch.empty_like(shards.core, dtype=dtype, device=shards.core.device_mesh.device_type)
    assert isinstance(parts, DTensor)
    by_owner = [parts if rank == shards.owner else None for rank in range(shards.group.size())]
    from_owners(gradient, by_owner, shards.group)
    for replicas in other_groups(parts):
        dist.all_reduce(parts.to_local(), group=replicas)
    return _at_rest(parts, shards.core)


def _at_rest(gradient: DTensor, core: DTensor) -> DTensor:
    """Return a gradient where its core lies, which may be the host."""
    there = gradient.to(core.device)
    assert isinstance(there, DTensor)
    return there
