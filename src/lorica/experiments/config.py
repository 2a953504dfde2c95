"""The configuration of a run over a stream: every field with its meaning, its default and its check."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lorica.values import with_training

Seed = Annotated[int, Field(ge=0, lt=2**32)]


class RunConfig(BaseModel):
    """Methods on a stream, as ``lorica run`` and ``lorica.run`` take it.

    Any field of transformers' ``TrainingArguments`` may stand beside these under its own name; those go
    into ``training`` and hold for every method and task, over what the stream and the methods' settings say.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    stream: str
    """A benchmark of ``lorica list``, or a YAML file of your own tasks."""

    model_name_or_path: str
    """The model that every method starts from: a folder, or a name on the hub."""

    output_dir: str
    """Gets METHOD/run.json and a report. A run that was stopped goes on where it was when it is called again."""

    methods: list[str] = []
    """Methods of ``lorica list``, or names of the stream's own settings. Default: all that the stream has settings
    for. Several: --methods osft seqft lora."""

    methods_file: str | None = None
    """A YAML file of settings by name (method, label, learning_rate, options, training), beside the stream's own."""

    orders: list[str] = []
    """Orders of the stream. Default: its first."""

    seeds: list[Seed] = []
    """One run for each: of the order of the rows, dropout, new adapters and whatever a method draws. Default: the
    stream's own, else 0."""

    tasks: list[str] = []
    """Only these tasks of the stream; every output says so. Default: all."""

    data_dir: str | None = None
    """Folder of the stream's data files. Default: beside the stream's own file, or the hub where it names one."""

    held_out: list[str] = []
    """What else is scored after every task and never trained: files of rows, benchmarks (general, or one of its
    parts as general/piqa), names of lm-eval tasks."""

    learning_rates: list[float] = []
    """Grid to choose each method's learning rate from, on rows cut from train; over the rates in the settings."""

    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training rows of each task that the choice of the learning rate is made on."""

    select_by: Literal["average_accuracy", "learning_accuracy"] = "average_accuracy"
    """What the choice goes by: average_accuracy (the best at the end of the stream) or learning_accuracy (the
    smallest rate within one point of the best)."""

    max_train_rows: int | None = Field(default=None, ge=1)
    """At most so many training rows of each task, drawn by the first seed."""

    max_test_rows: int | None = Field(default=None, ge=1)
    """At most so many scored rows of each task, drawn by the first seed."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest generated answer, over what the tasks say."""

    max_length: int | None = Field(default=None, ge=2)
    """Longest row in tokens, over what the stream says."""

    save_models: bool = False
    """Keep the model at the end of each stream, as METHOD/model."""

    dtype: str = "auto"
    """Dtype of the weights: auto (as they are saved), float32, bfloat16 or float16."""

    padding_free: bool = False
    """Lay the rows of a micro-batch end to end instead of padding them; none sees another. For causal models that can
    keep rows apart."""

    model_revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    attn_implementation: str | None = None
    """sdpa, flash_attention_2, eager, ..."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models you have read."""

    allow_pickle: bool = False
    """Take a folder whose weights are pickles (*.bin) as well. They are read as tensors alone, running no code."""

    require_pinned: bool = False
    """Take nothing from the hub without its whole commit: --model_revision COMMIT, and data as OWNER/NAME@COMMIT."""

    training: dict[str, Any] = {}
    """Fields of transformers' TrainingArguments."""

    @field_validator("methods", "orders", "seeds", "tasks", "held_out", "learning_rates", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]

    @field_validator("orders", "stream", "model_name_or_path", "output_dir", "data_dir", "methods_file", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [str(item) for item in value]
        return None if value is None else str(value)

    @field_validator("output_dir")
    @classmethod
    def _home(cls, value: str) -> str:
        return str(Path(value).expanduser())

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for name in ("methods", "orders", "seeds", "tasks", "held_out", "learning_rates"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"--{name} names one twice: {' '.join(map(str, values))}")
        if not all(0 < rate < math.inf for rate in self.learning_rates):
            raise ValueError("--learning_rates holds one that is not above 0")
        return self


def build_run_config(values: dict[str, Any]) -> RunConfig:
    """Return the configuration of methods on a stream that flat values stand for; see ``values.with_training``."""
    return with_training(RunConfig, values)
