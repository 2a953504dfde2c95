"""The bases of a plan's weights, one weight after the other; layers with the same input and directions share one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorica.constrain.kept import KeptBases
from lorica.errors import LoricaError
from lorica.subspace.basis import Basis, Everything, Explicit, Reflector
from lorica.subspace.derived import Derived
from lorica.subspace.factor import Factor
from lorica.subspace.free_basis import free_basis
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import PlanEntry
from lorica.subspace.sources import Protected, protected_directions
from lorica.subspace.store import SplitStore

WIDE = (torch.float32, torch.float64)
SIDES = ("out", "in")
"""Output and input directions, as the tensors of a layer's bases are named: ``LAYER.out.z_DK``."""


class Bases:
    """What the free directions of each weight are; what was split before is read from the cache of splits.

    The tensors are laid out in rows, whatever computed them: products of them are then, to the last bit, those of the
    same tensors read from a file.

    Args:
        plan: what is protected.
        memory: ``fast`` or ``lean``.
        kept: what an earlier process made of the same weights; nothing is then split.
    """

    def __init__(self, plan: Plan, memory: str, kept: KeptBases | None = None) -> None:
        self.plan = plan
        self.lean = memory == "lean"
        self._store = SplitStore.from_environment()
        self._shared: dict[tuple[int, Factor], Basis] = {}
        self._kept = kept
        self._read: dict[tuple[str, ...], Basis] = {}

    def of(self, entry: PlanEntry, weight_MN: Tensor) -> tuple[Basis, Basis]:
        """Return Q_U and Q_V of one weight.

        Raises:
            LoricaError: the bases that were kept are not those of the plan.
        """
        if self._kept is not None:
            kept, name = self._kept, entry.name
            sides = zip(SIDES, entry.shape, entry.protected, strict=True)
            out, inp = (self._side(kept, f"{name}.{side}", dim, bool(count)) for side, dim, count in sides)
            return out, inp
        dtype = torch.float64 if weight_MN.dtype == torch.float64 else torch.float32
        u_MA, v_NB = self._directions(entry, weight_MN)
        # Read off a weight of 16 bits the long side costs less than the weight; stored in float32 it costs more.
        derived = entry.source == "weight" and not any(entry.learned) and (self.lean or weight_MN.dtype not in WIDE)
        out = free_basis(u_MA, dtype, weight_MN if derived else None).mapped(Tensor.contiguous)
        key = self._input_alone(entry)
        if key in self._shared:
            self._shared[key].shared = True
            return out, self._shared[key]
        inp = free_basis(v_NB, dtype, weight_MN.T if derived else None).mapped(Tensor.contiguous)
        if key is not None:
            self._shared[key] = inp
        return out, inp

    def _side(self, kept: KeptBases, name: str, dim: int, constrained: bool) -> Basis:
        names = {leaf: f"{name}.{leaf}" for leaf in _LEAVES if f"{name}.{leaf}" in kept}
        if constrained != bool(names):
            raise LoricaError(f"{kept.file} does not belong to this plan: it holds {len(names)} tensors of {name}")
        places = tuple(map(kept.place, names.values()))
        if places in self._read:
            self._read[places].shared = True
            return self._read[places]
        basis = stored_basis(dim, {leaf: kept.tensor(one) for leaf, one in names.items()})
        if names:
            self._read[places] = basis
        return basis

    def _directions(self, entry: PlanEntry, weight_MN: Tensor) -> Protected:
        if weight_MN.is_meta:
            m, n = entry.shape
            a, b = entry.protected
            blank = torch.empty(0, dtype=torch.float64, device="meta")
            return Protected(blank.new_empty(m, a), blank.new_empty(n, b))
        known = (self.plan.factors(entry.name), self.plan.learned(entry.name))
        return protected_directions(weight_MN, entry, *known, self._store)

    def _input_alone(self, entry: PlanEntry) -> tuple[int, Factor] | None:
        """Return what the input side follows from where the weight has no part in it: layers may have it in common."""
        count, factors = entry.given[1], self.plan.factors(entry.name)
        alone = count and entry.source in ("activation", "curvature") and not any(entry.learned)
        return (count, factors.inputs) if alone and factors is not None and factors.inputs is not None else None


_LEAVES = ("q_DF", "z_DK", "head_KK", "tail_SK")


def stored_basis(dim: int, tensors: Mapping[str, Tensor]) -> Basis:
    """Return the basis that these tensors are stored of, by their names in it; none: nothing is protected.

    Raises:
        LoricaError: it is one of another dimension.
    """
    match tensors:
        case {"q_DF": q_DF}:
            basis: Basis = Explicit(q_DF)
        case {"z_DK": z_DK}:
            basis = Reflector(z_DK)
        case {"head_KK": head_KK, "tail_SK": tail_SK}:
            basis = Derived(head_KK, tail_SK, dim)
        case _:
            basis = Everything(dim)
    if basis.dim != dim:
        raise LoricaError(f"the bases are of weights with a side of {basis.dim}, and the model has {dim} there")
    return basis
