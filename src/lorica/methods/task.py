"""What a method may see of the task it learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lorica.subspace.calibration import Batch

Row = dict[str, list[int]]
Rows = Dataset[Row]
Collate = Callable[[Sequence[Row]], dict[str, Tensor]]


@dataclass(frozen=True)
class TaskData:
    """One task of a stream, as a method sees it.

    Attributes:
        name: as in the stream.
        index, count: its place in the order, from 0, and how many tasks there are.
        rows: its training rows, encoded.
        collate: makes a batch of rows.
        seed: of whatever a method draws.
        earlier: the training rows of the tasks before it, for the bounds that are allowed to see them
            (``joint``); every other method keeps what it needs in its own state.
    """

    name: str
    index: int
    count: int
    rows: Rows
    collate: Collate
    seed: int = 0
    earlier: tuple[Rows, ...] = ()

    def sample(self, size: int) -> list[int]:
        """Return at most ``size`` row numbers drawn without replacement, in increasing order.

        The draw depends on ``seed`` and ``index`` alone; the random state of the process is left as it is.
        """
        total = len(self.rows)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.index)
        drawn: list[int] = torch.randperm(total, generator=generator)[:size].tolist()
        return sorted(drawn)

    def batches(self, size: int, batch_size: int = 16) -> Iterator[Batch]:
        """Yield the rows of ``sample(size)`` in batches as the model takes them (on the CPU)."""
        chosen = self.sample(size)
        for start in range(0, len(chosen), batch_size):
            yield self.collate([self.rows[index] for index in chosen[start : start + batch_size]])
