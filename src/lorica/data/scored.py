"""What can be trained on or scored: files or a data set on the hub, how their rows become prompts, and their metric."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorica.data.template import template_fields, template_problem

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
"""Unknown fields are errors, as are numbers without end; the string below a field is its description."""


class HubSource(BaseModel):
    """Where the rows of a task are on the hub, for those who have no folder of them."""

    model_config = STRICT

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


class Scored(BaseModel):
    """Rows that are scored: how they become prompts, and what counts as an answer."""

    model_config = STRICT

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
