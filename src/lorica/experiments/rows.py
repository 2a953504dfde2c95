"""The rows of a run: each file read and encoded once, and the part of train that choices are made on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np

from lorica.data.dataset import EncodedDataset, Kind, shared_rows
from lorica.data.positions import position_limit
from lorica.data.scored import Scored
from lorica.data.stream import TaskStream
from lorica.data.task_rows import load_rows
from lorica.errors import LoricaError
from lorica.experiments.abilities import FromFile, HeldOut
from lorica.experiments.config import RunConfig


def longest_row(config: RunConfig, stream: TaskStream, model_config: Any) -> int:
    """Return how many tokens a row may have: as the run says, else the stream, and no more than the model can read."""
    asked = config.max_length or stream.max_length
    return min(asked, position_limit(model_config) or asked)


class Rows:
    """The rows of a stream's tasks and of what is held out, for one model.

    Args:
        stream: names the tasks' files.
        held_out: what is scored and never trained.
        kind: of the model.
        labels: a classifier's classes.
    """

    def __init__(
        self, config: RunConfig, stream: TaskStream, held_out: Sequence[HeldOut], tokenizer: Any, model_config: Any,
        kind: Kind, labels: Sequence[str],
    ) -> None:  # fmt: skip
        self.config, self.tokenizer, self.kind, self.labels = config, tokenizer, kind, labels
        self.max_length = longest_row(config, stream, model_config)
        self.sources: Mapping[str, tuple[TaskStream, Scored]] = {
            one.name: (one.stream, one.scored) for one in held_out if isinstance(one, FromFile)
        } | {task.name: (stream, task) for task in stream.tasks}
        self.read = cache(self._read)

    def train(self, name: str) -> EncodedDataset:
        """Return all training rows of a task."""
        return self.read(name, "train")

    def test(self, name: str) -> EncodedDataset:
        """Return the scored rows of a task or an ability."""
        return self.read(name, "test")

    def split(self, name: str) -> tuple[EncodedDataset, EncodedDataset]:
        """Return a task's training rows in two parts: what the sweep trains on, and what it scores.

        Raises:
            LoricaError: there are too few rows to cut any off.
        """
        rows, share = self.train(name), self.config.validation_fraction
        count = round(len(rows) * share)
        if not 0 < count < len(rows):
            raise LoricaError(
                f"{rows.summary['path']}: {len(rows)} rows are too few to cut {share:g} of them off for choosing a "
                "learning rate; give one rate with --learning_rates"
            )
        order = np.random.default_rng(self.config.seeds[0]).permutation(len(rows))
        return rows.subset(sorted(order[count:].tolist())), rows.subset(sorted(order[:count].tolist()))

    def notices(self, tasks: Iterable[str]) -> list[str]:
        """Return what is to be told of the rows of tasks: what was cut or left out, and what is trained and scored."""
        told = []
        for task in tasks:
            both = shared_rows(self.train(task), self.test(task))
            notes = {part: self.read(task, part).summary["notices"] for part in ("train", "test")}
            notes["test"] = notes["test"] + [f"{both} of the rows are also trained on"] * bool(both)
            told += [f"task {task}, rows to {part}: {'; '.join(some)}" for part, some in notes.items() if some]
        return told

    def _read(self, name: str, part: Literal["train", "test"]) -> EncodedDataset:
        stream, scored = self.sources[name]
        limit = self.config.max_train_rows if part == "train" else self.config.max_test_rows
        return load_rows(
            stream, scored, part, self.tokenizer, kind=self.kind, max_length=self.max_length, labels=self.labels,
            limit=limit, seed=self.config.seeds[0], require_pinned=self.config.require_pinned,
        )  # fmt: skip
