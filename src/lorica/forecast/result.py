"""A forecast as data, as JSON and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorica.forecast.communication import TRAFFIC
from lorica.forecast.devices import EXTRA, Share
from lorica.forecast.dry_run import Batch
from lorica.forecast.ledger import KINDS
from lorica.forecast.measuring import DIRECTIONS, MOMENTS, REHEARSED
from lorica.forecast.needs import FREED, PHASES, PROCESS, WORKSPACE, Disk, Phase
from lorica.forecast.rates import Machine
from lorica.units import MISSING, estimate, size

SCHEMA = 1
_SHOWN = 1000
"""Bytes below which a kind has no row."""


@dataclass(frozen=True)
class Way:
    """What one way of training needs.

    Attributes:
        label: its name in the table.
        trainable: numbers that train.
        phases: memory in each phase of the run.
        measure_seconds: estimate of what the model writes before the run and is measured on; 0: nothing.
        split_seconds, step_seconds: estimates; None where a rate is not known.
        shares: what each of several devices takes, for each layout; empty for one device.
    """

    label: str
    trainable: int
    phases: list[Phase]
    disk: Disk
    measure_seconds: float | None
    split_seconds: float | None
    step_seconds: float | None
    shares: list[Share] = field(default_factory=list)

    @property
    def peak(self) -> Phase:
        """The phase that holds most of the device's memory."""
        return max(self.phases, key=lambda phase: sum(phase.device.values()))

    @property
    def device_bytes(self) -> int:
        return sum(self.peak.device.values())

    @property
    def host_bytes(self) -> int:
        """The most on the host beside a GPU; 0 on a CPU, whose memory is the device's."""
        return max(sum(phase.host.values()) for phase in self.phases)

    def run_seconds(self, steps: int | None) -> float | None:
        """Return the seconds of measuring, of the split and of all steps."""
        before = (self.measure_seconds, self.split_seconds)
        if steps is None or self.step_seconds is None or before[0] is None or before[1] is None:
            return None
        return before[0] + before[1] + steps * self.step_seconds

    def to_json(self, steps: int | None) -> dict[str, Any]:
        return {
            "label": self.label,
            "trainable": self.trainable,
            "peak_phase": self.peak.name,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "phases": [phase.to_json() for phase in self.phases],
            "disk": self.disk.to_json(),
            "measure_seconds": self.measure_seconds,
            "split_seconds": self.split_seconds,
            "step_seconds": self.step_seconds,
            "run_seconds": self.run_seconds(steps),
        } | ({"devices": [share.to_json() for share in self.shares]} if self.shares else {})


