"""The bases of a plan's weights, one weight after the other; layers with the same input and directions share one."""

from __future__ import annotations

import torch
from torch import Tensor

from lorica.subspace.basis import Basis, Everything, free_basis
from lorica.subspace.plan import Plan, PlanEntry
from lorica.subspace.sources import Protected, protected_directions
from lorica.subspace.store import SplitStore

WIDE = (torch.float32, torch.float64)


class Bases:
    """What the free directions of each weight are; what was split before is read from the cache of splits.

    Args:
        plan: what is protected.
        memory: ``fast`` or ``lean``.
    """

    def __init__(self, plan: Plan, memory: str) -> None:
        self.plan = plan
        self.lean = memory == "lean"
        self._store = SplitStore.from_environment()
        self._shared: list[tuple[int, Tensor, Basis]] = []

    def of(self, entry: PlanEntry, weight_MN: Tensor) -> tuple[Basis, Basis]:
        """Return Q_U and Q_V of one weight."""
        dtype = torch.float64 if weight_MN.dtype == torch.float64 else torch.float32
        moment = self._input_alone(entry)
        known = self._found(entry.k, moment) if moment is not None else None
        if known is not None:
            known.shared = True
            return Everything(entry.shape[0]), known
        u_MA, v_NB = self._directions(entry, weight_MN)
        # Read off a weight of 16 bits the long side costs less than the weight; stored in float32 it costs more.
        derived = entry.source == "weight" and not any(entry.learned) and (self.lean or weight_MN.dtype not in WIDE)
        out = free_basis(u_MA, dtype, weight_MN if derived else None)
        inp = free_basis(v_NB, dtype, weight_MN.T if derived else None)
        if moment is not None:
            self._shared.append((entry.k, moment, inp))
        return out, inp

    def _directions(self, entry: PlanEntry, weight_MN: Tensor) -> Protected:
        if weight_MN.is_meta:
            m, n = entry.shape
            a, b = entry.protected
            blank = torch.empty(0, dtype=torch.float64, device="meta")
            return Protected(blank.new_empty(m, a), blank.new_empty(n, b))
        known = (self.plan.moment(entry.name), self.plan.learned(entry.name))
        return protected_directions(weight_MN, entry, *known, self._store)

    def _input_alone(self, entry: PlanEntry) -> Tensor | None:
        """Return the measured moment where it alone, and not the weight, says what is protected."""
        alone = entry.k and entry.source == "activation" and not any(entry.learned)
        return self.plan.moment(entry.name) if alone else None

    def _found(self, k: int, moment_NN: Tensor) -> Basis | None:
        """Return the basis of an earlier weight with the same directions: of layers that saw the same input."""
        alike = (basis for count, other, basis in self._shared if count == k and torch.equal(other, moment_NN))
        return next(alike, None)
