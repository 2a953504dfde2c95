"""IncLoRA: a new LoRA for each task, the earlier ones frozen."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from lorica.methods.adapters import Adapters, LoraOptions
from lorica.methods.base import METHODS, Method, Progress, Targets
from lorica.methods.task import TaskData


@METHODS.register("inclora")
class IncLoRA(Method):
    """Train a new LoRA for each task on top of the frozen ones of the tasks before, whose outputs are summed.

    After t tasks the weight is ``W + (alpha / r) (B_1 A_1 + ... + B_t A_t)``. A frozen adapter is merged into
    the weight, which computes the same, so nothing has to be carried. (In O-LoRA's code the frozen adapters'
    inputs pass through dropout too while a later task trains; here only the new one's do.)

    Source:
        arXiv 2310.14152, the baseline of that name.
    """

    options_type: ClassVar[type[Targets]] = LoraOptions
    summary = "a new LoRA for each task, the earlier ones frozen"
    reproduction = "tested against the sum of frozen adapters; no published figure reproduced yet"
    learning_rate_scale = 10.0
    extra = "peft"

    adapters: Adapters
    """Those of the current task."""

    def begin_task(self, model: nn.Module, task: TaskData, progress: Progress | None = None) -> None:
        self.adapters = Adapters(model, task, self.options)

    def end_task(self, model: nn.Module, task: TaskData) -> None:
        self.adapters.merge()
        del self.adapters