@dataclass(frozen=True)
class Forecast:
    """What a run will need, beside plain fine-tuning of the same weights.

    Attributes:
        batch: the largest micro-batch.
        steps: of the whole run; None where neither the data nor max_steps tells.
        ways: the run that was asked about first, then plain fine-tuning, unless that is it.
        largest: by memory mode, the largest ``unfreeze_rank_ratio`` that fits the device; None: none does.
        notes: what was assumed.
        disk_free: bytes free where the output folder is to be.
    """

    model: str
    machine: Machine
    batch: Batch
    accumulation: int
    steps: int | None
    ways: list[Way]
    largest: Mapping[str, float | None]
    notes: list[str]
    disk_free: int | None

    def fits(self, memory: int) -> bool:
        """Tell whether the run that was asked about fits so many bytes of memory: of several devices in any layout."""
        first = self.ways[0]
        return min((share.device_bytes for share in first.shares), default=first.device_bytes) <= memory

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": "forecast",
            "model": self.model,
            "machine": self.machine.to_json(),
            "batch": vars(self.batch) | {"accumulation": self.accumulation},
            "steps": self.steps,
            "ways": [way.to_json(self.steps) for way in self.ways],
            "largest_unfreeze_rank_ratio": dict(self.largest),
            "fits": self.fits(self.machine.memory),
            "notes": self.notes,
            "disk_free_bytes": self.disk_free,
        }

    def table(self) -> str:
        """Return the forecast as text: one column for each way of training."""
        rows = self._rows() + [row for i in range(len(self.ways[0].shares)) for row in self._rows_of_share(i)]
        lines = [self._head(), "", *columns(rows, [way.label for way in self.ways]), "", self._verdict()]
        return "\n".join([*lines, *self._shares(), *(f"assumed: {note}" for note in self.notes)])

    def __str__(self) -> str:
        return self.table()

    def _head(self) -> str:
        b = self.batch
        target = f" and {b.labels}" if b.labels is not None else ""
        micro = f" x {self.accumulation} micro-batches" if self.accumulation > 1 else ""
        steps = f", {self.steps} steps" if self.steps is not None else ""
        batch = f"largest batch {b.rows} rows of {b.length}{target} tokens{micro}{steps}"
        return f"{self.model} on {self.machine.name}: {batch}"

    def _rows(self) -> list[tuple[str, list[str]]]:
        ways = self.ways
        where = "memory" if self.machine.device == "cpu" else "device memory"
        rows = [(f"{where} at the peak", [f"in {way.peak.name}" for way in ways])]
        rows += _by_kind([way.peak.device for way in ways])
        rows.append(("  sum", [size(way.device_bytes) for way in ways]))
        there = [name for name in PHASES if any(phase.name == name for phase in ways[0].phases)]
        rows += [(f"  while it runs: {name}", [_size_of(_phase_sum(way, name)) for way in ways]) for name in there]
        if self.machine.device != "cpu":
            rows.append(("host memory", [_size_of(way.host_bytes) for way in ways]))
        rows.append(("disk: model", [_size_of(way.disk.model) for way in ways]))
        rows.append(("disk: checkpoints", [_size_of(way.disk.checkpoints) for way in ways]))
        rows.append(("disk: bases", [_size_of(way.disk.bases) for way in ways]))
        rows.append(("disk: cache of splits", [_size_of(way.disk.cache) for way in ways]))
        rows.append(("trainable numbers", [f"{way.trainable:,}" for way in ways]))
        if any(way.measure_seconds for way in ways):
            rows.append(("writing and measuring, estimated", [_estimated(way.measure_seconds) for way in ways]))
        rows.append(("split, estimated", [_estimated(way.split_seconds) for way in ways]))
        rows.append(("step, estimated", [_estimated(way.step_seconds) for way in ways]))
        rows.append(("whole run, estimated", [_estimated(way.run_seconds(self.steps)) for way in ways]))
        return rows

    def _rows_of_share(self, index: int) -> list[tuple[str, list[str]]]:
        shares = [way.shares[index] for way in self.ways]
        rows = [(f"{shares[0].layout}: memory of each", [f"in {share.peak.name}" for share in shares])]
        rows += _by_kind([share.peak.device for share in shares])
        rows.append(("  sum", [size(share.device_bytes) for share in shares]))
        if self.machine.device != "cpu":
            rows.append(("  on the host", [size(share.host_bytes) for share in shares]))
        rows.append(("  received in each step", [_size_of(sum(share.received.values())) for share in shares]))
        there = [kind for kind in TRAFFIC if any(share.received.get(kind) for share in shares)]
        return rows + [(f"    {kind}", [_size_of(share.received.get(kind, 0)) for share in shares]) for kind in there]

    def _verdict(self) -> str:
        first, memory = self.ways[0], self.machine.memory
        needs = {f", {share.layout}": share.device_bytes for share in first.shares} or {"": first.device_bytes}
        words = [(where, need, "fits" if need <= memory else "does not fit") for where, need in needs.items()]
        told = "\n".join(f"{first.label}{where}: {size(need)} {word} {size(memory)}" for where, need, word in words)
        needed = first.disk.output
        if self.disk_free is not None and needed > self.disk_free:
            told += f"; the disk has {size(self.disk_free)} free and {size(needed)} are needed"
        return told

    def _shares(self) -> list[str]:
        return [
            f"memory_mode {mode}: "
            + (f"unfreeze_rank_ratio up to {share:g} fits" if share is not None else "no unfreeze_rank_ratio fits")
            + (" one device" if self.ways[0].shares else "")
            for mode, share in self.largest.items()
        ]


def _size_of(nbytes: int) -> str:
    """Return a cell of the table, in which nothing is a dash."""
    return size(nbytes) if nbytes else MISSING


def _estimated(seconds: float | None) -> str:
    return "?" if seconds is None else estimate(seconds)


def _by_kind(columns: list[Mapping[str, int]]) -> list[tuple[str, list[str]]]:
    kinds = [PROCESS, *KINDS, MOMENTS, DIRECTIONS, REHEARSED, *EXTRA, FREED, WORKSPACE]
    there = [kind for kind in kinds if any(column.get(kind, 0) >= _SHOWN for column in columns)]
    return [(f"  {kind}", [_size_of(column.get(kind, 0)) for column in columns]) for kind in there]


def _phase_sum(way: Way, name: str) -> int:
    return next((sum(phase.device.values()) for phase in way.phases if phase.name == name), 0)


def columns(rows: list[tuple[str, list[str]]], labels: list[str]) -> list[str]:
    """Return a table of text: a name and then cells in each row, under labels."""
    table = [("", labels), *rows]
    first = max(len(name) for name, _ in table)
    widths = [max(len(cells[i]) for _, cells in table) for i in range(len(labels))]
    return [
        "  ".join([name.ljust(first), *(cell.rjust(w) for cell, w in zip(cells, widths, strict=True))]).rstrip()
        for name, cells in table
    ]
