"""The story of a run: choose each method's learning rate, take it through every order and seed, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from lorica import processes
from lorica.data.stream import TaskStream
from lorica.experiments.cell import CellRun
from lorica.experiments.clock import Clock
from lorica.experiments.config import RunConfig, build_run_config
from lorica.experiments.identity import Cell
from lorica.experiments.progress import Progress
from lorica.experiments.results import PREDICTIONS, RUN, read_run, record_of, write_predictions
from lorica.experiments.selection import Selection, select
from lorica.experiments.setup import Setup
from lorica.experiments.stages import check_room
from lorica.files import listing
from lorica.names import check_no_links
from lorica.record import write_record
from lorica.redaction import cleaned
from lorica.training.launcher import launcher_settings
from lorica.training.output import save_model, without_bars
from lorica.training.room import telling_the_way_on
from lorica.training.sharded_state import whole_weights
from lorica.training.sharding import offloads

Say = Callable[[str], None]


def run(
    config: RunConfig | Mapping[str, Any], say: Say = print, *, stream: TaskStream | None = None
) -> list[dict[str, Any]]:
    """Run methods over a stream and return their records; this is ``lorica run``.

    Every method starts from the same model, sees the same rows in the same order for the same number of steps, and
    is scored on every task after every task. Each (method, order, seed) is a cell; each of its tasks goes to disk
    when it is done. A run that was stopped goes on there when it is called again with the same settings.

    Several processes train each task together, and share out what is scored; the first one speaks and writes.

    Args:
        config: see ``RunConfig``; or its fields, and any of TrainingArguments', by name.
        say: takes each line of what is told along the way.
        stream: used instead of ``config.stream``.

    Returns:
        One record for each cell, as written to ``OUT/METHOD/run.json``; with several orders or seeds to
        ``OUT/METHOD/order-O-seed-S/run.json``.

    Raises:
        LoricaError: anything about the input is wrong; it shows before the first method starts. Or the disk is full.
        Interrupted: a signal came; the finished tasks are kept.
    """
    settings = config if isinstance(config, RunConfig) else build_run_config(dict(config))
    with launcher_settings() as asked:
        settings = settings.model_copy(update={"training": asked | settings.training})
        with processes.working_together(on_host=offloads(settings.training)):
            with processes.agreed():
                made = Run(Setup(settings, stream), say)
            return made.run()


def _silent(line: str) -> None:
    """Say nothing: the first of several processes does."""


class Run:
    """All cells of a run, one after the other."""

    def __init__(self, setup: Setup, say: Say) -> None:
        self.setup, self.say = setup, cleaned(say) if processes.first() else _silent
        self.output_dir = Path(setup.config.output_dir)
        check_no_links(self.output_dir)
        self.cells = [(order, seed) for order in setup.orders for seed in setup.config.seeds]
        rates = len(setup.config.learning_rates)
        tasks = [len(setup.stream.in_order(order)) + 1 for order, _ in self.cells]
        sweep = rates * (len(setup.stream.in_order(setup.orders[0])) + 1) if rates > 1 else 0
        self.clock = Clock(len(setup.settings) * (sweep + sum(tasks)))

    def run(self) -> list[dict[str, Any]]:
        """Run the cells that are not done and return the records of all."""
        for line in self.setup.describe():
            self.say(line)
        models = len(self.setup.settings) * len(self.cells) if self.setup.config.save_models else 0
        source = Path(self.setup.config.model_name_or_path).expanduser()
        processes.by_first(lambda: check_room(self.output_dir, source, models))
        # A bar and a notice for each model that is loaded would hide the scores.
        with quiet_transformers(), telling_the_way_on(self.output_dir, "lorica run"):
            return [record for method in self.setup.settings for record in self._method(method)]

    def _method(self, method: str) -> list[dict[str, Any]]:
        folder = self.output_dir / method
        selection = self._selection(method, folder)
        return [self._cell(method, folder, order, seed, selection) for order, seed in self.cells]

    def _selection(self, method: str, folder: Path) -> Selection | None:
        if len(self.setup.config.learning_rates) < 2:
            return None
        result = select(self.setup, method, folder / "sweep", self._tell, self.clock)
        self.say(f"{method}: learning rate {result.learning_rate:g}, chosen by {result.by} on rows cut from train")
        if result.at_edge:
            self.say(f"notice: {method}: {result.learning_rate:g} is at the edge of the grid; widen --learning_rates")
        return result

    def _cell(
        self, method: str, folder: Path, order: str | None, seed: int, selection: Selection | None
    ) -> dict[str, Any]:
        with processes.agreed():
            rate = selection.learning_rate if selection else self.setup.rate(method)
        own = folder if len(self.cells) == 1 else folder / cell_name(order, seed)
        cell = CellRun(self.setup, Cell(method, order, seed, rate), own / "cell", self._tell, self.clock)
        progress = cell.run()
        self._leave(cell, progress, own, selection)
        cell.drop_model()
        with processes.agreed():
            return read_run(own / RUN)

    def _leave(self, cell: CellRun, progress: Progress, own: Path, selection: Selection | None) -> None:
        """Write what a finished cell leaves, unless it is there."""
        saves = self.setup.config.save_models
        new = cell.model is not None or not (own / RUN).exists()  # trained here, or not written by who trained it
        if processes.gathered(new)[0]:
            with processes.agreed():
                model = cell.trained_model() if saves else None
            weights = None if model is None else whole_weights(model)

            def write() -> None:
                if model is not None:
                    save_model(model, self.setup.tokenizer, own / "model", weights)
                write_predictions(progress, own / PREDICTIONS)
                left = [own / PREDICTIONS, *(file for file in (own / "model").rglob("*") if file.is_file())]
                write_record(own / RUN, record_of(cell, progress, selection) | {"files": listing(own, left)})

            processes.by_first(write)
        if saves and not (own / "model").is_dir():
            self.say(f"notice: {own} was finished without --save_models; remove it to train that model again")

    def _tell(self, line: str) -> None:
        self.say(f"{line}   {self.clock.tick()}")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and notices off in here; its errors still show."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def cell_name(order: str | None, seed: int) -> str:
    """Return the name of a cell's folder where a method has several."""
    return f"seed-{seed}" if order is None else f"order-{order}-seed-{seed}"
