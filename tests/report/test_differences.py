"""Differences between methods: on the same rows only, and against a bootstrap written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lorica.bootstrap import Interval, paired_difference
from lorica.report.differences import gap, rows_interval
from lorica.report.records import RunRecord
from lorica.report.replicates import MethodRuns, replicates
from lorica.report.standings import best
from tests.report.test_comparison import cell


def runs(method: str, rows: dict[int, dict[str, list[float]]], **changes: Any) -> MethodRuns:
    """Return a method with one run per seed, whose average at the end is that of its rows."""
    records = []
    for seed, by_task in rows.items():
        a, b = (float(np.mean(by_task[task])) for task in "ab")
        record = cell(method, "1", seed, (a, b, a), **changes)
        record["row_scores"] = {task: " ".join(f"{x:g}" for x in scores) for task, scores in by_task.items()}
        records.append(RunRecord.model_validate(record))
    return replicates(records)[0]


def ends(found: Interval | None) -> tuple[float, float]:
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


GOOD = {0: {"a": [100.0] * 30, "b": [100.0] * 10}}
BAD = {0: {"a": [0.0] * 30, "b": [0.0] * 10}}


def test_all_against_nothing() -> None:
    found = gap(runs("osft", GOOD), runs("seqft", BAD))
    assert (found.mean, found.rows.low, found.rows.high) == (100, 100, 100)  # type: ignore[union-attr]
    assert found.beyond_chance
    assert found.told() == "+100.0 [100.0, 100.0]"
    assert found.verdict == "yes, over rows alone", "one seed says nothing of another training run"
    twice = [{0: rows[0], 1: rows[0]} for rows in (GOOD, BAD)]
    assert gap(runs("osft", twice[0]), runs("seqft", twice[1])).verdict == "yes"
    assert not gap(runs("osft", GOOD), runs("seqft", GOOD)).beyond_chance


def test_rows_are_averaged_over_the_shared_runs_and_paired() -> None:
    rng = np.random.default_rng(3)

    def draw(p: float) -> dict[str, list[float]]:
        return {task: (100.0 * (rng.random(n) < p)).tolist() for task, n in (("a", 40), ("b", 25))}

    ours, theirs = {0: draw(0.8), 1: draw(0.7), 2: draw(0.9)}, {1: draw(0.5), 0: draw(0.4)}
    found = gap(runs("osft", ours), runs("seqft", theirs))
    means = [
        {task: np.mean([side[0][task], side[1][task]], axis=0) for task in "ab"} for side in (ours, theirs)
    ]  # fmt: skip
    expected = paired_difference(means[0], means[1])
    assert found.rows is not None
    assert (found.rows.mean, found.rows.low, found.rows.high) == (expected.mean, expected.low, expected.high)
    by_seed = [np.mean([np.mean(ours[s][t]) - np.mean(theirs[s][t]) for t in "ab"]) for s in (0, 1)]
    assert found.seeds is not None
    assert found.seeds.mean == pytest.approx(np.mean(by_seed))
    half = 12.7062047 * abs(by_seed[0] - by_seed[1]) / 2
    assert found.seeds.high == pytest.approx(np.mean(by_seed) + half)


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"a": {"test": {"sha256": "another file"}}}},
        {"config": {"run": {"max_test_rows": 30, "seeds": [1]}}},
        {"order": "3", "tasks": ["a", "b"]},
        {"seed": 9},
        {"row_scores": {"a": "100 0", "b": "0 100"}},
        {"row_scores": {"a": "100 0"}},
    ],
)
def test_other_rows_are_not_paired(change: dict[str, Any]) -> None:
    record = RunRecord.model_validate(runs("seqft", BAD).record.model_dump() | change)
    found = gap(runs("osft", GOOD), replicates([record])[0])
    assert found.rows is None
    assert not found.beyond_chance


def test_a_difference_counts_only_beyond_both_intervals() -> None:
    rows = {seed: {"a": [100.0] * 90 + [0.0] * 10, "b": [100.0] * 10} for seed in (0, 1)}
    swings = {
        0: {"a": [100.0] * 60 + [0.0] * 40, "b": [100.0] * 10},
        1: {"a": [100.0] * 89 + [0.0] * 11, "b": [100.0] * 10},
    }
    found = gap(runs("osft", rows), runs("seqft", swings))
    assert ends(found.rows)[0] > 0
    assert ends(found.seeds)[0] < 0 < ends(found.seeds)[1]
    assert not found.beyond_chance


def test_rows_of_one_method_over_its_orders() -> None:
    mixed = {0: {"a": [100.0, 0.0] * 20, "b": [100.0] * 5}}
    found = rows_interval(runs("osft", mixed), ["a", "b"])
    assert found is not None
    assert found.mean == 75
    assert 60 < ends(found)[0] < 75 < ends(found)[1] < 90
    assert rows_interval(runs("osft", mixed), ["a", "c"]) is None


def test_the_best_needs_no_old_data_and_no_task_id() -> None:
    free = {"stores": "", "needs_old_data": False, "needs_task_id": False}
    methods = [runs("joint", GOOD, facts=free | {"needs_old_data": True}), runs("seqft", BAD, facts=free)]
    assert best(methods) is methods[1]
    assert best(methods[:1]) is methods[0]
