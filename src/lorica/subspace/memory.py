"""What finished tasks were to each layer, at a size that does not grow with their number.

Shape suffixes: M outputs, N inputs, D either, R kept directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorica.subspace.factor import Factor, Factors

KEPT_AS = torch.float16
"""Entries of unit vectors fit in it, and an angle of 5e-4 to what was measured does not matter here."""

SIDES = ("inputs", "outputs")


class FactorMemory:
    """The sum of the Kronecker factors of finished tasks, each scaled to trace 1, cut to a fixed number of directions.

    Folding a task in is a truncated eigendecomposition of the sum; what is cut off stays as a floor under all other
    directions, so that the trace, the number of tasks, is exact. Only second moments are kept: no input, no gradient
    and no row can be read back from them. They do tell along which directions the finished tasks' inputs lay.
    """

    def __init__(self) -> None:
        self._factors: dict[str, Factors] = {}

    def __bool__(self) -> bool:
        return bool(self._factors)

    def fold(self, found: Mapping[str, Factors], rank: int) -> None:
        """Add what was measured in a finished task.

        Args:
            found: factors by layer.
            rank: how many directions are kept of each side, from ``memory_rank``.

        Raises:
            LoricaError: what is remembered is of layers of other widths.
        """
        made: dict[tuple[int, int], Factor] = {}

        def folded(name: str, side: str) -> Factor | None:
            old, new = (getattr(one.get(name), side, None) for one in (self._factors, found))
            if new is None:
                return old
            key = (id(old), id(new))  # what layers have in common is folded, and kept, once
            if key not in made:
                made[key] = _folded(name, old, new, rank)
            return made[key]

        names = [*self._factors, *(name for name in found if name not in self._factors)]
        self._factors = {name: Factors(**{side: folded(name, side) for side in SIDES}) for name in names}

    @property
    def factors(self) -> dict[str, Factors]:
        """The sums by layer; the trace of each is the number of tasks."""
        return dict(self._factors)

    def state_dict(self) -> dict[str, Tensor]:
        """Return each distinct factor's tensors, and by layer the numbers of its two factors (-1: none)."""
        distinct = _distinct(self._factors)
        number = {id(factor): index for index, factor in enumerate(distinct)}
        state: dict[str, Tensor] = {}
        for index, factor in enumerate(distinct):
            floor = torch.tensor([factor.floor], dtype=torch.float64)
            state[f"{index}.vectors"] = factor.vectors_DR
            state[f"{index}.energies"] = torch.cat([factor.energies_R, floor])
        for name, factors in self._factors.items():
            sides = [number.get(id(getattr(factors, side)), -1) for side in SIDES]
            state[f"{name}.sides"] = torch.tensor(sides)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state_dict`` returned."""
        distinct = {}
        for key in state:
            if key.endswith(".vectors"):
                index = key.removesuffix(".vectors")
                energies = state[f"{index}.energies"]
                distinct[int(index)] = Factor(state[key], energies[:-1], float(energies[-1]))
        sides = {key.removesuffix(".sides"): value.tolist() for key, value in state.items() if key.endswith(".sides")}
        self._factors = {name: Factors(*(distinct.get(index) for index in both)) for name, both in sides.items()}


def memory_rank(dims: Sequence[int], nbytes: float) -> int:
    """Return how many directions of each side fit: the largest R for which vectors, energies and floors of all do.

    Args:
        dims: D of each side; that layers may have one in common is left out of account.
        nbytes: at least so many bytes are allowed that one direction of each fits.
    """
    number, energy = torch.finfo(KEPT_AS).bits // 8, 8
    low, high = 1, max(dims)
    while low < high:
        middle = (low + high + 1) // 2
        fits = sum((number * dim + energy) * min(dim, middle) + energy for dim in dims) <= nbytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _folded(name: str, old: Factor | None, new: Factor, rank: int) -> Factor:
    trace = new.trace
    scaled = new.scaled(1 / trace) if trace > 0 else new
    if old is not None:
        old.check_side(name, new.dim)
    both = scaled.cut_to(rank) if old is None else scaled.plus(old, rank)
    return both.aside(KEPT_AS)


def _distinct(found: Mapping[str, Factors]) -> list[Factor]:
    """Return each factor once, in an order that does not depend on that of the layers."""
    every = (getattr(found[name], side) for name in sorted(found) for side in SIDES)
    return list({id(factor): factor for factor in every if factor is not None}.values())
