"""Training arguments of a run: which may be given, whose word counts, and how many steps they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from lorica.errors import LoricaError
from lorica.training.arguments import check_arguments

INSTEAD = {"seed": "--seeds", "learning_rate": "--learning_rates"}
"""Training arguments that a run sets itself, and what to give instead."""

WITHOUT_EFFECT = (
    "save_only_", "save_on_", "eval_", "load_best_", "metric_for_best_", "greater_is_better", "resume_from_", "hub_",
)  # fmt: skip
"""How the names of training arguments begin that have no effect in a run."""

KEEPING = ("save_strategy", "save_steps", "save_total_limit")
"""What a run keeps of a task that is not finished: no matter for its scores."""

QUIET: dict[str, Any] = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
"""What a run does not need of the Trainer, unless it is asked for."""


def check_training(given: Mapping[str, Any], where: str) -> None:
    """Refuse training arguments that are unknown, of the wrong type, or not a run's to take.

    Args:
        where: whose they are, for messages.
    """
    for name in given:
        if name in INSTEAD:
            raise LoricaError(f"{where}: --{name} is set by lorica run for each cell; give {INSTEAD[name]}")
        if name.startswith(WITHOUT_EFFECT):
            raise LoricaError(
                f"{where}: --{name} has no effect in lorica run, which scores and keeps the end of every task and goes "
                "on by itself when the same command is given again; leave it out"
            )
    if given.get("save_strategy") == "best":
        raise LoricaError(f"{where}: --save_strategy best goes by scores while training; give no, steps or epoch")
    check_arguments(dict(given), where=f"{where}: ")


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return training arguments from several places; the later word counts, also on epochs against steps.

    Steps between checkpoints ask for checkpoints.
    """
    given = dict(QUIET)
    for layer in layers:
        if "num_train_epochs" in layer:
            given.pop("max_steps", None)  # or the epochs would have no effect
        if "save_steps" in layer:
            given["save_strategy"] = "steps"
        given |= layer
    return given


def planned_steps(arguments: TrainingArguments, rows: int) -> int:
    """Return the optimizer steps that the arguments mean for a task of so many rows.

    Methods that train on more rows than the task's own (replay) get the same number of steps.
    """
    if arguments.max_steps > 0:
        return arguments.max_steps
    batches = math.ceil(rows / (arguments.train_batch_size * arguments.world_size))
    return math.ceil(math.ceil(batches / arguments.gradient_accumulation_steps) * arguments.num_train_epochs)
