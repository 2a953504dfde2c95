"""Small skills: a rule each, so that a row that was never seen can be answered."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice
from random import Random

from benchmarks.retention.facts import Row

LETTERS = "abcdefghijklmnopqrst"
PAIRS = {"(": ")", "[": "]", "{": "}"}
PRAISE = "great strong fast pretty cheap solid kind bright fresh clean warm calm".split()
BLAME = "poor weak slow ugly noisy fragile rude dull stale dirty cold harsh".split()
LARGEST, LONGEST = 30, 7


def sort(random: Random) -> Row:
    """Four letters in the order of the alphabet."""
    letters = random.sample(LETTERS, 4)
    return Row(f"sort {' '.join(letters)} :", f" {' '.join(sorted(letters))}")


def add(random: Random) -> Row:
    """The sum of two numbers up to 30."""
    one, two = random.randint(0, LARGEST), random.randint(0, LARGEST)
    return Row(f"add {one} {two} :", f" {one + two}")


def close(random: Random) -> Row:
    """What closes the brackets that are open, innermost first: one to three of them after seven marks."""
    while True:
        marks, still_open = [], list[str]()
        for _ in range(LONGEST):
            if still_open and random.random() < 0.5:
                marks.append(PAIRS[still_open.pop()])
            else:
                still_open.append(random.choice(list(PAIRS)))
                marks.append(still_open[-1])
        if len(still_open) <= 3:
            return Row(f"close {' '.join(marks)} :", f" {' '.join(PAIRS[mark] for mark in reversed(still_open))}")


def rate(random: Random) -> Row:
    """Good or bad, as most of three adjectives say."""
    words = random.sample(PRAISE + BLAME, 3)
    return Row(f"rate {' '.join(words)} :", " good" if sum(word in PRAISE for word in words) > 1 else " bad")


SKILLS: dict[str, Callable[[Random], Row]] = {"sort": sort, "add": add, "close": close, "rate": rate}
"""Each draws one row."""


def skill_rows(name: str, seed: int, train: int, test: int) -> tuple[list[Row], list[Row]]:
    """Return rows of a skill to learn and to score; none is in both.

    Where a rule has too few different rows (``add``: 961), those that are not scored are there several times.
    """
    random = Random(f"{seed}/{name}")
    rows = list(dict.fromkeys(SKILLS[name](random) for _ in range(2 * (train + test))))
    return list(islice(cycle(rows[test:]), train)), rows[:test]
