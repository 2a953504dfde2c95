"""What the methods that protect are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lorica.config import UpdateConfig
from lorica.constrain.origin import MemoryMode
from lorica.constrain.plan_options import check_tokens
from lorica.methods.base import Targets
from lorica.subspace.calibration import LENGTH, TOKENS, Batch
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import MEASURED, Constraint, Source

REMEMBER_ROWS = 64
"""Default of ``remember_rows``."""

REMEMBER_SIZE = 0.5
"""Default of ``remember_size``."""


@dataclass(frozen=True)
class Protection(Targets):
    """What the methods that protect are told: the arguments of ``lorica.plan``, and what holds between tasks.

    Attributes:
        calibration: where none is given and it is needed, "self" for causal models and "random" for others.
        calibration_tokens: how many of the tokens that the model writes before a task it is measured on, at least 1;
            by default 32,768. Where it writes to rehearse, at most these, and of causal models with ``prompts`` the
            half of them that are answers. Of random tokens 4,096 by default.
        plan: a finished plan, instead of all other options but ``protect_learned``, those of rehearsal and
            ``memory_mode``; and if its directions have still to be measured, those of ``calibration``,
            ``curvature_penalty`` and those of ``remember_tasks``.
        protect_learned: share of min(M, N), 0 to 1: so many of the top directions of what the finished tasks
            changed in a weight are protected besides. None: none; 0 also gives up those of earlier updates.
        remember_tasks: add what each finished task's inputs (and gradients) were to the calibration of the next ones;
            for every source but ``weight``.
        remember_rows: how many training rows of a task stand for it.
        remember_size: largest size of what is remembered of tasks, over that of the weights; above 0.
        prompts: token ids of prompts that the model answers by itself before each task. What it wrote calibrates in
            place of its text from BOS, and is what ``rehearse`` holds: of causal models beside text from BOS, half of
            the tokens each, of encoder-decoders alone.
        rehearse: rows of text that the model wrote before the task for each training row, 0 (none) or more: what it
            predicted there is held by a penalty, see ``lorica.methods.rehearsal``; for causal models, and with
            ``prompts`` for encoder-decoders. A micro-batch has at least one.
        rehearse_weight: weight of that penalty, above 0.
        rehearse_tokens: so many tokens are written before a task, at least 1, or "auto", which are more for a task of
            more tokens; see ``lorica.methods.own_texts``.
        rehearse_length: tokens of such a text at most, at least 2, or "auto", as many as the task's longest row has.
        rehearse_prompts: what a token of a prompt counts in the loss beside one of an answer, 0 (nothing) or more: a
            model that has learned to write a task's prompts rehearses that task with the next ones.
        curvature_penalty: strength of a penalty on what a change in the free directions is expected to make the model
            forget, 0 (none) or more, or "auto", which is stronger for short tasks; see
            ``lorica.methods.curvature_penalty``. For source ``curvature`` and constraint ``two-sided``, which measure
            what it needs.
        rank_schedule: protected share, 0 to 1, of each task in order; the last is for all further ones.
        memory_mode: as ``memory`` of ``lorica.protect``.
        predict_forgetting: take down before a task what is needed to foresee and to measure its forgetting, see
            ``lorica.methods.forgetting``; for causal models.
    """

    unfreeze_rank_ratio: float | None = None
    osft_unfreeze_rank_ratio: float | None = None
    effective_rank: float | int | None = None
    ranks: str = "uniform"
    source: Source = "weight"
    constraint: Constraint | None = None
    calibration: Sequence[Batch] | Literal["self", "random"] | None = None
    rank_pattern: Mapping[str, float | int] = field(default_factory=dict)
    mrr: float | None = None
    trr: float | None = None
    expected_forgetting: float | None = None
    calibration_tokens: int | None = None
    plan: Plan | None = None
    protect_learned: float | None = None
    remember_tasks: bool = False
    remember_rows: int = REMEMBER_ROWS
    remember_size: float = REMEMBER_SIZE
    prompts: Sequence[Sequence[int]] | None = None
    rehearse: float = 0.0
    rehearse_weight: float = 1.0
    rehearse_tokens: int | Literal["auto"] = TOKENS
    rehearse_length: int | Literal["auto"] = LENGTH
    rehearse_prompts: float = 0.0
    curvature_penalty: float | Literal["auto"] = 0.0
    rank_schedule: Sequence[float] | None = None
    memory_mode: MemoryMode = "fast"
    predict_forgetting: bool = False

    def __post_init__(self) -> None:
        if self.protect_learned is not None and not 0 <= self.protect_learned <= 1:
            raise ValueError(f"protect_learned = {self.protect_learned} is out of range: a share from 0 to 1")
        check_tokens(self.calibration_tokens, self.calibration, measured=self.measures)
        if self.remember_rows < 1:
            raise ValueError(f"remember_rows = {self.remember_rows} is out of range: at least 1")
        if self.remember_tasks and self.plan is None and self.source not in MEASURED:
            raise ValueError(
                f"remember_tasks has no effect with source {self.source!r}; it is for {' and '.join(MEASURED)}"
            )
        if self.remember_size <= 0:
            raise ValueError(f"remember_size = {self.remember_size} is out of range: above 0")
        idle = {"remember_rows": REMEMBER_ROWS, "remember_size": REMEMBER_SIZE}
        for name, default in idle.items():
            if getattr(self, name) != default and not self.remember_tasks:
                raise ValueError(f"{name} has no effect without remember_tasks")
        if not 0 <= self.rehearse < float("inf"):
            raise ValueError(f"rehearse = {self.rehearse} is out of range: 0 (none) or more")
        if not 0 < self.rehearse_weight < float("inf"):
            raise ValueError(f"rehearse_weight = {self.rehearse_weight} is out of range: above 0")
        if self.rehearse_tokens != "auto" and self.rehearse_tokens < 1:
            raise ValueError(f"rehearse_tokens = {self.rehearse_tokens} is out of range: at least 1, or 'auto'")
        if self.rehearse_length != "auto" and self.rehearse_length < 2:
            raise ValueError(f"rehearse_length = {self.rehearse_length} is out of range: at least 2, or 'auto'")
        if not 0 <= self.rehearse_prompts < float("inf"):
            raise ValueError(f"rehearse_prompts = {self.rehearse_prompts} is out of range: 0 (nothing) or more")
        if self.curvature_penalty != "auto" and not 0 <= self.curvature_penalty < float("inf"):
            raise ValueError(
                f"curvature_penalty = {self.curvature_penalty} is out of range: 0 (none) or more, or 'auto'"
            )
        if self.curvature_penalty and not self._measures_both_sides:
            raise ValueError(
                "curvature_penalty needs both sides of the curvature measured: source 'curvature' and constraint "
                "'two-sided'"
            )
        rehearsed = self.rehearse_tokens if self.rehearse and self.rehearse_tokens != "auto" else None
        if rehearsed is not None and self.calibrates_itself and (self.calibration_tokens or 0) > rehearsed:
            raise ValueError(
                f"calibration_tokens = {self.calibration_tokens} is more than the {self.rehearse_tokens} that are "
                "written to be rehearsed, on which the model is measured then; leave it out, or raise rehearse_tokens"
            )
        beside = {
            "rehearse_weight": 1.0, "rehearse_tokens": TOKENS, "rehearse_length": LENGTH, "rehearse_prompts": 0.0,
        }  # fmt: skip
        for name, default in beside.items():
            if getattr(self, name) != default and not self.rehearse:
                raise ValueError(f"{name} has no effect without rehearse")
        if self.prompts is not None and not (self.rehearse or self.calibrates_itself):
            raise ValueError("prompts_file has no effect without rehearse or calibration 'self' of what is measured")
        if self.rank_schedule is not None:
            self._check_schedule(self.rank_schedule)

    @property
    def measures(self) -> bool:
        """Whether something is to be measured."""
        if self.plan is not None:
            return bool(self.plan.unmeasured)
        return self.source in MEASURED or self.ranks == "importance"

    @property
    def calibrates_itself(self) -> bool:
        """Whether something is to be measured, and nothing but the model's own text was given for it."""
        return self.measures and (self.calibration is None or self.calibration == "self")

    @property
    def _measures_both_sides(self) -> bool:
        if self.plan is not None:
            return all((one.source, one.constraint) == ("curvature", "two-sided") for one in self.plan.entries)
        return self.source == "curvature" and self.constraint in (None, "two-sided")

    def _check_schedule(self, shares: Sequence[float]) -> None:
        wrong = next((share for share in shares if not 0 <= share <= 1), None)
        if wrong is not None or not shares:
            got = "nothing" if wrong is None else wrong
            raise ValueError(f"rank_schedule holds {got}: give protected shares from 0 to 1, one per task")
        amounts = ("unfreeze_rank_ratio", "osft_unfreeze_rank_ratio", "effective_rank")
        beside = next((name for name in amounts if getattr(self, name) is not None), None)
        if beside is not None:
            raise ValueError(f"{beside} and rank_schedule both say how much is protected; give one of them")
        if self.ranks != "uniform":
            raise ValueError(f"rank_schedule is for ranks 'uniform', not {self.ranks!r}")

    def given(self) -> set[str]:
        """Return the names of the fields that differ from their defaults."""
        defaults = Protection()
        pairs = {f.name: (getattr(self, f.name), getattr(defaults, f.name)) for f in fields(self)}
        return {name for name, (mine, theirs) in pairs.items() if mine != theirs and [mine, theirs] != [[], ()]}


def scheduled_share(schedule: Sequence[float], index: int) -> float:
    """Return the protected share of a task, counted from 0: the last of a ``rank_schedule`` is for all further ones."""
    return float(schedule[min(index, len(schedule) - 1)])


def given_options(config: UpdateConfig) -> dict[str, Any]:
    """Return the options of an update that were given and may be its method's; without ``calibration``."""
    names = {f.name for f in fields(Protection)} & UpdateConfig.model_fields.keys() - {"calibration"}
    defaults = {name: UpdateConfig.model_fields[name].get_default(call_default_factory=True) for name in names}
    return {name: getattr(config, name) for name in names if getattr(config, name) != defaults[name]}
