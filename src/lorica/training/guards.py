"""What stops a run before it does harm: losses, gradients and weights that are no numbers any more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorica.constrain.linear import SubspaceLayer
from lorica.constrain.protect import protected_layers
from lorica.errors import LoricaError
from lorica.training.checkpoints import checkpoints_in, unusable


class Diverged(LoricaError):
    """A loss, a gradient or a weight is no number any more.

    Attributes:
        what: which of them, at what step and in which rows, without advice.
    """

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}; {advice}")
        self.what = what


def last_good_checkpoint(output_dir: str) -> str:
    """Return which checkpoint a run can go on from, in words."""
    complete = (folder for folder in reversed(checkpoints_in(Path(output_dir))) if unusable(folder) is None)
    found = next(complete, None)
    return "no checkpoint was written yet" if found is None else f"the last good checkpoint is {found}"


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
        dense = {f"{name}.weight": layer.matrix for name, layer in self._layers.items()}
        broken = (name for name, tensor in (dense | self._trained).items() if not bool(tensor.isfinite().all()))
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
