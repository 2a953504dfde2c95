"""How sure a mean score is: bootstrap intervals over test rows, t-intervals over seeds (numpy only)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorica.errors import LoricaError

FloatArray = npt.NDArray[np.float64]
Rows = Mapping[str, Sequence[float] | FloatArray]
"""Per task, the score of every test row."""

_CELLS = 1 << 20
"""Counts held in memory at a time."""


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval, in the unit of what was given; no ends where they are not defined."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Difference(Interval):
    """A paired difference of means; ``above_zero``: the share, 0 to 1, of resamples in which it is positive."""

    above_zero: float


def interval(rows: Rows, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> Interval:
    """Return the mean score over tasks with its percentile bootstrap interval over rows.

        mean = 1/T sum_j 1/n_j sum_i rows[j][i]

    Each resample draws n_j rows of every task j with replacement (stratified by task, so every task keeps its
    number of rows) and weights tasks equally. What it tells is the uncertainty of the finite test sets, not that
    of training: for that see `t_interval`.

    Args:
        rows: per task, one finite score per row.
        level: probability between the ends, the same left out on either side.
        seed: the same seed gives the same interval.

    Raises:
        LoricaError: no task, a task without rows, a score that is no finite number, or an option out of range.

    Source:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    means = _resampled_means(_arrays(rows), resamples, seed)
    return Interval(_mean(rows), *_ends(means, level))


def paired_difference(a: Rows, b: Rows, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> Difference:
    """Return how much better a is than b on the same rows: mean(a) - mean(b), with its bootstrap interval.

    The differences of single rows are resampled, as in `interval`, so what makes a row hard for both cancels.
    Resamples in which the two are exactly equal do not count as above zero.

    Raises:
        LoricaError: as `interval`, or a and b are not of the same tasks with the same numbers of rows.
    """
    first, second = _arrays(a), _arrays(b)
    if set(first) != set(second):
        raise LoricaError(f"paired scores differ in their tasks: {sorted(first)} and {sorted(second)}.")
    for task in first:
        if len(first[task]) != len(second[task]):
            raise LoricaError(
                f"task {task!r} has {len(first[task])} scores on one side and {len(second[task])} on the other; "
                "a paired comparison needs the same rows, in the same order."
            )
    rows = {task: first[task] - second[task] for task in first}
    means = _resampled_means(rows, resamples, seed)
    low, high = _ends(means, level)
    return Difference(_mean(rows), low, high, float((means > 0).mean()))


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean of independent runs with its Student t-interval, mean +- t(level, n - 1) s / sqrt(n).

    Args:
        values: one score per seed; s is their standard deviation with n - 1 in the denominator.
        level: probability between the ends.

    Returns:
        Without ends for a single value: one run tells nothing of the spread.

    Raises:
        LoricaError: no value, one that is no finite number, or a level out of range.
    """
    array = _arrays({"values": values})["values"]
    _check_level(level)
    mean, n = float(array.mean()), len(array)
    if n < 2:
        return Interval(mean, None, None)
    half = t_quantile(level, n - 1) * float(array.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def t_quantile(level: float, df: int) -> float:
    """Return the t that |T| stays below with probability ``level``, for Student's T with ``df`` degrees of freedom."""
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _t_probability(middle, df) < level else (low, middle)
    return math.sqrt(df) * math.tan(low)


def _t_probability(theta: float, df: int) -> float:
    """Return P(|T| <= sqrt(df) tan theta): finite sums for whole df (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    odd = df % 2
    term, total = (math.cos(theta), 0.0) if odd else (1.0, 0.0)
    for k in range(odd, df - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * math.cos(theta) ** 2
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total


def _resampled_means(rows: Mapping[str, FloatArray], resamples: int, seed: int) -> FloatArray:
    """Return the mean over tasks in each resample."""
    if resamples < 1:
        raise LoricaError(f"resamples is {resamples}; give a positive number.")
    generator = np.random.default_rng(seed)
    # Sorted, for the interval of a run must not hang on the order in which its tasks were written down.
    return np.mean([_task_means(rows[task], resamples, generator) for task in sorted(rows)], axis=0)


def _task_means(scores: FloatArray, resamples: int, generator: np.random.Generator) -> FloatArray:
    """Return the mean of as many rows as there are, drawn with replacement, in each resample.

    How often each distinct score is drawn is multinomial, so a resample of right-or-wrong rows costs two numbers
    and not one for every row.
    """
    values, counts = np.unique(scores, return_counts=True)
    n, chunk = len(scores), max(_CELLS // len(values), 1)
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    return np.concatenate([generator.multinomial(n, counts / n, size=size) @ values / n for size in sizes])


def _mean(rows: Rows) -> float:
    return float(np.mean([np.mean(scores) for scores in rows.values()]))


def _ends(means: FloatArray, level: float) -> tuple[float, float]:
    _check_level(level)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise LoricaError(f"level is {level}; give a probability between 0 and 1, such as 0.95.")


def _arrays(rows: Rows) -> dict[str, FloatArray]:
    arrays = {task: np.asarray(scores, dtype=np.float64) for task, scores in rows.items()}
    if not arrays:
        raise LoricaError("there are no scores; give at least one task.")
    for task, scores in arrays.items():
        if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
            raise LoricaError(f"task {task!r} needs a list of at least one score, each a finite number.")
    return arrays
