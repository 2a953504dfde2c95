"""Prompts cut to length: the part of a text that may go, or the start of the ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lorica.data.example import Pair


def shorten(pair: Pair, fits: Callable[[str], bool]) -> Pair:
    """Return a pair with as much of the elastic part of its prompt as fits, cut at its end.

    Found by bisection over the characters kept. Where not even the rest of the prompt fits, that rest is returned.
    """
    if pair.elastic is None or fits(pair.prompt):
        return pair
    start, end = pair.elastic

    def cut(kept: int) -> str:
        return pair.prompt[: start + kept] + pair.prompt[end:]

    # cut(kept) is known to fit (or there is nothing left to cut), cut(too_many) is known not to.
    kept, too_many = 0, end - start
    while too_many - kept > 1:
        middle = (kept + too_many) // 2
        kept, too_many = (middle, too_many) if fits(cut(middle)) else (kept, middle)
    return replace(pair, prompt=cut(kept), elastic=(start, start + kept))


def cut_left(ids: list[int], head: int, tail: int, limit: int) -> list[int]:
    """Cut ids to ``limit`` behind the first ``head``; the last ``tail`` stay as they stand at the end."""
    excess = len(ids) - limit
    return ids if excess <= 0 else (ids[:head] + ids[min(head + excess, len(ids) - tail) :])[:limit]
