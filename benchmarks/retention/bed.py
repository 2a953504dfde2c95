"""The folder of a test bed: what is in it, and how it is written and read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import yaml

from benchmarks.retention.facts import CHOICES, NAMES, RELATIONS, Row, World, make_world
from benchmarks.retention.skills import SKILLS, skill_rows
from lorica.errors import LoricaError

FACTS, SKILL_ROWS, STREAM = "facts-0.train.jsonl", "skills.train.jsonl", "stream.yaml"
SKILL_TRAIN, SKILL_TEST, BASE_TEST = 4000, 100, 300


def test_file(name: str) -> str:
    """Return the file of the rows that a set or a skill is scored on."""
    return f"{name}.test.jsonl"


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Return what ``write_rows`` wrote.

    Raises:
        LoricaError: the file is not there, or not of a test bed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Row(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise LoricaError(f"{path}: no rows of a test bed: {error}; write it with knowledge.py") from error


def people_for(facts: int, option: str = "--facts") -> int:
    """Return how many people a set of so many facts is about.

    Raises:
        LoricaError: the facts cannot be shared out evenly.
    """
    if facts < 1 or facts % (len(RELATIONS) * CHOICES):
        step = len(RELATIONS) * CHOICES
        raise LoricaError(f"{option} {facts}: give a multiple of {step}, {len(RELATIONS)} facts about {CHOICES} people")
    return facts // len(RELATIONS)


def train_file(name: str) -> str:
    """Return the file of the rows of a set that are learned."""
    return f"{name}.train.jsonl"


def write_set(folder: Path, name: str, world: World, first: int, people: int, test_rows: int) -> dict[str, Any]:
    """Write a set of facts and return how a stream scores it.

    Recall is of what was learned, so scored rows are trained rows; which of them follows from the world's seed.
    """
    rows = world.facts(first, people)
    chosen = Random(f"{world.seed}/{name}").sample(rows, min(test_rows, len(rows)))
    write_rows(folder / train_file(name), rows)
    write_rows(folder / test_file(name), chosen)
    return {"name": name, "test_file": test_file(name), "max_new_tokens": 1, "floor": 100 / CHOICES}


def write_skills(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Write the rows of the skills and return how a stream scores them."""
    train, scored = [], []
    for name in SKILLS:
        learned, asked = skill_rows(name, seed, SKILL_TRAIN, SKILL_TEST)
        train += learned
        write_rows(folder / test_file(name), asked)
        scored.append({"name": name, "test_file": test_file(name), "metric": "stripped_string"})
    write_rows(folder / SKILL_ROWS, train)
    return scored


def write_bed(
    folder: Path, name: str, description: str, *, seed: int, base: int, tasks: Sequence[str], people: int,
    test_rows: int,
) -> None:  # fmt: skip
    """Write what the base learns, the tasks that come after it, and the stream that names them all.

    Args:
        folder: made where it is missing.
        base: people of set 0, which the base knows; with the skills it is held out.
        tasks: names of the further sets.
        people: of each of these.
        test_rows: of each of these; of set 0 it is 300.

    Raises:
        LoricaError: there is nothing to learn or to score, the base would not know all words, or the world has too
            few people.
    """
    if not tasks or test_rows < 1:
        raise LoricaError(f"{len(tasks)} sets with {test_rows} scored facts each: give at least one of both")
    if base < NAMES:
        raise LoricaError(f"the base would know {base * len(RELATIONS)} facts, too few to read every name; give more")
    folder.mkdir(parents=True, exist_ok=True)
    world = make_world(seed)
    held_out = [write_set(folder, "facts-0", world, 0, base, BASE_TEST), *write_skills(folder, seed)]
    listed = [
        write_set(folder, task, world, base + number * people, people, test_rows) | {"train_file": train_file(task)}
        for number, task in enumerate(tasks)
    ]
    stream = {"name": name, "version": 1, "description": description, "tasks": listed, "held_out": held_out}
    (folder / STREAM).write_text(yaml.safe_dump(stream, sort_keys=False, width=120), encoding="utf-8")


def write_mixed(folder: Path, share: float, tasks: Sequence[str], seed: int) -> None:
    """Write the stream in which every set is learned together with a share of all rows that were learned before it.

    That is replay as it is done where nothing else is at hand: old rows, the base's facts and skills among them, are
    mixed into the new ones. Which rows follows from the seed; a set's are not the same for every task.

    Raises:
        LoricaError: the share is none.
    """
    if not 0 < share <= 1:
        raise LoricaError(f"--mixed {share:g}: give shares above 0 to 1")
    stream = yaml.safe_load((folder / STREAM).read_text(encoding="utf-8"))
    percent = f"{100 * share:g}"
    for number, task in enumerate(stream["tasks"]):
        rows, random = read_rows(folder / train_file(task["name"])), Random(f"{seed}/{share}/{task['name']}")
        for known in (FACTS, SKILL_ROWS, *map(train_file, tasks[:number])):
            old = read_rows(folder / known)
            rows += random.sample(old, round(share * len(old)))
        task["train_file"] = train_file(f"{task['name']}.mixed-{percent}")
        write_rows(folder / task["train_file"], rows)
    stream["description"] += f", each with {percent} % of all rows before it"
    (folder / f"mixed-{percent}.yaml").write_text(yaml.safe_dump(stream, sort_keys=False, width=120), encoding="utf-8")


def add_mixed(parser: argparse.ArgumentParser) -> None:
    """Add the option whose shares ``write_mixed`` takes."""
    told = "write streams mixed-PERCENT.yaml too, in which this share of all earlier rows is replayed"
    parser.add_argument("--mixed", type=float, nargs="+", default=[], metavar="SHARE", help=told)


def run_script(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None]) -> None:
    """Do a script's work with its arguments; a mistake of the user ends it with one line."""
    arguments = parser.parse_args()
    try:
        work(arguments)
    except (LoricaError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
