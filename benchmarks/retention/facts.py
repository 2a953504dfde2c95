"""Invented facts about invented people: six things to know of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from lorica.benchmarks.demo.language import new_names
from lorica.errors import LoricaError

RELATIONS = ("city", "trade", "animal", "dish", "game", "friend")
NAMES = 64
"""Given names, and as many family names; a person has one of each, so there are 64^2 people."""

CHOICES = 20
"""Answers of a relation. Of 20 people from a multiple of 20 on each has another, so always giving one scores 5 %."""


class Row(NamedTuple):
    """What the model reads and what it is to write; the answer starts with its blank."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class World:
    """All words of a world. A fact follows from the person's number, so sets of other numbers cannot contradict.

    Attributes:
        seed: of the names and of every fact.
        given, family: 64 names each.
        answers: 20 of each relation.
    """

    seed: int
    given: Sequence[str]
    family: Sequence[str]
    answers: Mapping[str, Sequence[str]]

    def person(self, number: int) -> str:
        """Return one of the 64^2 people; the first 64 have all names between them."""
        row, shift = number % NAMES, number // NAMES
        return f"{self.given[row]} {self.family[(row + shift) % NAMES]}"

    def facts(self, first: int, people: int) -> list[Row]:
        """Return what there is to know about ``people`` people from number ``first`` on, six rows each.

        Raises:
            LoricaError: the world has not so many people.
        """
        if first + people > NAMES**2:
            raise LoricaError(
                f"the sets need {first + people:,} people and the world has {NAMES**2:,}; give fewer facts or sets"
            )
        return [
            Row(f"{self.person(number)} {relation}", f" {self._answer(number, relation)}")
            for number in range(first, first + people)
            for relation in RELATIONS
        ]

    def _answer(self, number: int, relation: str) -> str:
        block, place = divmod(number, CHOICES)
        return Random(f"{self.seed}/{relation}/{block}").sample(self.answers[relation], CHOICES)[place]


def make_world(seed: int) -> World:
    """Return the world of a seed."""
    random, taken = Random(seed), set[str]()
    given, family = new_names(random, NAMES, taken), new_names(random, NAMES, taken)
    return World(seed, given, family, {relation: new_names(random, CHOICES, taken) for relation in RELATIONS})
