"""A stream of tasks as data: what comes when, from which files, and how each method is set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, model_validator

from lorica.data.scored import STRICT, Ability, HubSource, Task
from lorica.errors import LoricaError, did_you_mean, one_line
from lorica.yaml_file import read_yaml


class MethodSettings(BaseModel):
    """How one method runs on the stream."""

    model_config = STRICT

    method: str
    """A name of ``lorica list``."""

    label: str = ""
    """How tables and pictures call it; the method's name by default."""

    learning_rate: float | None = Field(default=None, gt=0)
    """Chosen by a sweep; without it the sweep of the run, or the default for the model's width."""

    grid_scale: float = Field(default=1.0, gt=0)
    """Factor on every rate of the run's grid, for methods whose rates lie elsewhere; the number of rates stays."""

    options: dict[str, Any] = {}
    """Options of the method; for ``osft`` the arguments of ``lorica.plan``."""

    training: dict[str, Any] = {}
    """Fields of TrainingArguments that this method needs otherwise than the rest; shown in every report."""

    @property
    def title(self) -> str:
        """The label, or the method's name where there is none."""
        return self.label or self.method


class TaskStream(BaseModel):
    """A sequence of tasks with everything that a run needs to be repeated."""

    model_config = STRICT

    name: str
    """Name of the stream."""

    version: int
    """Raised with every change of rows, prompts or settings."""

    description: str
    """What it shows."""

    tasks: list[Task]
    """All tasks; without ``orders`` in the order they come. None: a stream of abilities that are only scored."""

    orders: dict[str, list[str]] = {}
    """Names of tasks by the name of the order."""

    seeds: list[Annotated[int, Field(ge=0)]] = []
    """Seeds of a run that names none."""

    held_out: list[Ability] = []
    """What must not be forgotten."""

    max_length: int = Field(default=1024, ge=2)
    """Longest row, in tokens, where the model has that many positions."""

    training: dict[str, Any] = {}
    """Fields of TrainingArguments, the same for every method and task."""

    methods: dict[str, MethodSettings] = {}
    """Settings by the name of the output folder."""

    _folder: Path = PrivateAttr(default=Path())
    _chosen: list[str] | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        if not self.tasks and not self.held_out:
            raise ValueError("field tasks: a stream needs a task, or at least a held_out ability")
        trained = [task.name for task in self.tasks]
        names = trained + [ability.name for ability in self.held_out]
        if twice := next((name for name, count in Counter(names).items() if count > 1), None):
            raise ValueError(f"the name {twice!r} is given twice")
        known = set(trained)
        for order, tasks in self.orders.items():
            for task in tasks:
                if task not in known:
                    raise ValueError(f"order {order!r} names task {task!r}.{did_you_mean(task, trained)}")
            if len(set(tasks)) < len(tasks):
                raise ValueError(f"order {order!r} names a task twice: {', '.join(tasks)}")
        return self

    def path(self, file: str) -> str:
        """Return the path of a file that the stream names."""
        return str(self._folder / file)

    def within(self, data_dir: str | None) -> TaskStream:
        """Return the same stream with its files looked for in ``data_dir``; None leaves it as it is."""
        copy = self.model_copy()
        copy._folder = self._folder if data_dir is None else Path(data_dir).expanduser()
        copy._chosen = self._chosen
        return copy

    def only(self, tasks: Sequence[str]) -> TaskStream:
        """Return the stream with some of its tasks or abilities alone; of a kind of which none is named, all stay.

        Raises:
            LoricaError: there is no such task or ability.
        """
        trained, held = [task.name for task in self.tasks], [ability.name for ability in self.held_out]
        known = [*trained, *held]
        for name in tasks:
            if name not in known:
                raise LoricaError(
                    f"stream {self.name!r} has no task {name!r}; it has {', '.join(known)}.{did_you_mean(name, known)}"
                )
        copy = self.model_copy()
        if any(name in held for name in tasks):
            copy.held_out = [ability for ability in self.held_out if ability.name in tasks]
        copy._folder, copy._chosen = self._folder, [name for name in trained if name in tasks] or None
        return copy

    @property
    def left_out(self) -> list[str]:
        """Names of the tasks that ``only`` left out."""
        return [] if self._chosen is None else [task.name for task in self.tasks if task.name not in self._chosen]

    def in_order(self, order: str | None) -> list[Task]:
        """Return the tasks in an order; None: the first of ``orders``, or as they are listed.

        Raises:
            LoricaError: there is no such order.
        """
        if order is not None and order not in self.orders:
            known = ", ".join(self.orders) or "none"
            raise LoricaError(f"stream {self.name!r} has no order {order!r}; it has {known}")
        tasks = {task.name: task for task in self.tasks}
        names = self.orders[order] if order is not None else next(iter(self.orders.values()), list(tasks))
        return [tasks[name] for name in names if self._chosen is None or name in self._chosen]


def read_stream(path: str | Path) -> TaskStream:
    """Return the stream that a YAML file defines.

    Raises:
        LoricaError: see ``read_yaml``; or a field is missing, unknown or of the wrong type.
    """
    try:
        stream = TaskStream.model_validate(read_yaml(path, "stream"))
    except ValidationError as error:
        raise LoricaError(f"{path}: {_explain(error)}") from error
    stream._folder = Path(path).parent
    return stream


def _explain(error: ValidationError) -> str:
    found = error.errors()  # of a misspelt field both names are among them: the one that is there says more
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    where = one_line(".".join(map(str, first["loc"])))
    if first["type"] == "extra_forbidden":
        known = {name for kind in (TaskStream, Task, Ability, MethodSettings, HubSource) for name in kind.model_fields}
        return f"unknown field {where}.{did_you_mean(str(first['loc'][-1]), sorted(known))}"
    reason = one_line(first["msg"].removeprefix("Value error, "))
    return f"field {where}: {reason}" if where else reason
