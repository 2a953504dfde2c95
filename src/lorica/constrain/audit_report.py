"""What an audit found: one row per weight, the table and the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

TOLERANCE = 1e-5
"""The largest share of a float32 change that may lie in protected directions."""

FLOOR_FACTOR = 1.3
"""How far above the rounding floor of the stored dtype a leakage may be."""

VERDICTS = {
    "LEAKS": "{} weights leak",
    "holds": "the constraint holds in {} weights",
    "cannot be told at this dtype": "it cannot be told at this dtype in {} weights, which changed too little for it",
    "cannot be told without the directions": "it cannot be told without the directions in {} weights",
    "nothing changed": "nothing changed in {} weights",
    "nothing is protected": "nothing is protected in {} weights",
}
"""What can be said of one weight, and of how many of a whole update."""

_LISTED = 10


@dataclass(frozen=True)
class AuditRow:
    """What happened to one weight. All but ``name``, ``shape``, ``k`` and ``constraint`` are shares of norms.

    Attributes:
        leak_u, leak_v: share of the stored change in protected output / input directions; for ``block`` both
            are the share of ``U^T D V``. None for a side that the plan does not protect, or of which nothing can be
            told without its directions (see ``audit_by_rank``).
        unconstrained_u, unconstrained_v: what a random change of this shape would have.
        floor_u, floor_v: what rounding to the stored dtype alone would cause.
        relative_change: |D| / |W before|.
        master_leak_u, master_leak_v: the same as ``leak_u``, ``leak_v`` of the change before it was rounded to
            the stored dtype; None where only stored weights are at hand.
        spectrum: singular values of the weight before, thinned (see ``spectrum_points``), for the report; None
            where the protected directions do not come from the weight.
    """

    name: str
    shape: tuple[int, int]
    k: int
    constraint: str
    leak_u: float | None
    leak_v: float | None
    unconstrained_u: float | None
    unconstrained_v: float | None
    floor_u: float | None
    floor_v: float | None
    relative_change: float
    master_leak_u: float | None = None
    master_leak_v: float | None = None
    spectrum: dict[str, list[Any]] | None = None

    @property
    def holds(self) -> bool:
        """Whether no protected side leaks.

        The master change, where it is known, must be within ``TOLERANCE``; the stored one as well, or within
        ``FLOOR_FACTOR`` times its rounding floor where that is coarser.
        """
        sides = ((self.leak_u, self.floor_u), (self.leak_v, self.floor_v))
        stored = all(leak <= max(TOLERANCE, FLOOR_FACTOR * (floor or 0.0)) for leak, floor in sides if leak is not None)
        return stored and all(leak <= TOLERANCE for leak in self._master)

    @property
    def visible(self) -> bool:
        """Whether the stored dtype is fine enough to tell a constrained change of this size from any other."""
        sides = ((self.floor_u, self.unconstrained_u), (self.floor_v, self.unconstrained_v))
        return all(FLOOR_FACTOR * floor < free for floor, free in sides if floor is not None and free is not None)

    @property
    def verdict(self) -> str:
        """What can be said of this weight, one of ``VERDICTS``."""
        if self.leak_u is None and self.leak_v is None:
            return "cannot be told without the directions" if self.k else "nothing is protected"
        if not self.holds:
            return "LEAKS"
        if self.relative_change == 0:
            return "nothing changed"
        return "holds" if self.visible or self._master else "cannot be told at this dtype"

    @property
    def worst(self) -> float:
        """The larger leakage of the two sides."""
        return max(leak for leak in (self.leak_u, self.leak_v, 0.0) if leak is not None)

    @property
    def master_worst(self) -> float | None:
        """The larger leakage of the two sides of the master change, None where it is not known."""
        return max(self._master, default=None)

    @property
    def _master(self) -> list[float]:
        return [leak for leak in (self.master_leak_u, self.master_leak_v) if leak is not None]

    def figures(self) -> str:
        """Return the figures of the row and its verdict, as the table prints them."""
        floor = max((value for value in (self.floor_u, self.floor_v) if value is not None), default=None)
        leaks = [self.relative_change, self.leak_u, self.leak_v, self.master_worst]
        free = [self.unconstrained_u, self.unconstrained_v]
        cells = [f"{self.k}", *map(_small, leaks), *("-" if x is None else f"{x:.2f}" for x in free), _small(floor)]
        return " ".join(f"{cell:>8}" for cell in cells) + f"  {self.verdict}"


@dataclass
class AuditReport:
    """The audit of a whole update.

    Attributes:
        rows: one per weight of the plan.
        elsewhere: relative change of every other tensor that changed, by key.
        differences: what cannot be compared, by key: tensors that only one of the two has, or of another shape.
        assumed: what the audit took for granted (a plan, names without a prefix); empty if nothing.
    """

    rows: list[AuditRow]
    elsewhere: dict[str, float] = field(default_factory=dict)
    differences: dict[str, str] = field(default_factory=dict)
    assumed: str = ""

    @property
    def holds(self) -> bool:
        """Whether no weight of the plan leaks. True also where there is nothing to see: read the verdict."""
        return all(row.holds for row in self.rows)

    @property
    def worst(self) -> float:
        """The largest leakage of all weights."""
        return max((row.worst for row in self.rows), default=0.0)

    def to_records(self) -> list[dict[str, Any]]:
        """Return the rows as plain dictionaries, for the run record."""
        return [
            asdict(row) | {"shape": list(row.shape), "holds": row.holds, "verdict": row.verdict} for row in self.rows
        ]

    def table(self) -> str:
        """Return the audit as text."""
        width = max((len(row.name) for row in self.rows), default=6)
        heads = ("k", "change", "leak U", "leak V", "master", "free U", "free V", "floor")
        lines = [f"{'weight':{width}} " + " ".join(f"{head:>8}" for head in heads)]
        lines += [f"{row.name:{width}} {row.figures()}" for row in self.rows]
        lines.append("leak: share of the change in protected directions; master: the larger one before rounding;")
        lines.append("free: the same for an unconstrained change; floor: what rounding to the stored dtype causes")
        if self.elsewhere:
            largest = sorted(self.elsewhere.items(), key=lambda item: -item[1])
            shown = _first(f"{key} ({change:.1e})" for key, change in largest)
            lines.append(f"{len(largest)} tensors outside the plan changed: {shown}")
        if self.differences:
            shown = _first(f"{key} ({what})" for key, what in self.differences.items())
            lines.append(f"{len(self.differences)} tensors cannot be compared: {shown}")
        return "\n".join([*lines, self.verdict()])

    def verdict(self) -> str:
        """Return the result in one sentence, which claims no more than can be seen."""
        counts, total = Counter(row.verdict for row in self.rows), len(self.rows)
        said = {verdict: f"{count} of {total}" for verdict, count in counts.items()}
        if counts["holds"] == total:
            said["holds"] = f"all {total}"
        found = [phrase.format(said[verdict]) for verdict, phrase in VERDICTS.items() if verdict in said]
        result = ", ".join(found) if self.rows else "nothing is protected"
        if counts.keys() - {"nothing changed", "nothing is protected"}:
            result += f"; worst leakage {self.worst:.1e}"
            master = [row.master_worst for row in self.rows if row.master_worst is not None]
            result += f" as stored, {max(master):.1e} before rounding" if master else ""
        return f"{self.assumed}{'; ' if self.assumed else ''}{result}"

    def __str__(self) -> str:
        return self.table()


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _first(items: Iterable[str]) -> str:
    shown = list(items)
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return ", ".join(shown[:_LISTED]) + more
