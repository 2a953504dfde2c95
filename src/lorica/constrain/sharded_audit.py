"""The audit of layers that FSDP2 has sharded: each by its owner, who has W0 and the bases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorica import processes
from lorica.constrain.audit_report import AuditRow
from lorica.constrain.audit_weight import audit_weight
from lorica.constrain.linear import SubspaceLayer
from lorica.constrain.protect import protected_of
from lorica.constrain.reduced import lift
from lorica.constrain.sharded import turns
from lorica.constrain.transport import to_owners
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import MEASURED


class Trained(NamedTuple):
    """What became of one layer: W0 and W as they are stored (M x N), and the change before it was rounded."""

    name: str
    before_MN: Tensor
    after_MN: Tensor
    delta_MN: Tensor


def audit_sharded(layers: Mapping[str, SubspaceLayer], plan: Plan) -> list[AuditRow]:
    """Return the audit of every sharded layer, the same in all processes, which all have to call this."""
    entries = {entry.name: entry for entry in plan.entries}
    own = []
    for name, before, after, delta in _own(layers):
        entry = entries[name]
        held = protected_of(layers[name]) if entry.source in MEASURED else None  # what was measured is in the bases
        row = audit_weight(before, after, entry, None, plan.learned(name), master_delta_MN=delta, directions=held)
        own.append(asdict(row))
    told = {row["name"]: row | {"shape": tuple(row["shape"])} for part in processes.gathered(own) for row in part}
    return [AuditRow(**told[name]) for name in entries if name in told]


@torch.no_grad()
def _own(layers: Mapping[str, SubspaceLayer]) -> Iterator[Trained]:
    """Yield the layers that this process owns; in turns, so that no process holds more than one whole weight."""
    alike: dict[tuple[Any, ...], list[tuple[int, str]]] = {}
    for name, layer in layers.items():
        if (shards := layer.shards) is not None:
            kind = (shards.group, shards.core.dtype, shards.weight.dtype)
            alike.setdefault(kind, []).append((shards.owner, name))
    for (group, *_), owned in alike.items():
        for turn in turns(owned, group.size()):
            parts = [None if name is None else layers[name].shards for name in turn]
            core_PQ = to_owners([None if one is None else one.core for one in parts], group)
            weight = to_owners([None if one is None else one.weight for one in parts], group)
            own = turn[group.rank()]
            if own is not None and core_PQ is not None and weight is not None:
                yield _trained(own, layers[own], core_PQ, weight)


def _trained(name: str, layer: SubspaceLayer, core_PQ: Tensor, weight: Tensor) -> Trained:
    before_MN = layer.base.to(core_PQ.device)
    out, inp = (side.mapped(lambda part: part.to(core_PQ.device)) for side in layer.exact_bases)
    delta_MN = lift(core_PQ, out.on(before_MN), inp.on(before_MN.T))
    return Trained(name, before_MN, weight.T if layer.transposed else weight, delta_MN)
