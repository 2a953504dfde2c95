"""The result files of benchmarks/ that the speed page is drawn from, and the few questions that are asked of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]
FAMILIES = {
    "plain": "plain fine-tuning",
    "LoRA": "LoRA r=16",
    "lorica fast": "**Lorica**, fast",
    "lorica lean": "**Lorica**, lean",
    "mini_trainer": "mini_trainer 0.9",
    "peft osf": "PEFT 0.21 `osf`",
}
OURS, PEERS = ("lorica fast", "lorica lean"), ("mini_trainer", "peft osf")


@dataclass(frozen=True)
class Measurement:
    """One result file: its settings, its rows, and the machine it was made on."""

    settings: Row
    rows: list[Row]
    record: Row

    def row(self, family: str, share: float | None = 0.75) -> Row | None:
        """Return the row of a family at a protected share; families that protect nothing have one row."""
        alone = family in ("plain", "LoRA")
        found = (r for r in self.rows if r["family"] == family and (alone or r["protected"] == share))
        return next(found, None)

    @property
    def shares(self) -> list[float]:
        return sorted({row["protected"] for row in self.rows if row["protected"] is not None})

    @property
    def label(self) -> str:
        """Width and tokens per step: ``1024, 2k``."""
        return f"{self.settings['width']}, {thousands(self.settings['tokens'])}"


@dataclass(frozen=True)
class Results:
    """All result files, the smallest configuration first."""

    steps: list[Measurement]
    peaks: list[Measurement]
    tasks: list[Measurement]
    inference: list[Measurement]
    arithmetic: list[Measurement]
    split: Row
    """What scripts/split_time.py wrote."""
    sources: list[Measurement]
    calibration: list[Measurement]

    def at(self, kind: str, width: int, tokens: int) -> Measurement | None:
        """Return the measurement of a kind at a width and a number of tokens per step."""
        found = (m for m in getattr(self, kind) if (m.settings["width"], m.settings["tokens"]) == (width, tokens))
        return next(found, None)

    def cells(self) -> Iterator[tuple[Measurement, float]]:
        """Yield every configuration with every protected share that was measured on it."""
        for one in self.steps:
            for share in one.shares:
                yield one, share


def read(folder: Path) -> Results:
    """Return what lies in a folder of result files; every kind but those about sources has to be there."""
    kinds = {kind: _all(folder, kind) for kind in ("step-time", "peak-memory", "tasks", "inference", "arithmetic")}
    missing = [kind for kind, found in kinds.items() if not found]
    split = folder / "split-time.json"
    missing += [] if split.exists() else ["split-time"]
    if missing:
        raise SystemExit(f"{folder} holds no {missing[0]}*.json; make bench writes it")
    about_sources = (_all(folder, kind) for kind in ("source-time", "calibration-time"))
    return Results(*kinds.values(), json.loads(split.read_text(encoding="utf-8")), *about_sources)


def _all(folder: Path, kind: str) -> list[Measurement]:
    found = []
    for file in sorted(folder.glob(f"{kind}*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        found.append(Measurement(record.pop("settings"), record.pop("rows"), record))
    return sorted(found, key=lambda one: [one.settings.get(key, 0) for key in ("width", "layers", "tokens")])


def time_ratio(one: Measurement, row: Row) -> float:
    """Return a method's step time over that of plain fine-tuning: the ratio of their medians."""
    plain = one.row("plain")
    assert plain is not None
    return row["seconds_median"] / plain["seconds_median"]


def advantage(one: Measurement, ours: str, peer: str, share: float) -> float | None:
    """Return how many times as long as ours a peer's step takes; None where the peer was not measured."""
    mine, theirs = one.row(ours, share), one.row(peer, share)
    return theirs["seconds_median"] / mine["seconds_median"] if mine and theirs else None


def late_over_early(one: Measurement, value: str) -> float:
    """Return what a late task costs over what an early one does: the median over the rounds in which both took turns.

    ``seconds`` adds up a task's parts.
    """
    old, young = ([task_value(row, value) for row in of_stream(one, name)] for name in ("old", "young"))
    return median(late / early for late, early in zip(old[-len(young) + 1 :], young[1:], strict=True))


def of_stream(one: Measurement, name: str) -> list[Row]:
    """Return the tasks of one stream in order, of the ``old`` or of the ``young`` one."""
    return [row for row in one.rows if row["stream"] == name]


def task_value(row: Row, value: str) -> float:
    """Return one figure of a task; ``seconds`` is protect, every step and release together."""
    if value != "seconds":
        return row[value]
    return row["protect_seconds"] + row["steps_seconds"] + row["release_seconds"]


def peak(row: Row, kind: str, phases: tuple[str, ...] = ("load", "protect", "train", "release", "save")) -> float:
    """Return the largest peak over some phases, bytes; ``kind`` is ``rss`` or ``anonymous``."""
    return max(row["phases"][phase][f"peak_{kind}"] for phase in phases)


def beside_training(row: Row) -> float:
    """Return the peak of load, protect, release and save over what training holds between steps, the worse kind."""
    quiet = ("load", "protect", "release", "save")
    return max(peak(row, kind, quiet) / row["phases"]["train"][f"end_{kind}"] for kind in ("rss", "anonymous"))


def thousands(tokens: int) -> str:
    """``2k`` for 2048."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
