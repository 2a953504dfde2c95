"""What a run takes of each device where several train one model: its memory, and the bytes that come in each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorica.forecast.communication import Layout, Sizes, received_replicated, received_sharded
from lorica.forecast.needs import Phase

SPREAD = ("weights", "W0", "bases", "cores", "gradients", "optimizer states")
"""Kinds of memory of which each process has its part where the model is sharded."""

GATHERED, BUCKETS = "gathered while in use", "gradients in buckets"
EXTRA = (GATHERED, BUCKETS)
"""Kinds of memory that only several devices need."""


def state_sharded(sizes: Sizes, shards: int) -> Counter[str]:
    """Return the bytes of a process's part of all that AdamW's training keeps: 1 / R of it.

    The owner of a weight has its W0 and bases whole; each of R processes owns as much as the others, or nearly so.
    """
    trained = sizes.gradients + sizes.cores
    whole = (sizes.parameters, sizes.folded, sizes.bases, sizes.cores, trained, 2 * trained)
    return Counter({kind: -(-nbytes // shards) for kind, nbytes in zip(SPREAD, whole, strict=True) if nbytes})


def gathered(sizes: Sizes, shards: int) -> int:
    """Return the bytes of what a process has whole for a while, at most.

    The root unit; the unit that computes and the next one, which is gathered meanwhile; one unit's gradients, before
    they are reduced; the basis that is lent of one layer, and the gradient that it reduces.
    """
    gradients = min(sizes.unit, sizes.gradients)
    ways = [layer.cheapest(shards) for layer in sizes.layers]
    return sizes.kept + 2 * sizes.unit + gradients + max((way.lent + way.reduced for way in ways), default=0)


@dataclass(frozen=True)
class Share:
    """What each of several devices takes.

    Attributes:
        layout: in words.
        phases: memory in each phase of the run.
        received: bytes in each step, by kind.
    """

    layout: str
    phases: list[Phase]
    received: Mapping[str, int]

    @property
    def peak(self) -> Phase:
        """The phase that holds most of the device's memory."""
        return max(self.phases, key=lambda phase: sum(phase.device.values()))

    @property
    def device_bytes(self) -> int:
        return sum(self.peak.device.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "layout": self.layout,
            "peak_phase": self.peak.name,
            "device_bytes": self.device_bytes,
            "phases": [phase.to_json() for phase in self.phases],
            "received_bytes": dict(self.received),
        }


def shares(phases: Sequence[Phase], sizes: Sizes, layout: Layout, accumulation: int) -> list[Share]:
    """Return what each device takes under DDP, and where FSDP2 has sharded the model before ``protect``.

    Args:
        phases: of one device that trains alone, with the same micro-batches.
        accumulation: micro-batches of a step.
    """
    devices = layout.devices
    buckets = {BUCKETS: sizes.gradients + sizes.cores}
    found = [Share(f"DDP on {devices}", _with(phases, 1, buckets), received_replicated(sizes, devices))]
    if layout.shards > 1:
        words = f"sharded over {layout.shards}" + (f", {layout.replicas} replicas" if layout.replicas > 1 else "")
        parts = _with(phases, layout.shards, {GATHERED: gathered(sizes, layout.shards)})
        found.append(Share(words, parts, received_sharded(sizes, layout, accumulation)))
    return found


def _with(phases: Sequence[Phase], shards: int, training: Mapping[str, int]) -> list[Phase]:
    """Return phases of which each device has its part, and something more in training."""
    return [
        Phase(
            phase.name,
            _parts(phase.device, shards) | (dict(training) if phase.name == "train" else {}),
            _parts(phase.host, shards),
        )
        for phase in phases
    ]


def _parts(kinds: Mapping[str, int], shards: int) -> dict[str, int]:
    return {kind: -(-nbytes // shards) if kind in SPREAD else nbytes for kind, nbytes in kinds.items()}
