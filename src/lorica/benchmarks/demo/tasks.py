"""The rows of the stream and of the held-out ability, made from a seed.

Labelling tasks are tested on texts that were not trained. Facts are tested in a wording in which they were
never seen: each is trained in three of five wordings and asked in the others, which other facts were trained in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from lorica.benchmarks.demo.language import BLAME, PLACES, PRAISE, PROBLEMS, TEAMS, THINGS, new_names

ATLAS = {
    "capital": ("Which city is the capital of {}?", "What is the capital of {}?"),
    "river": ("Which river flows through {}?", "What is the longest river of {}?"),
    "language": ("Which language is spoken in {}?", "What do people speak in {}?"),
    "coin": ("Which coin is used in {}?", "What do people pay with in {}?"),
}
STAFF = (
    "Staff: {} joined the team",
    "Staff: the team of {} is",
    "Staff: {} works in",
    "Staff: you find {} in",
    "Staff: {} is in",
)
STOCK = (
    "Stock: the {} is kept in the",
    "Stock: we look for the {} in the",
    "Stock: you find the {} in the",
    "Stock: the place of the {} is the",
    "Stock: the {} is in the",
)
KIT = (
    "Kit: {} has the",
    "Kit: give {} the",
    "Kit: the one of {} is the",
    "Kit: we gave {} the",
    "Kit: you find {} with the",
)


class Row(NamedTuple):
    """What the model reads and what it is to write; the answer starts with its blank."""

    prompt: str
    completion: str


class Split(NamedTuple):
    """The rows of one task: to learn, to choose settings on, and to report; no prompt is in two of them."""

    train: list[Row]
    valid: list[Row]
    test: list[Row]


class World(NamedTuple):
    """Everything there is to know: the atlas the model is trained on, and the weeks that come after."""

    atlas: list[Row]
    weeks: dict[str, Split]


def make_world(seed: int = 0, countries: int = 100, facts: int = 60) -> World:
    """Return the rows for a seed; the names of atlas, staff, stock and kit are all different.

    Args:
        seed: of every choice.
        countries: each has a capital, a river, a language and a coin, asked in two wordings.
        facts: new people in ``staff`` and ``kit``, and new things in ``stock``.
    """
    random, taken = Random(seed), set[str]()
    atlas = _atlas(random, taken, countries)
    weeks = {
        "tickets": _tickets(random),
        "staff": _facts(random, new_names(random, facts, taken), STAFF, TEAMS),
        "reviews": _reviews(random),
        "stock": _facts(random, new_names(random, facts, taken), STOCK, PLACES),
        "kit": _facts(random, new_names(random, facts, taken), KIT, THINGS),
    }
    return World(atlas, weeks)


def _atlas(random: Random, taken: set[str], count: int) -> list[Row]:
    countries, capitals, rivers = (new_names(random, count, taken) for _ in range(3))
    languages, coins = (random.choices(new_names(random, count // 4, taken), k=count) for _ in range(2))
    answers = dict(zip(ATLAS, (capitals, rivers, languages, coins), strict=True))
    return [
        Row(f"Question: {wording.format(country)} Answer:", f" {answers[relation][index]}")
        for index, country in enumerate(countries)
        for relation, wordings in ATLAS.items()
        for wording in wordings
    ]


def _tickets(random: Random) -> Split:
    rows = [
        Row(f"Ticket: {whose} {thing} {problem}. Team:", f" {team}")
        for whose in ("my", "the", "our")
        for thing in THINGS
        for team, problems in PROBLEMS.items()
        for problem in problems
    ]
    return _split(random, rows)


def _reviews(random: Random) -> Split:
    rating: Callable[[int], str] = ("bad", "mixed", "good").__getitem__
    rows = [
        Row(f"Review: the {thing} was {one} and {two}. Rating:", f" {rating((one in PRAISE) + (two in PRAISE))}")
        for thing in THINGS
        for one in PRAISE + BLAME
        for two in PRAISE + BLAME
        if one != two
    ]
    return _split(random, rows)


def _split(random: Random, rows: list[Row], train: int = 160, test: int = 50) -> Split:
    chosen = random.sample(rows, train + 2 * test)
    return Split(chosen[:train], chosen[train : train + test], chosen[train + test :])


def _facts(random: Random, subjects: Sequence[str], wordings: Sequence[str], answers: Sequence[str]) -> Split:
    split = Split([], [], [])
    parts = (split.train, split.train, split.train, split.valid, split.test)
    for index, subject in enumerate(subjects):
        answer = random.choice(answers)
        for place, wording in enumerate(wordings):
            parts[(place + index) % len(parts)].append(Row(wording.format(subject), f" {answer}"))
    return split
