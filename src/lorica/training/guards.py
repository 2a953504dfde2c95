"""What stops a run before it does harm: losses, gradients and weights that are no numbers any more."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorica import processes
from lorica.constrain.linear import SubspaceLayer
from lorica.constrain.protect import protected_layers
from lorica.errors import LoricaError
from lorica.training.checkpoints import checkpoints_in, step_of, unusable


class Diverged(LoricaError):
    """A loss, a gradient or a weight is no number any more.

    Attributes:
        what: which of them, at what step and in which rows, without advice.
    """

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}; {advice}")
        self.what = what


def last_good_checkpoint(output_dir: str, before: float = math.inf) -> str:
    """Return which checkpoint a run can go on from, in words; one that was written before a step."""
    earlier = (folder for folder in reversed(checkpoints_in(Path(output_dir))) if step_of(folder) < before)
    found = next((folder for folder in earlier if unusable(folder) is None), None)
    if found is None:
        return "no checkpoint was written yet" if before == math.inf else f"no checkpoint is from before step {before}"
    return f"the last good checkpoint is {found}"


class WeightWatch(TrainerCallback):
    """After each step, before anything is saved: that all trained weights are numbers.

    A norm over what trains answers that at the cost of reading it once. Of a protected layer that is the core M alone,
    for the bases are orthonormal:

        max |W| <= max |W0| + |M|_F

    so that the dense weight is looked at only where the norm comes near the largest number of its dtype.

    Args:
        stop: takes the name of a weight that holds NaN or inf, and raises.
    """

    def __init__(self, stop: Callable[[str], None]) -> None:
        self.stop = stop
        self._trained: dict[str, Tensor] = {}
        self._layers: dict[str, SubspaceLayer] = {}
        self._limit = 0.0

    def watch(self, model: nn.Module) -> None:
        """Look at this model from now on."""
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._layers = protected_layers(model)
        matrices = (layer.matrix for layer in self._layers.values())
        dtypes = {tensor.dtype for tensor in (*self._trained.values(), *matrices)}
        self._limit = min((torch.finfo(dtype).max / 2 for dtype in dtypes), default=0.0)

    @torch.no_grad()
    def broken(self) -> str | None:
        """Return the name of a trained weight that holds NaN or inf, None where there is none."""
        if not self._trained or bool(torch.nn.utils.get_total_norm(self._trained.values()) <= self._limit):
            return None
        dense = {f"{name}.weight": layer.get_parameter("weight") for name, layer in self._layers.items()}
        broken = (name for name, tensor in (dense | self._trained).items() if _broken_anywhere(tensor))
        return next(broken, None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.watch(kwargs["model"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        name = self.broken()
        if name is not None:
            self.stop(name)


def _broken_anywhere(tensor: Tensor) -> bool:
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return bool(processes.largest(not own.isfinite().all()))


class ScaleWatch(TrainerCallback):
    """After each step in float16: that steps are still taken.

    The scaler skips a step whose scaled gradients hold NaN or inf, and halves its scale; from 65536, so that a few
    steps of any run are skipped. Below a scale of 1 the gradients are too large by themselves, and it would skip every
    step there is.

    Args:
        accelerator: of the Trainer.
        stop: takes the scale of a skipped step and how many were skipped one after the other, and raises.
    """

    def __init__(self, accelerator: Any, stop: Callable[[float, int], None]) -> None:
        self.accelerator, self.stop = accelerator, stop
        self.skipped, self._scale = 0, 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.accelerator.scaler is not None:
            self._scale = self.accelerator.scaler.get_scale()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.accelerator.scaler is None:
            return
        scale = self.accelerator.scaler.get_scale()  # Accelerate takes a skipped step of a fused optimizer for a step
        self.skipped = self.skipped + 1 if scale < self._scale else 0
        if self.skipped and scale < 1:
            self.stop(self._scale, self.skipped)
