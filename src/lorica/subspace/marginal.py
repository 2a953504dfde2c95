"""Ranks by marginal gain: each protected direction goes where it spares the most forgetting.

Shape suffixes: M outputs, N inputs, a / b protected output / input directions.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from lorica.subspace.factor import Factor, Factors
from lorica.subspace.plan_entry import PlanEntry

STEPS = 256
"""A side is protected in at most so many steps, of one direction each where it has no more directions than that."""


@dataclass(eq=False)
class Side:
    """One side of a weight, or the inputs that several have in common: its spectrum, and how much is protected.

    Attributes:
        held: energies of the first 0, 1, ... directions together, as far as they were measured.
        trace: sum of all energies.
        dim: how many directions there are.
        count: how many are protected.
        others: the other sides of the weights that have this one.
    """

    held: list[float]
    trace: float
    dim: int
    count: int = 0
    others: list[Side] = field(default_factory=list)

    @classmethod
    def of(cls, factor: Factor) -> Side:
        """Return a side of which nothing is protected yet."""
        return cls([0.0, *accumulate(factor.energies_R.tolist())], factor.trace, factor.dim)

    @property
    def next(self) -> int:
        """How many would be protected after one more step."""
        return min(self.count + max(1, self.dim // STEPS), len(self.held) - 1)

    @property
    def free(self) -> int:
        """How many directions are free."""
        return self.dim - self.count

    @property
    def left(self) -> float:
        """Energy of the free directions."""
        return max(self.trace - self.held[self.count], 0.0)

    def price(self) -> float:
        """Return what the next step spares per degree of freedom that it takes."""
        more = self.next - self.count
        beside = sum(other.free for other in self.others)
        if not more or not beside:
            return 0.0
        energy = self.held[self.next] - self.held[self.count]
        return energy * sum(other.left for other in self.others) / (more * beside)


class Greedy:
    """Protects one step after the other, always the one that spares most per degree of freedom that it takes.

    To second order a change D of a weight raises the loss by ``tr(B D A D^T) / 2``, for a random D in the free
    directions in proportion to ``tr(Q_U^T B Q_U) tr(Q_V^T A Q_V)``. Protecting one more input direction, of energy e,
    takes e off the second trace and ``M - a`` degrees of freedom. It spares, per degree,

        e tr(Q_U^T B Q_U) / (M - a)

    and an output direction the same with the sides exchanged. Where weights have their inputs in common, numerator
    and denominator are sums over these weights: they keep one basis.

    Args:
        entries: of the plan, whose constraints count.
        factors: A and B of each.

    Attributes:
        sides: output and input side of each layer.
        free: degrees of freedom that training keeps.
    """

    def __init__(self, entries: Sequence[PlanEntry], factors: Mapping[str, Factors]) -> None:
        known: dict[Factor, Side] = {}
        self.sides: dict[str, tuple[Side, Side]] = {}
        self._open: list[Side] = []
        for entry in entries:
            found = factors[entry.name]
            assert found.outputs is not None
            assert found.inputs is not None
            u, v = (known.setdefault(factor, Side.of(factor)) for factor in (found.outputs, found.inputs))
            u.others.append(v)
            v.others.append(u)
            self.sides[entry.name] = u, v
            self._open += [u] if entry.constraint != "input" else []
            self._open += [v] if entry.constraint != "output" and v not in self._open else []
        self.free = sum(u.dim * v.dim for u, v in self.sides.values())
        self._left = sum(u.left * v.left for u, v in self.sides.values())
        self._all = self._left / self.free

    @property
    def forgetting_share(self) -> float:
        """Forgetting expected of a random update in the free directions, over that of one of its norm in all."""
        return self._left / max(self.free, 1) / self._all if self._all > 0 else 0.0

    @property
    def at_the_end(self) -> bool:
        """Whether a side is protected as far as it was measured, and has more directions."""
        return any(side.count == len(side.held) - 1 < side.dim for side in self._open)

    def steps(self) -> Iterator[None]:
        """Protect one step more each time; end when nothing is left that costs anything."""
        heap = [(-side.price(), number) for number, side in enumerate(self._open)]
        heapq.heapify(heap)
        while heap:
            told, number = heapq.heappop(heap)
            side = self._open[number]
            price = side.price()
            if price <= 0:
                continue
            if -told > price * (1 + 1e-12):  # it has fallen since it was told
                heapq.heappush(heap, (-price, number))
                continue
            self._protect(side)
            heapq.heappush(heap, (-side.price(), number))
            yield

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return how many (output, input) directions are protected, by name."""
        return {name: (u.count, v.count) for name, (u, v) in self.sides.items()}

    def _protect(self, side: Side) -> None:
        left, count = side.left, side.count
        side.count = side.next
        self.free -= (side.count - count) * sum(other.free for other in side.others)
        self._left -= (left - side.left) * sum(other.left for other in side.others)


def within_freedom(greedy: Greedy, free: int) -> dict[str, tuple[int, int]]:
    """Protect until at most ``free`` degrees of freedom are left, and return the counts."""
    steps = greedy.steps()
    while greedy.free > free and next(steps, "end") is None:
        pass
    return greedy.counts()


def within_forgetting(greedy: Greedy, share: float) -> dict[str, tuple[int, int]]:
    """Protect until the expected forgetting is at most this share of an unconstrained update's."""
    steps = greedy.steps()
    while greedy.forgetting_share > share and next(steps, "end") is None:
        pass
    return greedy.counts()
