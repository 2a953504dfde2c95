"""Commands that are killed at random moments and given again until they come to their end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorica.cli
from tests.reliability.interruptions import assert_same, begun_in_child, status_of

KILLS = int(os.environ.get("LORICA_KILLS", "0"))
"""How many a slow test is to take; 0: as many as it takes by itself."""


class Command:
    """A command line, begun in a copy of this process: a kill costs no imports."""

    def __init__(self, out: Path, *words: str, **options: Any) -> None:
        self.out, self.log = out, out.with_suffix(".log")
        self.words = [
            "lorica",
            *words,
            *(f"--{name}={value}" for name, value in (options | {"output_dir": out}).items()),
        ]

    def next_words(self) -> list[str]:
        """Return the words to begin with, or to go on with."""
        return self.words

    def begin(self) -> int:
        """Start it in a child and return its id."""
        words = self.next_words()
        return begun_in_child(lambda: _run(words), self.log, seconds=1200)

    def ends(self, child: int) -> bool:
        """Wait for a child, and tell whether it came to its end; otherwise it must have been killed."""
        status = status_of(child)
        assert status in (0, -signal.SIGKILL), self.log.read_text()
        return status == 0


def _run(words: list[str]) -> None:
    sys.argv = words
    try:
        lorica.cli.main()
    except SystemExit as left:
        if left.code:
            raise


def check_kills(
    command: Callable[[Path], Command],
    outcome: Callable[[Path], dict[str, Any]],
    folder: Path,
    wanted: int,
    spell: float,
) -> None:
    """Kill runs of a command until there were so many kills; each run must end as the undisturbed one, bit for bit.

    Args:
        outcome: what a run left in its output folder.
        spell: the longest that a run goes on between two kills, as a share of what the undisturbed one takes.
    """
    whole, draws, began = command(folder / "whole"), random.Random(0), time.perf_counter()
    assert whole.ends(whole.begin()), "killed by another"
    takes = time.perf_counter() - began
    kills = runs = 0
    while kills < wanted or runs == 0:
        runs += 1
        one = command(folder / f"run-{runs}")
        kills += _killed(one, wanted - kills, lambda: draws.uniform(0, spell * takes))
        assert_same(outcome(one.out), outcome(whole.out))
        shutil.rmtree(one.out)
    print(f"{kills} kills, {runs} runs to their end, {takes:.0f} s undisturbed")


def _killed(command: Command, at_most: int, seconds: Callable[[], float]) -> int:
    """Kill a command again and again, up to a number of times, until it comes to its end; return how often."""
    kills = 0
    while True:
        child = command.begin()
        if kills < at_most:
            time.sleep(seconds())
            os.kill(child, signal.SIGKILL)  # one that has ended is there until it is waited for
        if command.ends(child):
            return kills
        kills += 1
