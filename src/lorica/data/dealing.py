"""The rows of a step, dealt to several processes so that each has about as many tokens."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import TypeVar

from torch.utils.data import Sampler

Item = TypeVar("Item")


class TokenBalanced(Sampler[int]):
    """The rows of another sampler, in an order that shares the tokens of each step out evenly.

    Batches of ``size`` consecutive rows go to the processes in turn: a round is one for each, a step some rounds.
    Which rows a step has stays as it was, and so does its loss over all of its tokens. Within the step

    * rows that will be padded are dealt round by round, the longest first, so that a batch is of rows of like
      length; in a round each process gets about as many tokens;
    * rows that are laid end to end are dealt over all batches of the step, which get about as many tokens each.

    A batch has ``size`` rows either way, so that no process needs more memory than it would by itself. Rows that do not
    fill the last round are followed by the epoch's first ones, or left out with ``drop_last``.

    Args:
        sampler: gives an epoch's rows, in the same order in all processes.
        tokens: how many a row has.
        size: rows of a batch.
        ranks: how many processes there are.
        rounds: of a step (``gradient_accumulation_steps``).
        padded: whether a batch is padded to its longest row.
    """

    def __init__(
        self, sampler: Sampler[int], tokens: Callable[[int], int], *, size: int, ranks: int, rounds: int, padded: bool,
        drop_last: bool,
    ) -> None:  # fmt: skip
        self.sampler, self.tokens, self.size, self.ranks = sampler, tokens, size, ranks
        self.padded, self.drop_last = padded, drop_last
        self.round = ranks * size
        self.step = rounds * self.round

    def __len__(self) -> int:
        assert isinstance(self.sampler, Sized)
        return self._whole(len(self.sampler))

    def __iter__(self) -> Iterator[int]:
        rows = list(self.sampler)
        whole = self._whole(len(rows))
        while len(rows) < whole:
            rows += rows[: whole - len(rows)]
        for part in _parts(rows[:whole], self.step):
            yield from self._dealt(part)

    def set_epoch(self, epoch: int) -> None:
        """Let the sampler draw the order of another epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def _whole(self, rows: int) -> int:
        full, rest = divmod(rows, self.round)
        return (full + bool(rest and not self.drop_last)) * self.round

    def _dealt(self, rows: Sequence[int]) -> Iterator[int]:
        """Yield the rows of a step: round after round, the batch of each process in turn."""
        tokens = {row: self.tokens(row) for row in rows}
        longest_first = sorted(rows, key=tokens.__getitem__, reverse=True)
        given = [0] * self.ranks
        for part in _parts(longest_first, self.round if self.padded else len(rows)):
            batches = even_groups(part, [tokens[row] for row in part], self.size)
            for one_each in _parts(batches, self.ranks):
                by_rank = dict(zip(sorted(range(self.ranks), key=given.__getitem__), one_each, strict=True))
                for rank in range(self.ranks):
                    given[rank] += sum(tokens[row] for row in by_rank[rank])
                    yield from by_rank[rank]


def even_groups(items: Sequence[int], weights: Sequence[int], size: int) -> list[list[int]]:
    """Return items in groups of ``size`` whose weights are about the same, the heaviest group first.

    Each item in turn joins the lightest group that has room; with the heaviest items first this is the rule of the
    longest processing time (Graham 1969).

    Args:
        items: a multiple of ``size``.
        weights: of each item, falling.
    """
    open_groups: list[tuple[int, int, list[int]]] = [(0, index, []) for index in range(len(items) // size)]
    full = []
    for item, weight in zip(items, weights, strict=True):
        total, index, group = heapq.heappop(open_groups)
        grown = (total + weight, index, [*group, item])
        if len(grown[2]) < size:
            heapq.heappush(open_groups, grown)
        else:
            full.append(grown)
    return [group for _, _, group in sorted(full, key=lambda one: (-one[0], one[1]))]


def _parts(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
