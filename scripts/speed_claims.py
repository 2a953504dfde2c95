"""What is claimed about speed and memory, each claim beside the figure that the result files give it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import ge, gt, le, lt
from statistics import median

from speed_results import OURS, PEERS, Measurement, Results, advantage, beside_training, late_over_early, time_ratio


@dataclass(frozen=True)
class Claim:
    """A bound and the worst figure that was measured; ``found`` None: nothing was measured that could hold it."""

    what: str
    sign: str
    bound: float
    found: float | None
    unit: str = ""

    @property
    def holds(self) -> bool:
        compare: dict[str, Callable[[float, float], bool]] = {"<=": le, ">=": ge, "<": lt, ">": gt}
        return self.found is not None and compare[self.sign](self.found, self.bound)

    def told(self, value: float | None) -> str:
        """Return a value of this claim as it is printed."""
        form = ".1e" if self.bound < 1e-3 else ".1f" if self.unit else ".3f"
        return "-" if value is None else f"{value:{form}}{self.unit}"


def claims(results: Results) -> list[Claim]:
    """Return every claim, the worst case of each over all that was measured."""
    parts = (_steps(results), _state(results), of_sources(results.sources), _arithmetic(results), _the_rest(results))
    return [claim for part in parts for claim in part]


def _steps(results: Results) -> list[Claim]:
    wide = [one for one in results.steps if one.settings["width"] >= 1024]
    found = []
    for tokens, bound in ((2048, 1.05), (8192, 1.00)):
        ratios = _ratios([one for one in wide if one.settings["tokens"] == tokens])
        what = f"step time over plain fine-tuning, width 1024 and more, {tokens} tokens, 3/4 protected"
        found.append(Claim(what, "<=", bound, max(ratios, default=None)))
    ours = "lorica fast"
    for peer, bound in zip(PEERS, (1.4, 1.6), strict=True):
        times = [x for one, share in results.cells() if (x := advantage(one, ours, peer, share)) is not None]
        found.append(
            Claim(f"step time of {peer} over ours, the worst configuration", ">", 1.0, min(times, default=None))
        )
        found.append(
            Claim(f"step time of {peer} over ours, median of all", ">=", bound, median(times) if times else None)
        )
    leaks = [row["leakage"] for one in results.steps for row in one.rows if row["family"] in OURS]
    found.append(Claim("share of a change in protected directions", "<=", 1e-5, max(leaks, default=None)))
    return found


def _ratios(measurements: Iterable[Measurement]) -> list[float]:
    return [time_ratio(one, row) for one in measurements if (row := one.row("lorica fast"))]


def _state(results: Results) -> list[Claim]:
    found = []
    for family, bound in zip(OURS, (0.90, 0.55), strict=True):
        ratios = [row["state_ratio"] for one in results.steps if (row := one.row(family))]
        what = f"training state over plain fine-tuning, {family.split()[1]}, 3/4 protected"
        found.append(Claim(what, "<=", bound, max(ratios, default=None)))
    shares = [
        mine["state_bytes"] / theirs["state_bytes"]
        for one, share in results.cells()
        for peer in PEERS
        if (mine := one.row("lorica lean", share)) and (theirs := one.row(peer, share))
    ]
    found.append(Claim("training state of lean over that of a peer, the worst", "<", 1.0, max(shares, default=None)))
    return found


def of_sources(measurements: list[Measurement]) -> list[Claim]:
    """Return what is claimed of ``curvature`` beside ``weight``, once that was measured."""
    rows = [row for one in measurements for row in one.rows if row["source"] == "curvature"]
    if not rows:
        return []
    figures = {"step time": [r["ratio"]["median"] for r in rows], "training state": [r["state_ratio"] for r in rows]}
    return [Claim(f"{what} of curvature over weight", "<=", 1.02, max(found)) for what, found in figures.items()]


def _arithmetic(results: Results) -> list[Claim]:
    (counted,) = results.arithmetic
    largest = "Llama-3.1-8B"
    rows = {row["family"]: row for row in counted.rows if row["model"] == largest and row["protected"] == 0.75}
    return [
        Claim(f"training state of {largest} in bf16, 3/4 protected, {family.split()[1]}", "<=", bound,
              rows[family]["state_bytes"] / 1e9, " GB")
        for family, bound in zip(OURS, (63, 46), strict=True)
    ]  # fmt: skip


def _the_rest(results: Results) -> list[Claim]:
    found = []
    for activity in ("evaluation", "generation"):
        ratios = [
            row["ratio"]["median"]
            for one in results.inference
            for row in one.rows
            if row["activity"] == activity and row["family"] in OURS
        ]
        found.append(
            Claim(f"{activity} of a protected model over the plain one", "<=", 1.02, max(ratios, default=None))
        )
    for value, what in (("seconds", "time"), ("state_bytes", "state"), ("resident_bytes", "resident memory")):
        ratios = [late_over_early(one, value) for one in results.tasks]
        found.append(Claim(f"{what} of a late task over an early one", "<=", 1.05, max(ratios)))
    deepest = max(results.peaks, key=lambda one: one.settings["layers"])
    peaks = [beside_training(row) for row in deepest.rows if row["family"] in OURS]
    what = "peak of load, protect, release and save over what training holds"
    return [*found, Claim(what, "<=", 1.15, max(peaks, default=None))]
