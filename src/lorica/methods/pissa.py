"""PiSSA: LoRA that starts from the top singular triplets of each weight."""

from __future__ import annotations

from torch import nn

from lorica.methods.adapters import AdapterOptions, Adapters, singular_factors
from lorica.methods.base import METHODS, Progress
from lorica.methods.inclora import IncLoRA
from lorica.methods.task import TaskData


@METHODS.register("pissa")
class PiSSA(IncLoRA):
    """Before each task, split every weight anew; train its principal part as A and B, freeze the rest.

        W = U S V^T        A = sqrt(S_r) V_r^T        B = U_r sqrt(S_r)        frozen: W - B A

    for the r largest singular values. The opposite of OSFT: what the weight does most is what moves.

    Source:
        arXiv 2404.02948; without its conversion to a plain LoRA, since the adapter is merged.
    """

    options_type = AdapterOptions
    summary = "LoRA from the top singular triplets of each weight, the rest frozen (PiSSA)"
    reproduction = "start tested against torch's SVD and PEFT's PiSSA; no published figure reproduced yet"

    def begin_task(self, model: nn.Module, task: TaskData, progress: Progress | None = None) -> None:
        self.adapters = Adapters(model, task, self.options, singular_factors("top", self.options.r), progress)
