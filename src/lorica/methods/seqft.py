"""Sequential fine-tuning: the baseline that forgets."""

from __future__ import annotations

from torch import nn

from lorica.constrain.planning import plan
from lorica.constrain.protect import protect, release
from lorica.methods.base import METHODS, Method, Progress
from lorica.methods.task import TaskData


@METHODS.register("seqft")
class SeqFT(Method):
    """Plain fine-tuning of the weights that OSFT would constrain, task after task; the rest is frozen.

    It trains the same set of weights as OSFT, so that the two differ in the constraint alone; name
    ``train_also`` to open embeddings, head and norms as well. Weights narrower than float32 train through a
    float32 core, as OSFT's do (see ``lorica.protect``): in bfloat16 alone most of each small update is lost,
    and the baseline would learn less for that reason. What ``train_also`` names trains in its own dtype.
    """

    summary = "plain fine-tuning of the same weights, task after task (nothing protected)"
    reproduction = "float32 training tested bitwise against the plain optimizer; no published figure reproduced yet"

    def begin_task(self, model: nn.Module, task: TaskData, progress: Progress | None = None) -> None:
        asked = self.options
        self.plan = plan(
            model,
            1.0,
            target_modules=asked.target_modules,
            train_also=asked.train_also,
            freeze_experts=asked.freeze_experts,
        )
        protect(model, self.plan)

    def end_task(self, model: nn.Module, task: TaskData) -> None:
        release(model)
