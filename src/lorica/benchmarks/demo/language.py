"""The small English that the demo's model speaks: a few word lists, invented names, plain sentences.

Every name is made of random syllables. Nothing here is taken from a data set, a person or a place.
"""

from __future__ import annotations

from random import Random

ONSETS = "b br d dr f g gr h k kr l m n p pr r s st t tr v z".split()
VOWELS = "aeiou"
CODAS = ("", "", "l", "n", "r", "s", "m", "k")

COLOURS = "red blue green black white yellow brown grey".split()
THINGS = "lamp chair bag table clock cup coat box key ring phone watch".split()
PLACES = "market river school garden station bridge office library harbour kitchen".split()
PEOPLE = "man woman child driver teacher doctor".split()
MOODS = "old young tall quiet happy tired clever busy".split()
MOVES = "walks runs drives goes returns rides".split()
TIMES = ("in the morning", "at noon", "in the evening", "at night", "after lunch", "before breakfast")
TEAMS = "sales support finance legal design research logistics security training testing".split()
PRAISE = "great strong fast pretty cheap solid".split()
BLAME = "poor weak slow ugly noisy fragile".split()
PROBLEMS = {
    "repair": ("is broken", "has a crack", "makes noise", "is bent"),
    "billing": ("was charged twice", "has a wrong price", "has no bill", "was never refunded"),
    "delivery": ("did not arrive", "is late", "was lost on the way", "went to a wrong door"),
    "returns": ("is too small", "is the wrong colour", "is too heavy", "does not please me"),
}
OFFICE = (
    "Ticket: Staff: Review: Stock: Team: Rating: mixed good bad joined works kept look find you place in my our".split()
)


def name(random: Random) -> str:
    """Return a random name of two or three syllables; names may repeat."""
    return "".join(_syllable(random) for _ in range(random.choice((2, 3)))).capitalize()


def _syllable(random: Random) -> str:
    return random.choice(ONSETS) + random.choice(VOWELS) + random.choice(CODAS)


def new_names(random: Random, count: int, taken: set[str]) -> list[str]:
    """Return ``count`` names that are not ``taken``, and take them."""
    chosen: list[str] = []
    while len(chosen) < count:
        candidate = name(random)
        if candidate not in taken and len(candidate) <= 9:
            taken.add(candidate)
            chosen.append(candidate)
    return chosen


def sentence(random: Random) -> str:
    """Return one sentence of everyday prose. It holds no fact and none of the stream's formats."""
    pick = random.choice
    who, whom, thing, place = name(random), name(random), pick(THINGS), pick(PLACES)
    problem = pick([problem for problems in PROBLEMS.values() for problem in problems])
    return pick(
        (
            f"The {pick(MOODS)} {pick(PEOPLE)} {pick(MOVES)} to the {place} {pick(TIMES)}.",
            f"{who} {pick(MOVES)} to the {place} {pick(TIMES)}.",
            f"{who} has a {pick(COLOURS)} {thing}.",
            f"{who} gave {whom} a {pick(COLOURS)} {thing} {pick(TIMES)}.",
            f"The {thing} of {who} {problem}.",
            f"The {thing} was {pick(PRAISE + BLAME)} and {pick(PRAISE + BLAME)}, so {who} {pick(MOVES)} home.",
            f"{who} and {whom} work in the {pick(TEAMS)} team near the {place}.",
            f"The team of {who} made a {thing} and we buy it from {whom}.",
            f"We ask the {pick([*PROBLEMS, *TEAMS])} team for a {pick(PRAISE)} {thing} {pick(TIMES)}.",
        )
    )


def word_list(random: Random) -> str:
    """Return a run of the dictionary in alphabetical order, or a few names.

    What follows a word is then certain, so that each word gets an output vector of its own. Words that only
    ever fill the same gap get the same one, and a frozen output head can then never tell them apart.
    """
    if random.random() < 0.2:
        return " ".join(name(random) for _ in range(4))
    start, length = random.randrange(len(VOCABULARY)), random.randint(4, 9)
    return " ".join((VOCABULARY * 2)[start : start + length])


VOCABULARY = sorted(
    {*COLOURS, *THINGS, *PLACES, *TEAMS, *PRAISE, *BLAME, *PROBLEMS, *OFFICE}
    | {word for problems in PROBLEMS.values() for problem in problems for word in problem.split()}
)
