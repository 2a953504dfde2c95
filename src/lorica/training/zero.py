"""Training under DeepSpeed's ZeRO-1 and ZeRO-2: when weights are folded, and how checkpoints hold the states.

Each process has the whole model, and of the optimizer's states its own part: of each group of parameters one flat
vector, cut into as many equal parts as there are processes. DeepSpeed's own checkpoints are pickles; none is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from lorica import processes
from lorica.constrain.protect import protected_layers
from lorica.errors import LoricaError
from lorica.training.deepspeed import HELD_BY_OPTIMIZER, unmarked
from lorica.training.model_state import OPTIMIZER, ModelState
from lorica.training.sharded_state import ShardedState
from lorica.training.states import load_tree, save_tree


class ZeroState(ModelState):
    """As ``ModelState``; of the optimizer's state each process writes and reads its own part."""

    def save_optimizer(self, optimizer: Optimizer, folder: Path) -> None:
        with processes.agreed():
            save_tree(_innermost(optimizer).state_dict(), folder, _own_part())

    def load_optimizer(self, optimizer: Optimizer, folder: Path) -> None:
        parts = len(list(folder.glob(f"{OPTIMIZER}.*.json")))
        if parts != processes.size():
            raise ValueError(
                f"it lies in {parts} parts, and DeepSpeed goes on with as many processes as it began with; "
                "--reset_optimizer goes on from the weights with a new one"
            )
        _innermost(optimizer).load_state_dict(load_tree(folder, _own_part()))


def state_of(model: nn.Module, arguments: TrainingArguments) -> ModelState:
    """Return how checkpoints hold a model that is trained with these arguments, and its optimizer."""
    if processes.in_step(model):
        return ShardedState(model)
    return ZeroState(model) if arguments.deepspeed else ModelState(model)


def _own_part() -> str:
    return f"{OPTIMIZER}.{processes.name()}"


def _innermost(optimizer: Any) -> Optimizer:
    """Return torch's optimizer, whose parameters DeepSpeed has replaced by its parts of them."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found: Optimizer = optimizer
    return found


class UnderZero:
    """The part of ``MethodMixin`` that is for DeepSpeed; without it it changes nothing."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        unmarked()
        if self.args.deepspeed and not self.is_deepspeed_enabled:
            raise LoricaError("--deepspeed: ACCELERATE_USE_CPU is set, with which Accelerate leaves DeepSpeed out")

    def _check_optimizer(self: Any, made: Optimizer, wrapped: Optimizer) -> None:
        """Refuse what DeepSpeed would take apart or round."""
        if not self.is_deepspeed_enabled:
            return
        if wrapped is not made:
            raise LoricaError(f"--deepspeed: {HELD_BY_OPTIMIZER}")
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                raise LoricaError(
                    f"--deepspeed: {name} would train in {parameter.dtype}, which DeepSpeed does in float32 copies; "
                    "give --dtype float32, and torch_autocast in the configuration for products in bfloat16"
                )

    def _prepare_for_training(self: Any, max_steps: int, loader: Any, resume: str | None) -> Any:
        if self.is_deepspeed_enabled and resume is not None:
            self._load_from_checkpoint(resume)  # before DeepSpeed copies the weights
            resume = None  # else the Trainer would look for DeepSpeed's own
        return super()._prepare_for_training(max_steps, loader, resume)  # type: ignore[misc]

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            for layer in protected_layers(self.model).values():
                layer.refresh()  # the step was a part of the backward pass, and of parameters that are no cores
        return loss

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        elif self.args.should_save:
            self._save(output_dir)  # the Trainer would first copy the whole model

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            if self.is_deepspeed_enabled and self.deepspeed is not None:
                self.deepspeed.destroy()
                _own_memory(self.model)


def _own_memory(model: nn.Module) -> None:
    """Give each parameter memory of its own again: DeepSpeed has made those that train parts of one vector."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()
