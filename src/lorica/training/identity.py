"""What a run is: a checkpoint is gone on with by the same, or by one that differs in what it was told to change."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import SchedulerType, TrainingArguments

from lorica.errors import LoricaError
from lorica.files import write_text
from lorica.json_file import load_json

IDENTITY_FILE = "update.json"
"""Written before training starts; removed with the checkpoints when it has ended."""

TRAJECTORY = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "optim", "optim_args",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "bf16", "fp16", "tf32",
    "label_smoothing_factor", "neftune_noise_alpha", "dataloader_drop_last", "train_sampling_strategy",
    "optim_target_modules", "auto_find_batch_size", "accelerator_config", "use_liger_kernel", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "load_best_model_at_end", "metric_for_best_model",
    "greater_is_better",
)  # fmt: skip
"""Training arguments on which the weights depend: a resumed run must have the same."""

SCORING = ("eval_strategy", "eval_steps", "eval_delay", "save_strategy")
"""Of a run that goes by its scores they also depend on when it is scored, and what can be chosen."""

PROCESSES = "world_size"
"""How many processes there are, by transformers' name."""

ROWS_OF_A_STEP = {"per_device_train_batch_size", "gradient_accumulation_steps", PROCESSES}

CHANGEABLE = (
    "learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs", "max_steps", *sorted(ROWS_OF_A_STEP),
)  # fmt: skip
"""What a resumed run may be told to change, by name. With other rows, seeds or ranks it would be no continuation."""


def trajectory(arguments: TrainingArguments) -> dict[str, Any]:
    """Return the training arguments on which the weights depend, as plain data."""
    known = arguments.to_dict()
    names = TRAJECTORY + (SCORING if goes_by_scores(arguments) else ())
    return {name: known[name] for name in names if name in known} | {PROCESSES: arguments.world_size}


def goes_by_scores(arguments: TrainingArguments) -> bool:
    """Tell whether the weights depend on the scores that are taken while training."""
    by_scores = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
    return bool(arguments.load_best_model_at_end) or SchedulerType(arguments.lr_scheduler_type) in by_scores


def write_identity(output_dir: Path, identity: dict[str, Any]) -> None:
    """Write down what a resumed run must agree with."""
    write_text(output_dir / IDENTITY_FILE, json.dumps(identity, indent=1, default=str) + "\n")


def check_identity(output_dir: Path, identity: dict[str, Any], allowed: Collection[str] = ()) -> None:
    """Refuse to resume a run that was another one.

    Args:
        identity: of this run.
        allowed: names in ``CHANGEABLE`` that may differ.

    Raises:
        LoricaError: the identity is missing or unreadable, or names the first field that differs; or a name that is
            allowed to differ cannot.
    """
    for name in allowed:
        if name not in CHANGEABLE:
            raise LoricaError(
                f"--allow_changed {name}: no run goes on with another; what may change is {', '.join(CHANGEABLE)}"
            )
    file = output_dir / IDENTITY_FILE
    try:
        before = dict(load_json(file, constants=True))
    except (OSError, ValueError, TypeError) as error:
        raise LoricaError(f"{file}: cannot tell what run the checkpoint belongs to: {error}") from error
    now = json.loads(json.dumps(identity, default=str))
    changed = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    for name in sorted(changed - set(allowed)):
        way = f", or --allow_changed {name} to go on with another" if name in CHANGEABLE else ""
        raise LoricaError(
            f"--resume_from_checkpoint: {name} was {before.get(name)} and is now {now.get(name)}; give what the "
            f"run began with, or start anew in another --output_dir{way}"
        )
    if changed & ROWS_OF_A_STEP and _rows(before) != _rows(now):
        raise LoricaError(
            f"--resume_from_checkpoint: a step had {_rows(before)} rows and now has {_rows(now)}, which would begin at "
            f"another row; give {' and '.join(sorted(ROWS_OF_A_STEP))} (processes) whose product is the same"
        )


def _rows(identity: Mapping[str, Any]) -> int:
    return math.prod(int(identity.get(name, 1)) for name in ROWS_OF_A_STEP)
