"""One cell of a run: one method, one order, one seed, one learning rate; task after task, scored after each."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

from lorica import processes
from lorica.data.dataset import EncodedDataset
from lorica.data.scored import Task
from lorica.errors import Interrupted
from lorica.experiments.abilities import FromFile
from lorica.experiments.arguments import planned_steps
from lorica.experiments.clock import Clock
from lorica.experiments.identity import Cell, identity
from lorica.experiments.progress import Progress
from lorica.experiments.scoring import Scoring
from lorica.experiments.setup import Setup
from lorica.experiments.stages import Stage, claim, last_stage, write_scores, write_stage
from lorica.memory import size_of
from lorica.methods import Method, TaskData
from lorica.record import Stopwatch
from lorica.training.checkpoints import kept_bases, newest_complete
from lorica.training.guards import Diverged
from lorica.training.models import stock_configuration
from lorica.training.padding_free import check_keeps_rows_apart
from lorica.training.trainer import fit

Say = Callable[[str], None]


def _warn(told: str) -> None:
    if processes.first():
        warnings.warn(told, stacklevel=2)


class CellRun:
    """A cell on its way through the stream. Nothing that a later stage depends on lives outside ``Stage``.

    Args:
        setup: what the cells of a run share.
        cell: which one this is.
        folder: its own; holds the last finished stage until the end.
        tell: takes a line after each stage.
        clock: is told of the stages that were done before.
    """

    def __init__(self, setup: Setup, cell: Cell, folder: Path, tell: Say, clock: Clock) -> None:
        self.setup, self.cell, self.folder, self.tell, self.clock = setup, cell, folder, tell, clock
        self.tasks = setup.stream.in_order(cell.order)
        self.scoring = Scoring(setup, cell, self.tasks)
        self.method: Method
        self.model: Any = None

    def run(self) -> Progress:
        """Go through the stages that are not done yet and return what was measured."""
        processes.by_first(lambda: claim(self.folder, identity(self.setup, self.cell)))
        with processes.agreed():
            stage = last_stage(self.folder)
            progress = Progress.from_json(stage.progress()) if stage else self._unmeasured()
        self._remove_tasks(but=None if stage is None else self._task_folder(stage.number))
        if stage is not None:
            self.clock.skip(progress.stages_done + 1)
            if progress.stages_done == len(self.tasks):
                return progress
        self._begin(stage, progress)
        for index in range(progress.stages_done, len(self.tasks)):
            watch = Stopwatch()
            try:
                if stage is None or index >= stage.number:
                    self._learn(index, progress)
                    progress.cost.seconds += watch.seconds
                    self._keep(index + 1, progress)  # before scoring: what was trained is safe
            except Diverged as error:
                if not self.cell.validates:
                    with processes.agreed():  # all have come to know, and one tells
                        raise
                self._give_up(str(error), progress)  # the other rates of the grid are still to be tried
                return progress
            watch = Stopwatch()
            self._score(index + 1, progress)
            progress.cost.seconds += watch.seconds
            write_scores(self.folder, index + 1, progress.to_json())
            self.tell(self._line(index + 1, progress))
        return progress

    def drop_model(self) -> None:
        """Remove the weights that only a stop would have needed; what was measured stays."""

        def drop() -> None:
            if (stage := last_stage(self.folder)) is not None:
                stage.drop_model()

        processes.by_first(drop)

    def trained_model(self) -> Any:
        """Return the model at the end of the stream; from disk where another process has trained it.

        None where it was dropped: what was to be done with it is done.
        """
        if self.model is None and (stage := last_stage(self.folder)) is not None and stage.model is not None:
            self.model, _ = self.setup.read_model(stage.model)
        return self.model

    def data(self) -> dict[str, Any]:
        """Return counts, hashes and notices of the rows, for the record."""
        return {
            task.name: {"train": self._train_rows(task).summary, "test": self.scoring.rows(task).summary}
            for task in self.tasks
        } | {
            one.name: {"test": self.setup.rows.test(one.name).summary}
            for one in self.setup.held_out
            if isinstance(one, FromFile)
        }

    def _begin(self, stage: Stage | None, progress: Progress) -> None:
        with processes.agreed():
            self.model, new = self.setup.read_model(stage.model if stage else None)
            if self.setup.config.padding_free:
                check_keeps_rows_apart(self.model)
            progress.parameters = int(self.model.num_parameters())
            progress.new_parameters = progress.new_parameters or new  # a stage on disk has weights for all of them
            self.method = self.setup.build_method(self.cell.method, progress.new_parameters)
            if stage is not None:
                self.method.load_state_dict(stage.memory())
        if stage is None:
            self._score(0, progress)
            self._keep(0, progress)
            self.tell(self._line(0, progress))

    def _unmeasured(self) -> Progress:
        return Progress.empty([task.name for task in self.tasks], [one.name for one in self.setup.held_out])

    def _score(self, stage: int, progress: Progress) -> None:
        self.scoring.score(stage, self.model, progress, needs_task_id=self.method.needs_task_id)

    def _keep(self, done: int, progress: Progress) -> None:
        model = self.model if done else None
        write_stage(self.folder, done, model, self.method.state_dict(), progress.to_json())
        self._remove_tasks()

    def _give_up(self, reason: str, progress: Progress) -> None:
        self.clock.skip(len(self.tasks) - progress.stages_done - 1)
        progress.give_up(reason, len(self.tasks))
        write_stage(self.folder, len(self.tasks), None, {}, progress.to_json())
        self._remove_tasks()
        self.tell(reason)

    def _task_folder(self, index: int) -> Path:
        """Return where the checkpoints of a task lie while it is learned."""
        return self.folder / f"task-{index + 1}"

    def _remove_tasks(self, but: Path | None = None) -> None:
        """Remove the checkpoints of tasks; what they served to go on with is in a stage, or of no use."""

        def remove() -> None:
            for folder in self.folder.glob("task-*"):
                if folder != but:
                    shutil.rmtree(folder)

        processes.by_first(remove)

    def _learn(self, index: int, progress: Progress) -> None:
        with processes.sharing(self.model):
            begun = self._begin_task(index, progress)
        if begun is not None:
            data, arguments, resume = begun
            self._fit(data, arguments, progress, resume)
            with processes.sharing(self.model):
                self._close_task(data, progress)
            self._agree_on_memory()

    def _begin_task(self, index: int, progress: Progress) -> tuple[TaskData, TrainingArguments, Path | None] | None:
        """Prepare model and method and return what to train with; None: the method learns this task later."""
        task, method = self.tasks[index], self.method
        rows = self._train_rows(task)
        arguments = self.setup.arguments(
            str(self._task_folder(index)), self.cell.seed, self.cell.learning_rate, name=self.cell.method, task=task
        )
        steps = planned_steps(arguments, len(rows))
        data = TaskData(
            task.name, index, len(self.tasks), rows, self.setup.collate, self.cell.seed,
            earlier=tuple(map(self._train_rows, self.tasks[:index])),
        )  # fmt: skip
        if not method.learns(data):
            progress.waiting_steps += steps
            progress.carried_bytes.append(0)
            return None
        if method.restarts and index:
            self.model, _ = self.setup.read_model()
        set_seed(self.cell.seed)  # whatever came before, a stage is the same when it is gone on with
        self.model.eval()  # as a model comes from disk
        resume = newest_complete(self._task_folder(index), _warn)
        method.kept = kept_bases(resume)
        method.begin_task(self.model, data)
        arguments.max_steps = steps + progress.waiting_steps
        progress.waiting_steps = 0
        return data, arguments, resume

    def _fit(self, data: TaskData, arguments: TrainingArguments, progress: Progress, resume: Path | None) -> None:
        rows = self.method.training_data(data)
        try:
            with stock_configuration(self.model):
                *log, last = fit(
                    self.model, self.method, rows, self.setup.tokenizer, self.setup.collate, arguments, quiet=True,
                    resume_from_checkpoint=None if resume is None else str(resume),
                    padding_free=self.setup.config.padding_free,
                )  # fmt: skip
        except Interrupted as stopped:
            hint = f"what is done is kept, also of task {data.name}; the same command goes on"
            raise Interrupted(stopped.signum, stopped.checkpoint, hint=hint) from None
        except (Diverged, processes.Elsewhere) as error:  # in all processes, or they would wait for this one
            what = next(filter(None, processes.gathered(error.what if isinstance(error, Diverged) else "")), None)
            if what is None:
                raise
            where = f"{self.setup.settings[self.cell.method].title}, seed {self.cell.seed}, task {data.name}"
            raise Diverged(
                f"{where}: {what}", f"lower its learning rate ({self.cell.learning_rate:g}) or look at the rows"
            ) from error
        progress.notices += [{"task": data.name, **row} for row in log if "notice" in row]
        progress.cost.steps += int(last["step"])
        progress.cost.training_seconds += last["train_runtime"]

    def _close_task(self, data: TaskData, progress: Progress) -> None:
        method = self.method
        progress.cost.saw_memory()
        progress.cost.trainable_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        audit = method.audit(self.model)
        progress.leakage = audit.to_records() if audit else []
        progress.worst_leakage.append(audit.worst if audit else None)
        progress.plan = method.plan.records() if audit and method.plan is not None else []
        method.end_task(self.model, data)
        if method.forgetting is not None:
            progress.forgetting.append({"task": data.name, **asdict(method.forgetting)})
        progress.carried_bytes.append(size_of(method.state_dict()))

    def _agree_on_memory(self) -> None:
        """Let all processes go on with what the first remembers: computed by each it could differ in its last bits."""
        memory = processes.of_first(self.method.state_dict())
        if not processes.first():
            self.method.load_state_dict(memory)

    def _train_rows(self, task: Task) -> EncodedDataset:
        return self.setup.rows.split(task.name)[0] if self.cell.validates else self.setup.rows.train(task.name)

    def _line(self, stage: int, progress: Progress) -> str:
        when = "before" if stage == 0 else f"after {self.tasks[stage - 1].name}"
        cells = [f"{name} {progress.at(stage, name)}" for name in (*progress.retention, *progress.tasks)]
        return f"{self.setup.settings[self.cell.method].title}, {when}: " + "  ".join(cells)
