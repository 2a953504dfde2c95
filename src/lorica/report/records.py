"""The records of commands: what a run, an update or a judgement wrote about itself. The report needs nothing else."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorica.errors import LoricaError
from lorica.scores import FloatArray, ScoreMatrix

SCHEMA = 1

Values = dict[str, float | None]


class _Part(BaseModel):
    """Unknown fields are left alone: a record holds more than the report shows."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class Cost(_Part):
    """What a run took; every figure is optional."""

    seconds: float | None = None
    training_seconds: float | None = None
    steps: int | None = None
    seconds_per_step: float | None = None
    peak_rss_bytes: int | None = None
    trainable_parameters: int | None = None
    trained_bytes: int | None = None


class PlanEntry(_Part):
    """How much of one weight is protected: ``k`` directions, a share of min(M, N); ``free`` coordinates train."""

    name: str
    shape: list[int]
    k: int
    free: int
    share: float = Field(ge=0, le=1)
    source: str
    constraint: str


class Spectrum(_Part):
    """Some singular values of a weight, descending, and which they are, from 0."""

    index: list[int] = Field(min_length=1)
    sigma: list[float] = Field(min_length=1)


class Leak(_Part):
    """Share of one weight's change in its protected directions, beside that of an unconstrained change.

    ``u`` is the output side, ``v`` the input side. A side that protects nothing is null or 0.
    """

    name: str
    leak_u: float | None = Field(default=None, ge=0)
    leak_v: float | None = Field(default=None, ge=0)
    unconstrained_u: float | None = Field(default=None, ge=0)
    unconstrained_v: float | None = Field(default=None, ge=0)
    relative_change: float | None = None
    shape: list[int] = []
    k: int = 0
    spectrum: Spectrum | None = None


class LossPoint(_Part):
    """Training loss at one optimizer step; null where it was no number."""

    step: int
    loss: float | None = None
    learning_rate: float | None = None


class Measured(_Part):
    """One evaluation: figures by name, or by set and then name."""

    eval: Values = {}
    retention: dict[str, float | Values | None] = {}


class BeforeAfter(_Part):
    """The same evaluation of the model that came in and of the one that went out."""

    before: Measured = Measured()
    after: Measured = Measured()


class Data(_Part):
    """Counts, hashes and notices of each file, by field; the report shows what it finds."""

    train: dict[str, Any] = {}
    eval: dict[str, Any] | None = None
    retention: dict[str, dict[str, Any]] = {}


class _Record(_Part):
    method: str
    label: str = ""
    seed: int | None = None
    model: str | None = None
    model_parameters: int | None = None
    learning_rate: float | None = None
    cost: Cost = Cost()
    plan: list[PlanEntry] = []
    leakage: list[Leak] = []
    versions: dict[str, Any] = {}
    hardware: dict[str, Any] = {}
    git_revision: str | None = None
    command: str | None = None

    @property
    def title(self) -> str:
        """The label, or the method's name where there is none."""
        return self.label or self.method


class MethodFacts(_Part):
    """What a reader must know of a method beside its scores."""

    stores: str = ""
    needs_old_data: bool = False
    needs_task_id: bool = False


class Candidate(_Part):
    """What one learning rate reached on the rows it was chosen on; of each held-out ability before and after."""

    average_accuracy: float | None = None
    learning_accuracy: float | None = None
    retention: dict[str, list[float | None]] = {}


class Sweep(_Part):
    """The choice of a learning rate: the grid, the figures by rate as text, and which rate it was."""

    selected: float
    selected_by: str
    at_edge_of_grid: bool = False
    validation: dict[str, Candidate] = {}


class RunRecord(_Record):
    """One method on one stream of tasks, with one order and one seed (``run.json``).

    ``row_scores`` holds the scores of single rows at the end, by task or ability, as one string of numbers each.
    """

    stream: str
    stream_version: int | str | None = None
    tasks: list[str]
    scores: list[list[float | None]]
    retention: dict[str, list[float | None]] = {}
    name: str | None = None
    order: str | None = None
    left_out: list[str] = []
    facts: MethodFacts | None = None
    sweep: Sweep | None = None
    beside: dict[str, dict[str, list[float | None]]] = {}
    row_scores: dict[str, str] = {}
    metric_names: dict[str, str] = {}
    floors: dict[str, float] = {}
    carried_bytes: list[int] = []
    worst_leakage: list[float | None] = []
    data: dict[str, Any] = {}
    config: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fits(self) -> RunRecord:
        try:
            _ = self.matrix
        except LoricaError as error:
            raise ValueError(str(error)) from None
        for ability, values in self.retention.items():
            if len(values) != len(self.tasks) + 1:
                raise ValueError(f"retention of {ability!r} has {len(values)} values, not {len(self.tasks) + 1}")
        return self

    @cached_property
    def matrix(self) -> ScoreMatrix:
        """The scores, checked. Metrics are always computed from it, so that they cannot disagree with it."""
        return ScoreMatrix.from_json({"tasks": self.tasks, "scores": self.scores})

    @cached_property
    def rows(self) -> dict[str, FloatArray]:
        """The score of every row at the end, by task or ability, where they were kept.

        Raises:
            LoricaError: a string holds something else than numbers.
        """
        try:
            return {name: np.array(text.split(), dtype=np.float64) for name, text in self.row_scores.items() if text}
        except ValueError as error:
            raise LoricaError(f"run record of {self.title!r}: row_scores: {error}") from None

    def limits(self) -> dict[str, Any]:
        """Return what cut the run short of its benchmark, of the run's own settings that say so."""
        run = self.config.get("run")
        names = ("max_train_rows", "max_test_rows", "max_new_tokens", "max_length")
        return {name: run[name] for name in names if run.get(name) is not None} if isinstance(run, dict) else {}

    def retained(self, stage: int) -> float | None:
        """Mean over the held-out abilities after ``stage`` tasks, percent; None where one is unmeasured."""
        values = [series[stage] for series in self.retention.values()]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None


class Parent(_Part):
    """The model that an update started from, and how many updates had made it."""

    model: str | None = None
    weights_sha256: str | None = None
    updates: int = 0


class TrainRecord(_Record):
    """One update of one model on one data set (``lorica.json``).

    ``rejected`` holds the files that lost too much, with the points; the model was set aside then.
    """

    method: str = "osft"
    scores: BeforeAfter = BeforeAfter()
    loss_curve: list[LossPoint] = []
    data: Data = Data()
    parent: Parent = Parent()
    weights_sha256: str | None = None
    carried_bytes: int | None = None
    rejected: dict[str, float] = {}


class Share(_Part):
    """A percentage with the ends of its interval."""

    percent: float
    low: float | None = None
    high: float | None = None


class BothSides(_Part):
    """A figure of the model before and of the one after."""

    before: float | None = None
    after: float | None = None


class JudgeRecord(_Part):
    """A model judged against the one before it, prompt by prompt (``judge.json``)."""

    before: str
    after: str
    win: Share
    tie: Share
    lose: Share
    prompts: int
    level: float = 0.95
    ties: dict[str, int] = {}
    judge: dict[str, Any] = {}
    keyword_refusal_rate: BothSides = BothSides()
    cut_answers: BothSides = BothSides()
    max_new_tokens: int | None = None
    files: dict[str, Any] = {}
    limit: int | None = None
    versions: dict[str, Any] = {}
    hardware: dict[str, Any] = {}
    git_revision: str | None = None
    command: str | None = None
