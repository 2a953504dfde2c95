"""Intervals against exact distributions, a literal bootstrap and printed tables."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.bootstrap import Interval, interval, paired_difference, t_interval, t_quantile
from lorica.errors import LoricaError

SCORES = st.lists(st.floats(0, 100), min_size=1, max_size=12)
STREAMS = st.dictionaries(st.sampled_from(["one", "two", "three"]), SCORES, min_size=1)


def binomial_quantile(n: int, p: float, share: float) -> int:
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= share:
            return k
    return n


@pytest.mark.parametrize(("rows", "right"), [(100, 80), (56, 50), (400, 40)])
def test_the_interval_of_right_or_wrong_rows_is_the_binomial_s(rows: int, right: int) -> None:
    found = interval({"task": [100.0] * right + [0.0] * (rows - right)}, resamples=20000)
    low, high = (100 * binomial_quantile(rows, right / rows, share) / rows for share in (0.025, 0.975))
    assert found.mean == 100 * right / rows
    assert found.low == pytest.approx(low, abs=100 / rows)
    assert found.high == pytest.approx(high, abs=100 / rows)


@pytest.mark.parametrize(("rows", "half"), [(56, 10.5), (277, 4.7), (2000, 1.8), (7600, 0.9)])
def test_half_widths_at_80_percent(rows: int, half: float) -> None:
    right = round(0.8 * rows)
    found = interval({"task": [100.0] * right + [0.0] * (rows - right)})
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.08)


def literal(rows: dict[str, list[float]], resamples: int) -> tuple[float, float]:
    draw = random.Random(1)
    means = [
        statistics.mean(statistics.mean(draw.choices(scores, k=len(scores))) for scores in rows.values())
        for _ in range(resamples)
    ]
    cuts = statistics.quantiles(means, n=40, method="inclusive")
    return cuts[0], cuts[-1]


def test_stratified_interval_equals_a_literal_bootstrap() -> None:
    draw = random.Random(0)
    rows = {name: [draw.betavariate(2, 5) * 100 for _ in range(n)] for name, n in (("a", 30), ("b", 7), ("c", 60))}
    found, (low, high) = interval(rows, resamples=20000), literal(rows, 4000)
    assert found.mean == pytest.approx(statistics.mean(statistics.mean(scores) for scores in rows.values()))
    assert found.low == pytest.approx(low, abs=0.4)
    assert found.high == pytest.approx(high, abs=0.4)


def test_tasks_weigh_equally_and_keep_their_rows() -> None:
    rows = {"long": [0.0] * 1000, "short": [100.0] * 10}
    assert interval(rows) == Interval(50.0, 50.0, 50.0)


@settings(max_examples=40)
@given(rows=STREAMS)
def test_an_interval_contains_its_mean_and_stays_within_the_scores(rows: dict[str, list[float]]) -> None:
    found = interval(rows, resamples=400)
    least, most = (statistics.mean(f(scores) for scores in rows.values()) for f in (min, max))
    assert least - 1e-9 <= found.low <= found.mean + 1e-9
    assert found.mean - 1e-9 <= found.high <= most + 1e-9


@settings(max_examples=40)
@given(rows=STREAMS, shift=st.integers(-50, 50), seed=st.integers(0, 5))
def test_shifting_all_scores_shifts_the_interval(rows: dict[str, list[float]], shift: int, seed: int) -> None:
    rows = {name: [round(score) for score in scores] for name, scores in rows.items()}
    before = interval(rows, resamples=50, seed=seed)
    after = interval({name: [s + shift for s in scores] for name, scores in rows.items()}, resamples=50, seed=seed)
    assert (after.mean, after.low, after.high) == pytest.approx(
        (before.mean + shift, before.low + shift, before.high + shift)
    )


def test_a_seed_repeats_an_interval_whatever_the_order_of_the_tasks() -> None:
    draw = random.Random(2)
    rows = {name: [draw.random() for _ in range(20)] for name in "abc"}
    again = {name: rows[name] for name in "cab"}
    first, second = interval(rows), interval(again)
    assert (first.low, first.high) == (second.low, second.high)
    assert first.mean == pytest.approx(second.mean)
    assert interval(rows, seed=1) != first


def test_a_wider_level_gives_a_wider_interval() -> None:
    rows = {"task": [float(i) for i in range(50)]}
    wide, narrow = interval(rows, level=0.99), interval(rows, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_memory_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"task": [float(i) for i in range(50)]}
    whole = interval(rows)
    monkeypatch.setattr("lorica.bootstrap._CELLS", 999)
    parts = interval(rows)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high))


def test_the_same_answers_differ_by_nothing() -> None:
    rows = {"a": [0.0, 100.0, 50.0], "b": [1.0]}
    found = paired_difference(rows, rows)
    assert (found.mean, found.low, found.high, found.above_zero) == (0, 0, 0, 0)


def test_a_constant_gain_is_certain_when_paired() -> None:
    draw = random.Random(3)
    worse = {"a": [float(draw.randint(0, 90)) for _ in range(40)]}
    better = {"a": [score + 5 for score in worse["a"]]}
    found = paired_difference(better, worse)
    assert (found.mean, found.low, found.high, found.above_zero) == (5, 5, 5, 1)
    alone = interval(better)
    assert alone.high - alone.low > 5


def test_the_share_above_zero_by_hand() -> None:
    """Of two rows, one better and one worse: two draws give a mean above zero with probability 1/4."""
    found = paired_difference({"a": [100.0, 0.0]}, {"a": [0.0, 100.0]}, resamples=20000)
    assert found.mean == 0
    assert found.above_zero == pytest.approx(0.25, abs=0.015)


def test_exchanging_the_sides_mirrors_the_difference() -> None:
    draw = random.Random(4)
    a, b = ({name: [draw.gauss(50, 9) for _ in range(30)] for name in "xy"} for _ in "ab")
    one, other = paired_difference(a, b, resamples=20000), paired_difference(b, a, resamples=20000)
    assert one.mean == pytest.approx(-other.mean)
    assert one.low == pytest.approx(-other.high, abs=0.2)
    assert one.above_zero == pytest.approx(1 - other.above_zero, abs=0.02)


def test_pairs_need_the_same_rows() -> None:
    with pytest.raises(LoricaError, match="task 'a' has 2 scores on one side and 3 on the other"):
        paired_difference({"a": [1, 2]}, {"a": [1, 2, 3]})
    with pytest.raises(LoricaError, match="differ in their tasks"):
        paired_difference({"a": [1]}, {"b": [1]})


TABLE = [
    (0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.95, 3, 3.1824), (0.95, 4, 2.7764), (0.95, 9, 2.2622),
    (0.95, 10, 2.2281), (0.95, 30, 2.0423), (0.95, 120, 1.9799), (0.90, 5, 2.0150), (0.99, 1, 63.6567),
    (0.99, 7, 3.4995), (0.50, 1, 1.0), (0.95, 5000, 1.9604),
]  # fmt: skip


@pytest.mark.parametrize(("level", "df", "printed"), TABLE)
def test_quantiles_are_those_of_the_tables(level: float, df: int, printed: float) -> None:
    assert t_quantile(level, df) == pytest.approx(printed, abs=6e-5)


def test_t_interval_by_hand() -> None:
    """s = 1, n = 3: 2 +- 4.3027 / sqrt(3)."""
    found = t_interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert (found.low, found.high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-5)


def test_a_single_run_has_no_interval() -> None:
    assert t_interval([71.5]) == Interval(71.5, None, None)


def test_t_intervals_cover_the_truth_as_often_as_they_say() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        found = t_interval(draw.normal(10, 3, size=3), level=0.8)
        covered += found.low <= 10 <= found.high
    assert covered / 400 == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ({}, {}, "at least one task"),
        ({"a": []}, {}, "task 'a' needs a list of at least one score"),
        ({"a": [1.0, math.nan]}, {}, "task 'a' needs"),
        ({"a": [1.0]}, {"resamples": 0}, "resamples is 0"),
        ({"a": [1.0]}, {"level": 95}, "level is 95"),
    ],
)
def test_mistakes_are_named(rows: dict[str, list[float]], options: dict[str, int], message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        interval(rows, **options)


def test_runs_without_a_value_are_a_mistake() -> None:
    with pytest.raises(LoricaError, match="at least one score"):
        t_interval([])
