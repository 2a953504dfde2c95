"""Sequential LoRA: one LoRA that keeps training."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lorica.errors import LoricaError
from lorica.methods.adapters import Adapters, Factors, LoraOptions
from lorica.methods.base import METHODS, Method, Progress
from lorica.methods.task import TaskData


@METHODS.register("lora")
class LoRA(Method):
    """Train one and the same LoRA on task after task (SeqLoRA); each task has a fresh optimizer.

    Between tasks the model is plain, with ``(alpha / r) B A`` merged into its weights. The next task takes the
    same product out again and goes on with A and B, which are never rounded. Taking out what was merged gives
    back the weight from before the merge to the last bit wherever the merge did not raise its exponent, and
    is off by half a unit in the last place of the merged weight elsewhere. So bfloat16 loses no small update,
    and its rounding adds up more slowly than one rounding a task, which every other method has.

    Source:
        arXiv 2106.09685; the sequential baseline of arXiv 2310.14152.
    """

    options_type = LoraOptions
    summary = "one LoRA that keeps training, task after task"
    stores = "both factors (r x inputs and outputs x r, float32) of every adapted weight"
    reproduction = "tested against one PEFT LoRA that trains through; no published figure reproduced yet"
    learning_rate_scale = 10.0
    extra = "peft"

    adapters: Adapters
    """Those of the current task."""

    def __init__(self, options: LoraOptions) -> None:
        super().__init__(options)
        self._carried: dict[str, Tensor] = {}

    def begin_task(self, model: nn.Module, task: TaskData, progress: Progress | None = None) -> None:
        self.adapters = Adapters(model, task, self.options, self._carried_factors if self._carried else None)

    def end_task(self, model: nn.Module, task: TaskData) -> None:
        for name, factors in self.adapters.factors().items():
            self._carried |= zip(_keys(name), (factor.detach() for factor in factors), strict=True)
        self.adapters.merge()
        del self.adapters

    def state_dict(self) -> dict[str, Tensor]:
        """Return A and B by module name."""
        return dict(self._carried)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._carried = dict(state)

    def _carried_factors(self, name: str, weight_MN: Tensor) -> Factors:
        (m, n), r = weight_MN.shape, self.options.r
        a_RN, b_MR = (self._carried.get(key) for key in _keys(name))
        if a_RN is None or b_MR is None or a_RN.shape != (r, n) or b_MR.shape != (m, r):
            raise LoricaError(f"{name}: the LoRA of the task before does not fit; keep the model, target_modules and r")
        return a_RN, b_MR


def _keys(name: str) -> tuple[str, str]:
    return f"{name}.lora_A", f"{name}.lora_B"
