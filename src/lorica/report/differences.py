"""Whether two methods differ by more than chance, on the same rows and over the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorica.bootstrap import Interval, interval, paired_difference, t_interval
from lorica.report.records import RunRecord
from lorica.report.replicates import Estimate, MethodRuns, at_end
from lorica.scores import FloatArray
from lorica.units import MISSING

Rows = dict[str, FloatArray]


@dataclass(frozen=True)
class Gap:
    """How far one method's average accuracy at the end is above another's, in points.

    Attributes:
        rows: with the paired bootstrap interval over test rows; None where there are not the same rows for both.
        seeds: with the t-interval over seeds that both ran in the same orders; None for fewer than two.
    """

    rows: Interval | None
    seeds: Interval | None

    @property
    def mean(self) -> float | None:
        """The difference itself; None where the two have nothing in common."""
        found = self.rows or self.seeds
        return found.mean if found else None

    @property
    def beyond_chance(self) -> bool:
        """Whether zero lies outside of every interval there is."""
        found = [one for one in (self.rows, self.seeds) if one is not None]
        return bool(found) and all(_excludes_zero(one) for one in found)

    @property
    def verdict(self) -> str:
        """Whether it is more than chance, in words; of one seed only as far as test rows can tell."""
        if not self.beyond_chance:
            return "no"
        return "yes" if self.seeds else "yes, over rows alone"

    def told(self) -> str:
        """Return ``+12.3 [10.1, 14.4]``, of several seeds ``+12.3 [10.1, 14.4], seeds [8.0, 16.6]``."""
        if self.mean is None:
            return MISSING
        rows = f" {told_ends(self.rows)}" if self.rows else ""
        return f"{self.mean:+.1f}{rows}" + (f", seeds {told_ends(self.seeds)}" if self.seeds else "")


def gap(a: MethodRuns, b: MethodRuns) -> Gap:
    """Return how far ``a`` ends above ``b``, from the runs of the same order and seed alone.

    Over rows: each row's difference is averaged over those runs, and rows are resampled within their task. That is
    the uncertainty of a finite test set and not that of training, which only several seeds can tell.
    """
    pairs = [(x, y) for x in a.cells for y in b.cells if (x.order, x.seed) == (y.order, y.seed)]
    return Gap(_over_rows(pairs), _over_seeds(pairs))


def rows_interval(runs: MethodRuns, names: Sequence[str]) -> Interval | None:
    """Return the mean over tasks or abilities at the end with its bootstrap interval over test rows.

    The score of a row is its mean over the runs. None where a run did not keep its rows, or scored others.
    """
    rows = _mean_rows(runs.cells, names)
    return interval(rows) if rows else None


def known_ends(found: Estimate | Interval | None) -> tuple[float, float] | None:
    """Return the ends of an interval; None where there are none."""
    return None if found is None or found.low is None or found.high is None else (found.low, found.high)


def told_ends(found: Estimate | Interval | None) -> str:
    """Return the ends of an interval: ``[10.1, 14.4]``."""
    known = known_ends(found)
    return f"[{known[0]:.1f}, {known[1]:.1f}]" if known else MISSING


def _over_rows(pairs: Sequence[tuple[RunRecord, RunRecord]]) -> Interval | None:
    names = sorted(pairs[0][0].tasks) if pairs else []
    if not pairs or not _same_rows([cell for pair in pairs for cell in pair], names):
        return None
    first, second = (_mean_rows([pair[side] for pair in pairs], names) for side in (0, 1))
    return paired_difference(first, second) if first and second else None


def _over_seeds(pairs: Sequence[tuple[RunRecord, RunRecord]]) -> Interval | None:
    """Return the t-interval of each seed's difference, its mean over the orders; every seed must have all of them."""
    orders = {x.order for x, _ in pairs}
    by_seed: dict[int | None, list[float]] = {}
    for x, y in pairs:
        ours, theirs = at_end(x), at_end(y)
        if ours is None or theirs is None:
            return None
        by_seed.setdefault(x.seed, []).append(ours - theirs)
    values = [float(np.mean(found)) for found in by_seed.values() if len(found) == len(orders)]
    return t_interval(values) if len(values) > 1 else None


def _mean_rows(cells: Sequence[RunRecord], names: Sequence[str]) -> Rows | None:
    if not names or not _same_rows(cells, names):
        return None
    rows: Rows = {}
    for name in names:
        known = [cell.rows[name] for cell in cells if name in cell.rows]
        if len(known) < len(cells) or not np.isfinite(known).all():
            return None
        rows[name] = np.mean(known, axis=0)
    return rows


def _same_rows(cells: Sequence[RunRecord], names: Sequence[str]) -> bool:
    """Tell whether runs were scored on the same rows, as far as their records say."""
    return all(len({(_file(cell, name), _drawn(cell), len(cell.rows.get(name, ()))) for cell in cells}) == 1
               for name in names)  # fmt: skip


def _file(cell: RunRecord, name: str) -> object:
    parts = cell.data.get(name)
    test = parts.get("test") if isinstance(parts, dict) else None
    return test.get("sha256") if isinstance(test, dict) else None


def _drawn(cell: RunRecord) -> object:
    """Return what decides which rows of a file are scored: the limit and the seed that draws, if there is a limit."""
    limit, run = cell.limits().get("max_test_rows"), cell.config.get("run")
    return (limit, *run.get("seeds", [])[:1]) if limit and isinstance(run, dict) else None  # the first seed draws


def _excludes_zero(found: Interval) -> bool:
    return found.low is not None and found.high is not None and not found.low <= 0 <= found.high
