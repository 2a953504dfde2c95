"""The records of commands: what a run, an update or a judgement wrote about itself. The report needs nothing else."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lorica.errors import LoricaError
from lorica.scores import FloatArray, ScoreMatrix

SCHEMA = 1

Number = Annotated[float, Field(ge=-1e150, le=1e150)]
"""Beyond that squares and ratios would be no numbers any more; even a run that diverges stays below."""

Count = Annotated[int, Field(ge=0, le=2**63)]
Side = Annotated[int, Field(ge=1, le=2**31)]
Values = dict[str, Number | None]


class _Part(BaseModel):
    """Unknown fields are left alone: a record holds more than the report shows."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class Cost(_Part):
    """What a run took; every figure is optional."""

    seconds: Number | None = None
    training_seconds: Number | None = None
    steps: Count | None = None
    seconds_per_step: Number | None = None
    peak_rss_bytes: Count | None = None
    trainable_parameters: Count | None = None
    trained_bytes: Count | None = None


class PlanEntry(_Part):
    """How much of one weight is protected: ``k`` directions, a share of min(M, N); ``free`` coordinates train."""

    name: str
    shape: list[Side] = Field(min_length=1)
    k: Count
    free: Count
    share: float = Field(ge=0, le=1)
    source: str
    constraint: str


class Spectrum(_Part):
    """Some singular values of a weight, descending, and which they are, from 0."""

    index: list[Count] = Field(min_length=1)
    sigma: list[Annotated[Number, Field(ge=0)]] = Field(min_length=1)

    @model_validator(mode="after")
    def _pairs(self) -> Spectrum:
        if len(self.index) != len(self.sigma):
            raise ValueError(f"{len(self.index)} places and {len(self.sigma)} singular values")
        return self


class Leak(_Part):
    """Share of one weight's change in its protected directions, beside that of an unconstrained change.

    ``u`` is the output side, ``v`` the input side. A side that protects nothing is null or 0.
    """

    name: str
    leak_u: Number | None = Field(default=None, ge=0)
    leak_v: Number | None = Field(default=None, ge=0)
    unconstrained_u: Number | None = Field(default=None, ge=0)
    unconstrained_v: Number | None = Field(default=None, ge=0)
    relative_change: Number | None = None
    shape: list[Side] = []
    k: Count = 0
    spectrum: Spectrum | None = None


class EnergyShares(_Part):
    """Share of the energy of one side in as many directions: protected, random, the best there are."""

    protected: Number
    random: Number
    best: Number


class ProtectedShares(_Part):
    """Mean over the weights, of inputs and of output gradients; ``expected``: forgetting over that of no protection."""

    inputs: EnergyShares | None = None
    outputs: EnergyShares | None = None
    expected: Number | None = None


class PredictedForgetting(_Part):
    """How far a training was expected to move the model's predictions, and how far it did, in nats per token."""

    task: str = ""
    predicted: Number | None = None
    measured: Number | None = None
    tokens: Count | None = None
    by_kind: Values = {}
    shares: ProtectedShares = ProtectedShares()


class LossPoint(_Part):
    """Training loss at one optimizer step; null where it was no number."""

    step: Count
    loss: Number | None = None
    learning_rate: Number | None = None


class Measured(_Part):
    """One evaluation: figures by name, or by set and then name."""

    eval: Values = {}
    retention: dict[str, Number | Values | None] = {}


class BeforeAfter(_Part):
    """The same evaluation of the model that came in and of the one that went out."""

    before: Measured = Measured()
    after: Measured = Measured()


class Data(_Part):
    """Counts, hashes and notices of each file, by field; the report shows what it finds."""

    train: dict[str, Any] = {}
    eval: dict[str, Any] | None = None
    retention: dict[str, dict[str, Any]] = {}
    prompts: dict[str, Any] = {}


class _Record(_Part):
    method: str
    label: str = ""
    seed: Count | None = None
    model: str | None = None
    model_parameters: Count | None = None
    learning_rate: Number | None = None
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

    average_accuracy: Number | None = None
    learning_accuracy: Number | None = None
    retention: dict[str, list[Number | None]] = {}


class Sweep(_Part):
    """The choice of a learning rate: the grid, the figures by rate as text, and which rate it was."""

    selected: Number
    selected_by: str
    at_edge_of_grid: bool = False
    validation: dict[str, Candidate] = {}

    @field_validator("validation")
    @classmethod
    def _rates(cls, validation: dict[str, Candidate]) -> dict[str, Candidate]:
        for rate in validation:
            if not math.isfinite(float(rate)):
                raise ValueError(f"{rate!r} is no learning rate")
        return validation


class RunRecord(_Record):
    """One method on one stream of tasks, with one order and one seed (``run.json``).

    ``row_scores`` holds the scores of single rows at the end, by task or ability, as one string of numbers each.
    """

    stream: str
    stream_version: int | str | None = None
    tasks: list[str]
    scores: list[list[Number | None]]
    retention: dict[str, list[Number | None]] = {}
    name: str | None = None
    order: str | None = None
    left_out: list[str] = []
    facts: MethodFacts | None = None
    sweep: Sweep | None = None
    beside: dict[str, dict[str, list[Number | None]]] = {}
    row_scores: dict[str, str] = {}
    metric_names: dict[str, str] = {}
    floors: dict[str, Number] = {}
    carried_bytes: list[Count] = []
    worst_leakage: list[Number | None] = []
    predicted_forgetting: list[PredictedForgetting] = []
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
    updates: Count = 0


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
    carried_bytes: Count | None = None
    predicted_forgetting: PredictedForgetting | None = None
    rejected: dict[str, Number] = {}


class Share(_Part):
    """A percentage with the ends of its interval."""

    percent: Number
    low: Number | None = None
    high: Number | None = None


class BothSides(_Part):
    """A figure of the model before and of the one after."""

    before: Number | None = None
    after: Number | None = None


class JudgeRecord(_Part):
    """A model judged against the one before it, prompt by prompt (``judge.json``)."""

    before: str
    after: str
    win: Share
    tie: Share
    lose: Share
    prompts: Count
    level: float = Field(default=0.95, gt=0, lt=1)
    ties: dict[str, Count] = {}
    judge: dict[str, Any] = {}
    keyword_refusal_rate: BothSides = BothSides()
    cut_answers: BothSides = BothSides()
    max_new_tokens: Count | None = None
    files: dict[str, Any] = {}
    limit: Count | None = None
    versions: dict[str, Any] = {}
    hardware: dict[str, Any] = {}
    git_revision: str | None = None
    command: str | None = None
