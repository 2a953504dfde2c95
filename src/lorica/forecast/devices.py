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


def on_their_way(sizes: Sizes, shards: int) -> int:
    """Return the bytes of what an offload brings from the host for a while: parts of units, and a layer to fold."""
    return -(-2 * sizes.unit // shards) + max((layer.owned for layer in sizes.layers), default=0)


def _at_rest_on_host(phase: Phase) -> Phase:
    """Return a phase in which the host holds what is spread; while it is loaded it passes through the device."""
    if phase.name == "load":
        return phase
    moved = {kind: nbytes for kind, nbytes in phase.device.items() if kind in SPREAD}
    device = {kind: nbytes for kind, nbytes in phase.device.items() if kind not in moved}
    return Phase(phase.name, device, dict(Counter(phase.host) + Counter(moved)))


@dataclass(frozen=True)
class Share:
    """What each of several devices takes.

    Attributes:
        layout: in words.
        phases: memory in each phase of the run; of the host what this process takes there.
        received: bytes in each step from other devices, by kind.
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

    @property
    def host_bytes(self) -> int:
        """The most on the host beside a GPU."""
        return max(sum(phase.host.values()) for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        return {
            "layout": self.layout,
            "peak_phase": self.peak.name,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
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
        whole = gathered(sizes, layout.shards)
        if layout.offload:
            words, whole = f"{words}, offloaded", whole + on_their_way(sizes, layout.shards)
        parts = _with(phases, layout.shards, {GATHERED: whole})
        if layout.offload:
            parts = [_at_rest_on_host(phase) for phase in parts]
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
