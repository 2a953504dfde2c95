"""What is scored of a cell after each of its tasks: which tasks and abilities, and on which rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lorica import processes
from lorica.data.dataset import EncodedDataset
from lorica.data.scored import Scored, Task
from lorica.evaluation.scorer import TaskScores, score_task
from lorica.experiments.abilities import FromHarness, HeldOut
from lorica.experiments.identity import Cell
from lorica.experiments.progress import Progress
from lorica.experiments.setup import Setup

Column = Task | HeldOut


class Scoring:
    """The scores of one cell.

    Args:
        setup: what the cells of a run share, also the scores of the model that came in.
        cell: which one this is.
        tasks: in its order.
    """

    def __init__(self, setup: Setup, cell: Cell, tasks: Sequence[Task]) -> None:
        self.setup, self.cell, self.tasks = setup, cell, tasks
        self.columns: list[Column] = [*tasks, *setup.held_out]
        """What is scored after each task: the tasks in their order, then what is held out."""

    def rows(self, scored: Scored) -> EncodedDataset:
        """Return the rows that something is scored on."""
        if self.cell.validates and isinstance(scored, Task):
            return self.setup.rows.split(scored.name)[1]
        return self.setup.rows.test(scored.name)

    def score(self, stage: int, model: Any, progress: Progress, *, needs_task_id: bool) -> None:
        """Take down all scores of a stage; what plays no part, or has not changed, is not measured.

        Args:
            stage: how many tasks are learned.
            needs_task_id: as ``Method.needs_task_id``.
        """
        for number, column in enumerate(self.columns):
            if progress.waiting_steps:
                progress.set(stage, column.name, math.nan)
            elif stage and needs_task_id and number != stage - 1:
                progress.repeat(stage, column.name)  # its own model, which has not changed, answers
            elif self._is_needless(stage, number):
                progress.set(stage, column.name, math.nan)
            else:
                self._measure(stage, column, model, progress)

    def _is_needless(self, stage: int, number: int) -> bool:
        """Tell whether a score plays no part in the choice of a learning rate."""
        first = number + 1 if number < len(self.tasks) else 0
        return self.cell.validates and stage not in (first, len(self.tasks))

    def _measure(self, stage: int, column: Column, model: Any, progress: Progress) -> None:
        key = (column.name, self.cell.validates)
        scores = self.setup.base_scores.get(key) if stage == 0 else None
        if scores is None:
            scores = self._scores(column, model)
        if stage == 0:
            self.setup.base_scores[key] = scores
        progress.set(stage, column.name, scores.mean, scores.beside)
        progress.rows[column.name] = scores.rows
        if not isinstance(column, FromHarness):  # whose rows are not ours to see
            progress.answers[column.name] = scores.predictions

    def _scores(self, column: Column, model: Any) -> TaskScores:
        cell, tokenizer = self.cell, self.setup.tokenizer
        size = self.setup.arguments("", cell.seed, cell.learning_rate, name=cell.method).per_device_eval_batch_size
        if isinstance(column, FromHarness):
            (score,) = processes.together(
                [column], lambda one: one.score(model, tokenizer, size), in_step=processes.in_step(model)
            )
            processes.reshard(model)
            return TaskScores([score], [])
        scored = column if isinstance(column, Scored) else column.scored
        longest = self.setup.config.max_new_tokens
        return score_task(model, self.rows(scored), tokenizer, scored, batch_size=size, max_new_tokens=longest)
