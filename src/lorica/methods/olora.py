"""O-LoRA: a new LoRA for each task, in input directions that the earlier ones leave free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorica.errors import LoricaError
from lorica.methods.adapters import LoraOptions
from lorica.methods.base import METHODS, Progress
from lorica.methods.inclora import IncLoRA
from lorica.methods.task import TaskData


@dataclass(frozen=True)
class OLoRAOptions(LoraOptions):
    """What O-LoRA is told; the defaults are those of its published code.

    Attributes:
        lambda1: weight of the overlap with earlier tasks, 0 or more.
        lambda2: weight of the norms of the new LoRA, 0 or more.
    """

    lambda1: float = 0.5
    lambda2: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda1", "lambda2"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} = {getattr(self, name)} is out of range: 0 or more")


@METHODS.register("olora")
class OLoRA(IncLoRA):
    """IncLoRA with a penalty on the overlap between the new adapter's input directions and all earlier ones'.

        penalty = lambda1 sum_l sum_(i<t) sum_jk |A_l,i A_l,t^T|_jk + lambda2 sum_l (||A_l,t||_F + ||B_l,t||_F)

    over the adapted weights l and the earlier tasks i: sums of absolute values, not of squares, and norms, not
    their squares, as in the published code. There the penalty is added to each micro-batch, so that it grows
    with gradient accumulation; here it counts once a step. The paper adapts the query and value projections
    only (``target_modules``).

    Source:
        arXiv 2310.14152, section 3.2; cmnfriend/O-LoRA, src/uie_trainer_lora.py.
    """

    options_type = OLoRAOptions
    summary = "a new LoRA for each task, kept from the earlier ones' input directions by a penalty (O-LoRA)"
    stores = "the A factor (r x inputs, float32) of every adapted weight and finished task; grows with the tasks"
    reproduction = "penalty tested by hand and as the literal sum over tasks; no published figure reproduced yet"

    def __init__(self, options: OLoRAOptions) -> None:
        super().__init__(options)
        self._earlier: dict[str, Tensor] = {}

    def begin_task(self, model: nn.Module, task: TaskData, progress: Progress | None = None) -> None:
        super().begin_task(model, task)
        inputs = {_key(name): a_RN for name, (a_RN, _) in self.adapters.factors().items()}
        earlier = self._earlier or {key: a_RN.new_empty(0, a_RN.shape[1]) for key, a_RN in inputs.items()}
        if {key: a.shape[1] for key, a in earlier.items()} != {key: a.shape[1] for key, a in inputs.items()}:
            self.adapters.merge()  # still zero: the model is as it was
            raise LoricaError("the LoRAs of earlier tasks do not fit this model; keep the model and target_modules")
        self._earlier = {key: a.to(inputs[key]) for key, a in earlier.items()}

    def penalty(self, model: nn.Module, inputs: Mapping[str, Tensor], logits: Tensor) -> Tensor | None:
        terms = []
        for name, (a_RN, b_MR) in self.adapters.factors().items():
            overlap = (self._earlier[_key(name)] @ a_RN.T).abs().sum()
            terms.append(self.options.lambda1 * overlap + self.options.lambda2 * (a_RN.norm() + b_MR.norm()))
        return torch.stack(terms).sum()

    def end_task(self, model: nn.Module, task: TaskData) -> None:
        for name, (a_RN, _) in self.adapters.factors().items():
            self._earlier[_key(name)] = torch.cat([self._earlier[_key(name)], a_RN.detach()])
        super().end_task(model, task)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the A factors of all finished tasks, stacked by rows ((tasks r) x inputs), by module name."""
        return dict(self._earlier)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        # What a file maps is not aligned as what was computed is, and a product may then differ in its last bit.
        self._earlier = {key: a.clone() for key, a in state.items()}


def _key(name: str) -> str:
    return f"{name}.lora_A"
