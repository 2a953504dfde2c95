"""What transformers accepts and then fails on, or ignores."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainingArguments

from lorica import processes
from lorica.errors import LoricaError


def check_values(arguments: TrainingArguments, given: dict[str, Any]) -> None:
    """Refuse what transformers accepts and then fails on, or ignores."""
    if not (math.isfinite(rate := arguments.learning_rate) and rate >= 0):
        raise LoricaError(f"--learning_rate {rate} is {'negative' if rate < 0 else 'no finite number'}")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(arguments, name) < 1:
            raise LoricaError(f"--{name} {getattr(arguments, name)} is no number of rows; give at least 1")
    if arguments.max_steps == 0 or (arguments.max_steps < 0 and arguments.num_train_epochs <= 0):
        epochs = arguments.num_train_epochs
        raise LoricaError(f"--num_train_epochs {epochs:g} trains nothing; give a number above 0, or --max_steps")
    if not 0 <= arguments.seed < 2**32:
        raise LoricaError(f"--seed {arguments.seed} is none; give a number from 0 to {2**32 - 1}")
    if "eval_steps" in given and arguments.eval_strategy == "no":
        raise LoricaError("--eval_steps has no effect without --eval_strategy steps")
    in_steps = arguments.save_strategy == "steps" and arguments.save_steps != arguments.eval_steps
    if arguments.load_best_model_at_end and in_steps:
        raise LoricaError(
            f"--load_best_model_at_end: of the models scored every {arguments.eval_steps:g} steps only those of every "
            f"{arguments.save_steps:g} would be there, and the best may be none of them; give --save_steps "
            f"{arguments.eval_steps:g}, or --save_strategy best"
        )
    if processes.size() > 1:
        _check_shares(arguments)
    metric = arguments.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") != "loss":
        raise LoricaError(f"--metric_for_best_model {metric}: while training only the loss is scored; give loss")
    if arguments.n_gpu > 1:
        raise LoricaError(
            f"{arguments.n_gpu} GPUs for one process: start one for each, torchrun --nproc_per_node {arguments.n_gpu} "
            "-m lorica ..., or set CUDA_VISIBLE_DEVICES to one of them"
        )


def _check_shares(arguments: TrainingArguments) -> None:
    """Refuse ways to share the rows out that would leave processes with other numbers of batches, or the same rows."""
    sharing: Any = arguments.accelerator_config
    if not sharing.even_batches or sharing.dispatch_batches or sharing.split_batches:
        raise LoricaError("--accelerator_config: even_batches, dispatch_batches and split_batches stay as they are")
    if arguments.train_sampling_strategy == "group_by_length":
        raise LoricaError(
            "--train_sampling_strategy group_by_length: each process would draw an order of its own; leave it out"
        )
