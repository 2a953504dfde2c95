"""The optimizers and schedules of transformers, as far as their options can be judged before anything is loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from lorica.errors import LoricaError

EXTRAS = ("torchao", "bitsandbytes")
"""Packages of optimizers that Lorica's extras of the same name install."""

TORCHAO_BLOCK = 256
_BUILT_FROM_THE_MODEL = ("galore", "apollo", "lomo", "adalomo")


def check_optimizer(arguments: TrainingArguments) -> None:
    """Refuse an optimizer whose package is not installed, or whose options are wrong, before anything is loaded."""
    optim = OptimizerNames(arguments.optim).value
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError) as error:
        missing = next((name for name in EXTRAS if name in str(error)), None)
        if missing and isinstance(error, ImportError):
            raise LoricaError(
                f"--optim {optim} needs the package {missing}: pip install 'lorica[{missing}]'"
            ) from error
        if isinstance(error, ImportError) or not optim.startswith(_BUILT_FROM_THE_MODEL):
            raise LoricaError(f"--optim {optim}: {error}") from error


def wide_states(arguments: TrainingArguments, model: nn.Module) -> str | None:
    """Return what to say where torchao would keep more than a tenth of the states in float32, else None.

    It quantises tensors of a multiple of 256 numbers alone, and cores can be of any size.
    """
    if OptimizerNames(arguments.optim).value not in ("adamw_torch_8bit", "adamw_torch_4bit"):
        return None
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    wide = sum(size for size in sizes if size % TORCHAO_BLOCK)
    if 10 * wide <= sum(sizes):
        return None
    return (
        f"{100 * wide / sum(sizes):.0f} % of the optimizer's states stay in float32: torchao quantises only tensors of "
        f"a multiple of {TORCHAO_BLOCK} numbers; --optim adamw_bnb_8bit takes any"
    )


def check_schedule(arguments: TrainingArguments) -> None:
    """Refuse options that the schedule does not have, and miss those that it needs, before anything is loaded."""
    given: Any = arguments.lr_scheduler_kwargs or {}
    options = {name: value for name, value in given.items() if not isinstance(value, list)}  # one for each group
    blank = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=arguments.learning_rate)
    try:
        get_scheduler(arguments.lr_scheduler_type, blank, 0, 1, scheduler_specific_kwargs=options)
    except (TypeError, ValueError, ArithmeticError) as error:
        kind = SchedulerType(arguments.lr_scheduler_type).value
        raise LoricaError(f"--lr_scheduler_kwargs of --lr_scheduler_type {kind}: {error}") from error
