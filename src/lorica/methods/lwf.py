"""Learning without Forgetting: on the new rows, go on answering as the model before did."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.methods.base import METHODS, Progress, Targets
from lorica.methods.positions import trained_positions
from lorica.methods.seqft import SeqFT
from lorica.methods.task import TaskData


@dataclass(frozen=True)
class LwFOptions(Targets):
    """Options of ``lwf``.

    Attributes:
        lwf_lambda: weight of the distillation, 0 or more; 1 as in the paper. Search 0.1 to 10.
        temperature: above 0; 2 as in the paper and in TRACE.
        from_first_task: distil from the model that came in at the first task too. Off, as in the paper and in
            TRACE, where nothing precedes the first task; a language model does know something already.
    """

    lwf_lambda: float = 1.0
    temperature: float = 2.0
    from_first_task: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.lwf_lambda < float("inf"):
            raise ValueError(f"lwf_lambda = {self.lwf_lambda} is out of range: 0 or more")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature} is out of range: above 0")


@METHODS.register("lwf")
class LwF(SeqFT):
    """Learning without Forgetting, for language models.

    With p and q the token distributions of the model before the task and of the one in training, both at
    temperature T (logits / T), the loss is

        mean token loss + lwf_lambda * T^2 * mean over the trained tokens of KL(p || q)

    T^2 keeps the gradient's size independent of T (Hinton et al. 2015). The paper's cross-entropy has the same
    gradient without that factor; TRACE computes KL(q || p) instead. The paper's old heads are one vocabulary here:
    the old answers that are distilled are those to the new rows, at the positions of the new answers.

    It costs a second copy of the model in memory and its forward pass at each step. The copy computes in the model's
    own dtype, also where the training is in mixed precision.

    Source:
        Li and Hoiem 2016, arXiv 1606.09282; TRACE, arXiv 2310.06762.
    """

    options_type = LwFOptions
    summary = "sequential fine-tuning, distilled from the model before each task (Learning without Forgetting)"
    stores = "nothing; a second copy of the model while a task trains"
    reproduction = "distillation tested by hand and against its definition; no published figure reproduced yet"

    def __init__(self, options: LwFOptions) -> None:
        super().__init__(options)
        self._teacher: nn.Module | None = None

    def begin_task(self, model: nn.Module, task: TaskData, progress: Progress | None = None) -> None:
        if task.index > 0 or self.options.from_first_task:
            self._teacher = copy.deepcopy(model).eval().requires_grad_(False)
        super().begin_task(model, task, progress)

    def penalty(self, model: nn.Module, inputs: Mapping[str, Tensor], logits: Tensor) -> Tensor | None:
        if self._teacher is None:
            return None
        with torch.no_grad():
            old = self._teacher(**inputs).logits
        old_TV, _ = trained_positions(model, inputs["labels"], old)
        new_TV, _ = trained_positions(model, inputs["labels"], logits)
        return self.options.lwf_lambda * distillation(old_TV, new_TV, self.options.temperature)

    def end_task(self, model: nn.Module, task: TaskData) -> None:
        self._teacher = None
        super().end_task(model, task)


def distillation(old_TV: Tensor, new_TV: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 KL(softmax(old / T) || softmax(new / T))`` in nats, the mean over tokens.

    Args:
        old_TV: the teacher's logits, (tokens, vocabulary).
        new_TV: the student's.
        temperature: T.
    """
    old, new = (F.log_softmax(logits.float() / temperature, dim=-1) for logits in (old_TV, new_TV))
    return temperature**2 * F.kl_div(new, old, reduction="batchmean", log_target=True)
