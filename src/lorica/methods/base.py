"""What a method is: a few hooks around training that is always the Trainer's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from lorica.constrain.audit_report import AuditReport
from lorica.registry import Registry
from lorica.subspace.calibration import Batch
from lorica.subspace.plan import Constraint, Plan, Source

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Protection:
    """What the methods that protect are told; the fields are the arguments of ``lorica.plan``."""

    unfreeze_rank_ratio: float | None = None
    osft_unfreeze_rank_ratio: float | None = None
    effective_rank: float | int | None = None
    ranks: str = "uniform"
    source: Source = "weight"
    constraint: Constraint | None = None
    calibration: Iterable[Batch] | Literal["self", "random"] | None = None
    target_modules: Sequence[str] | None = None
    rank_pattern: Mapping[str, float | int] = field(default_factory=dict)
    train_also: Sequence[str] = ()
    freeze_experts: bool = False
    mrr: float | None = None
    trr: float | None = None
    plan: Plan | None = None

    def given(self) -> set[str]:
        """Return the names of the fields that differ from their defaults."""
        defaults = Protection()
        pairs = {f.name: (getattr(self, f.name), getattr(defaults, f.name)) for f in fields(self)}
        return {name for name, (mine, theirs) in pairs.items() if mine != theirs and [mine, theirs] != [[], ()]}


class Method:
    """One way to learn a task without losing what came before. The default of every hook does nothing.

    A method never calls ``backward`` or ``step``: the Trainer is the loop.

    Attributes:
        plan: what the current task trains, once it has begun.
    """

    summary = ""
    """One line for ``lorica list``."""

    plan: Plan | None = None

    def __init__(self, protection: Protection) -> None:
        self.protection = protection

    def begin_task(self, model: nn.Module, progress: Progress | None = None) -> None:
        """Prepare the model for a task, in place; called before the optimizer is built."""

    def wrap_optimizer(self, optimizer: Optimizer, max_grad_norm: float) -> Optimizer:
        """Return the optimizer to train with; called once a task, with the Trainer's optimizer."""
        return optimizer

    @property
    def clips(self) -> bool:
        """Whether the optimizer of ``wrap_optimizer`` clips gradients itself, so that the Trainer must not."""
        return False

    def audit(self, model: nn.Module) -> AuditReport | None:
        """Return the proof of the constraint after training, or None for a method without one."""
        return None

    def end_task(self, model: nn.Module) -> None:
        """Make the model plain again, in place."""


METHODS: Registry[type[Method]] = Registry("method")
