"""MiLoRA: LoRA that starts from the bottom singular triplets of each weight."""

from __future__ import annotations

from torch import nn

from lorica.methods.adapters import AdapterOptions, Adapters, singular_factors
from lorica.methods.base import METHODS, Progress
from lorica.methods.inclora import IncLoRA
from lorica.methods.task import TaskData


@METHODS.register("milora")
class MiLoRA(IncLoRA):
    """Before each task, split every weight anew; train its minor part as A and B, freeze the principal part.

        W = U S V^T        A = sqrt(S_r) V_r^T        B = U_r sqrt(S_r)        frozen: W - B A

    for the r smallest singular values. It starts where OSFT stays, but nothing keeps it there: A and B may
    turn into any directions as they train.

    Source:
        arXiv 2406.09044, section 3; sufenlp/MiLoRA (alpha = r).
    """

    options_type = AdapterOptions
    summary = "LoRA from the bottom singular triplets of each weight, the rest frozen (MiLoRA)"
    reproduction = "start tested against torch's SVD; no published figure reproduced yet"

    def begin_task(self, model: nn.Module, task: TaskData, progress: Progress | None = None) -> None:
        self.adapters = Adapters(model, task, self.options, singular_factors("bottom", self.options.r), progress)
