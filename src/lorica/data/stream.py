"""A stream of tasks as data: what comes when, from which files, and how each method is set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from lorica.data.template import template_fields, template_problem
from lorica.errors import LoricaError, did_you_mean

MAX_STREAM_BYTES = 1_000_000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class HubSource(_Strict):
    """Where the rows of a task are on the hub, for those who have no folder of them."""

    path: str
    """Name of the data set."""

    name: str | None = None
    """Name of its configuration."""

    revision: str | None = None
    """Branch, tag or commit."""

    train_split: str = "train"
    """Split of the training rows."""

    test_split: str = "test"
    """Split of the rows that are scored."""

    train_rows: int | None = Field(default=None, ge=1)
    """So many rows of the training split, always the same, drawn without replacement; all of them by default."""

    test_rows: int | None = Field(default=None, ge=1)
    """The same for the rows that are scored."""

    labels: dict[str, list[str]] = {}
    """Column: the words its numbers (or false and true) stand for, in the order of the numbers."""

    fields: dict[str, str] = {}
    """Field of the template: what it is made of, with the columns of the data set in braces."""


class Scored(_Strict):
    """Rows that are scored: how they become prompts, and what counts as an answer."""

    name: str
    """Short name, as it heads a column of the score matrix."""

    description: str = ""
    """What an engineer would say of it."""

    test_file: str
    """Rows to score, never trained on; a path beside the stream's file, or in ``data_dir`` if that is given."""

    reader: str = "rows"
    """How the file is laid out: ``rows``, or one of ``lorica.data.layouts``."""

    prompt: str | None = None
    """The prompt, with the fields of a row in braces; ``{options}`` are the choices, joined by ", ". Without it a
    row is read by its own format (prompt and completion, messages, ...)."""

    answer: str = "{label}"
    """The answer, with the fields of a row in braces; used with ``prompt``."""

    shorten: str | None = None
    """Field of ``prompt`` that is cut at its end where a prompt is too long. Default: the prompt's beginning goes."""

    choices: list[str] = []
    """All answers there are, in the order in which a prompt lists them."""

    drop_labels: list[str] = []
    """Answers that mean that a row has none (MNLI's "-"): such rows are left out and counted."""

    source_between: tuple[str, str] | None = None
    """What stands before and after the source in a prompt, for metrics that compare an answer with it (``sari``)."""

    metric: str = "exact_match"
    """A name of ``lorica.evaluation.metrics``, for generated answers."""

    metrics_beside: list[str] = []
    """Further metrics of the same answers, reported beside ``metric``."""

    stop: list[str] = []
    """A generated answer ends before the first of these."""

    answer_after: str | None = None
    """Of a generated answer only what follows the last of these words is scored; all of it where they are missing."""

    scoring: Literal["generate", "choose"] = "generate"
    """``generate``: greedy decoding, then ``metric``. ``choose``: the likeliest of the choices, then accuracy."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest generated answer; by default one token more than the longest answer of the rows."""

    max_prompt_length: int | None = Field(default=None, ge=1)
    """Longest prompt, in tokens; by default what the model and ``max_length`` allow."""

    floor: float | None = Field(default=None, ge=0, le=100)
    """What always giving the most frequent answer scores, percent; for the reader of a table."""

    hub: HubSource | None = None
    """Where to get the rows where there is no such file."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if problem := self._misfit():
            raise ValueError(f"{self.name}: {problem}")
        return self

    def _misfit(self) -> str:
        if self.scoring == "choose" and not self.choices and self.reader == "rows":
            return "scoring 'choose' needs choices"
        templates = {"prompt": self.prompt or "", "answer": self.answer} | (self.hub.fields if self.hub else {})
        for name, text in templates.items():
            if problem := template_problem(text):
                return f"{name}: {problem}"
        prompt, answer = template_fields(self.prompt or ""), template_fields(self.answer)
        if "options" in prompt and not self.choices:
            return "the prompt has {options}, but there are no choices"
        if self.shorten is not None and prompt.count(self.shorten) != 1:
            return f"shorten: the prompt needs the field {self.shorten!r} once"
        if self.choices and len(answer) != 1:
            return "with choices the answer is one field"
        if self.hub and self.reader != "rows":
            return f"rows of the hub are read by their columns, not by reader {self.reader!r}"
        if self.prompt is None:
            return self._needs_prompt()
        return "" if self.reader == "rows" else f"reader {self.reader!r} makes its own prompts; leave prompt out"

    def _needs_prompt(self) -> str:
        unused = [name for name in ("drop_labels", "source_between", "shorten") if getattr(self, name)]
        return f"{unused[0]} needs a prompt" if unused else ""


class Task(Scored):
    """One task of a stream."""

    train_file: str
    """Rows to learn; found as ``test_file`` is."""

    num_train_epochs: float | None = Field(default=None, gt=0)
    """Passes over the rows of this task, over what ``training`` says."""

    learning_rate_scale: float = Field(default=1.0, gt=0)
    """Factor on the method's learning rate for this task."""


class Ability(Scored):
    """Something the model can do before the stream begins. It is scored after every task and never trained."""


class MethodSettings(_Strict):
    """How one method runs on the stream."""

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


class TaskStream(_Strict):
    """A sequence of tasks with everything that a run needs to be repeated."""

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
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the name {twice!r} is given twice")
        for order, tasks in self.orders.items():
            for task in tasks:
                if task not in trained:
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
        LoricaError: not readable, not YAML, over 1 MB, or a field is missing, unknown or of the wrong type.
    """
    file = Path(path)
    try:
        if file.stat().st_size > MAX_STREAM_BYTES:
            raise LoricaError(f"{path}: over {MAX_STREAM_BYTES:,} bytes; that is no stream")
        stream = TaskStream.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise LoricaError(f"{path}: cannot read the stream: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LoricaError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise LoricaError(f"{path}: {_explain(error)}") from error
    stream._folder = file.parent
    return stream


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    reason = first["msg"].removeprefix("Value error, ")
    return f"field {where}: {reason}" if where else reason
