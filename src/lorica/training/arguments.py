"""TrainingArguments from untyped values: our defaults, every option checked and none ignored."""

from __future__ import annotations

import math
import os
import typing
import warnings
from dataclasses import fields
from enum import Enum
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn
from transformers import SchedulerType, Seq2SeqTrainingArguments, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames

from lorica import processes
from lorica.config import UpdateConfig
from lorica.errors import LoricaError, did_you_mean
from lorica.training.in_backward import check_in_backward
from lorica.training.sharding import OPTIONS as SHARDING
from lorica.training.sharding import check_option

LEARNING_RATE_TIMES_WIDTH = 0.08
"""The default learning rate times the model's hidden size; see ``default_learning_rate``."""

DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_steps": 10,
    "save_total_limit": 2,
    "report_to": "none",
    # The Trainer's filter would replace a NaN loss by the running mean and go on.
    "logging_nan_inf_filter": False,
    # Pinned memory is for copies to a GPU; without one torch warns at every start.
    "dataloader_pin_memory": torch.cuda.is_available(),
}
"""Where Lorica's default differs from transformers'."""

OWN = {"output_dir", "do_train", "do_eval", "do_predict", "remove_unused_columns", "predict_with_generate"}
"""Arguments that Lorica sets itself."""

_UPLOAD = (
    "the Trainer would upload checkpoints and all else in the folder. When the model is done, read lorica.json, "
    "which tells how it was made, and upload what belongs to it: hf upload OWNER/NAME OUTPUT_DIR . --private "
    "--include '*.safetensors' --include '*.json' --include '*.jinja' --include '*.txt' --include '*.model' "
    "--exclude 'checkpoint-*/*'"
)
_TOKEN = "a token would end up in files and in the list of processes; set the environment variable HF_TOKEN instead"

_SHARDED = "lorica train --fsdp full_shard shards the model, see docs/distributed.md"

REFUSED = {
    "deepspeed": f"it takes the weights apart; {_SHARDED}",
    "ddp_timeout": "the processes have met before it is read; they wait for each other for six hours",
    "save_on_each_node": "one process writes, and all read it; --output_dir has to be a folder that all nodes see",
    "hub_token": _TOKEN,
    "push_to_hub_token": _TOKEN,
    "token": _TOKEN,
    "push_to_hub": _UPLOAD,
    "hub_model_id": _UPLOAD,
    "hub_strategy": _UPLOAD,
    "hub_always_push": _UPLOAD,
    "hub_revision": _UPLOAD,
    "auto_find_batch_size": "it would begin again on weights that have trained already; a micro-batch that does not "
    "fit into memory is run in halves by itself",
    "ignore_data_skip": "a resumed run would train on rows again that it has trained on, and leave others out",
    "dataloader_persistent_workers": "workers that outlive an epoch draw no new seed for the next one, but those of a "
    "resumed run do, and so it would go on with its rows in another order",
    "packing": "rows stay rows, none is cut and none joined to others for good; --padding_free lays the rows of a "
    "micro-batch end to end instead of padding them",
    "enable_jit_checkpoint": "SIGTERM is answered with a checkpoint without it, and its own would not be complete",
}
"""Arguments that do harm here, and why; saying no to them is taken."""

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps",
}
"""Names that transformers 5 has given up, and what they are called now."""


_CHOICES: dict[str, type[Enum]] = {"optim": OptimizerNames, "lr_scheduler_type": SchedulerType}

EXTRAS = ("torchao", "bitsandbytes")
"""Packages of optimizers that Lorica's extras of the same name install."""

TORCHAO_BLOCK = 256
_BUILT_FROM_THE_MODEL = ("galore", "apollo", "lomo", "adalomo")


def default_learning_rate(hidden_size: int) -> float:
    """Return ``0.08 / hidden_size``: 2e-5 at width 4096, 1e-4 at 768, 6e-4 at 128.

    Adam's best rate falls as 1 / width (Yang et al., "Tensor Programs V", 2022); the constant puts the
    customary rates for full fine-tuning of 7 B models at their width.
    """
    return LEARNING_RATE_TIMES_WIDTH / hidden_size


def known_arguments() -> dict[str, Any]:
    """Return the fields of TrainingArguments, and of its encoder-decoder form, with their types."""
    hints = typing.get_type_hints(Seq2SeqTrainingArguments)
    return {f.name: hints[f.name] for f in fields(Seq2SeqTrainingArguments) if f.init and f.name not in OWN}


def check_arguments(given: dict[str, Any], *, where: str = "") -> dict[str, Any]:
    """Return the given values in the types of their fields.

    Args:
        given: by name; strings, as a command line has them, are converted.
        where: the file they came from, for messages.

    Raises:
        LoricaError: an unknown or renamed field, with the nearest name, or a value of the wrong type.
    """
    known = known_arguments()
    checked = {}
    for name, value in given.items():
        if name in OWN:
            raise LoricaError(f"{where}--{name} is set by lorica train itself; leave it out")
        if name in REFUSED and str(value).lower() not in ("none", "false"):
            raise LoricaError(f"{where}--{name} is not taken: {REFUSED[name]}")
        if name in RENAMED and name not in known:
            raise LoricaError(f"{where}unknown option --{name}: transformers 5 calls it --{RENAMED[name]}")
        if name not in known:
            hint = did_you_mean(name, [*known, *UpdateConfig.model_fields])
            raise LoricaError(f"{where}unknown option --{name}.{hint} See: lorica train --help")
        if name in SHARDING:
            checked[name] = check_option(name, value)
            continue
        try:
            checked[name] = TypeAdapter(known[name]).validate_python(value)
        except ValidationError as error:
            raise LoricaError(f"{where}--{name}: {error.errors()[0]['msg']}, got {value!r}") from error
        if value is True and checked[name] is not True:  # a bare --learning_rate would be one of 1
            raise LoricaError(f"{where}--{name} needs a value")
        if name in _CHOICES and checked[name] not in (kinds := [kind.value for kind in _CHOICES[name]]):
            raise LoricaError(f"{where}--{name} {value}: there is none of that name.{did_you_mean(str(value), kinds)}")
    return checked


def training_arguments(
    given: dict[str, Any],
    output_dir: str,
    *,
    hidden_size: int | None,
    seq2seq: bool,
    learning_rate_scale: float = 1.0,
    optimizer_in_backward: bool = False,
    padding_free: bool = False,
) -> TrainingArguments:
    """Return TrainingArguments with Lorica's defaults under the given values.

    Args:
        hidden_size: the model's width, for the default learning rate; None if it cannot be told.
        learning_rate_scale: factor of the method on that default.
        optimizer_in_backward: refuse what ``StepInBackward`` cannot be right with.
        padding_free: refuse what rows that lie end to end would change.

    Raises:
        LoricaError: see ``check_arguments``; or a value makes no sense, or transformers refuses the combination.
    """
    _check_launcher()
    if optimizer_in_backward and processes.size() > 1:
        raise LoricaError("--optimizer_in_backward is for one process: others would not have seen the gradient yet")
    checked = {name: value for name, value in check_arguments(given).items() if name not in SHARDING}
    kind = Seq2SeqTrainingArguments if seq2seq else TrainingArguments
    stray = sorted(set(checked) - {f.name for f in fields(kind)})
    if stray:
        raise LoricaError(f"--{stray[0]} is for encoder-decoder models; this model is none")
    if hidden_size is None and "learning_rate" not in checked:
        raise LoricaError("--learning_rate is needed: the model's width, which sets the default, cannot be told")
    if processes.size() > 1 and not torch.accelerator.is_available():
        checked = {"use_cpu": True} | checked
    rate = {} if hidden_size is None else {"learning_rate": default_learning_rate(hidden_size) * learning_rate_scale}
    try:
        with warnings.catch_warnings():  # both names of --gradient_checkpointing are as good here
            warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
            arguments = kind(output_dir=output_dir, remove_unused_columns=False, **DEFAULTS | rate | checked)
    except (ValueError, TypeError, ImportError) as error:
        raise LoricaError(f"transformers refuses these training arguments: {error}") from error
    if "report_to" not in checked:
        arguments.report_to = []  # within Kubeflow transformers adds a tracker by itself
    if arguments.world_size != processes.size():
        raise LoricaError(f"{processes.size()} processes were started, and transformers counts {arguments.world_size}")
    _check_values(arguments, checked)
    _check_schedule(arguments)
    check_optimizer(arguments)
    if optimizer_in_backward:
        check_in_backward(arguments)
    if padding_free and seq2seq:
        raise LoricaError("--padding_free is for causal models; this is an encoder-decoder, so leave it out")
    if padding_free and arguments.neftune_noise_alpha is not None:
        raise LoricaError("--neftune_noise_alpha with --padding_free: the noise would go by the length of all rows")
    return arguments


def check_trackers(arguments: TrainingArguments) -> None:
    """Refuse a tracker of ``report_to`` that is unknown or not installed, before anything is loaded."""
    try:
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise LoricaError(f"--report_to: {error}") from error


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


def _check_values(arguments: TrainingArguments, given: dict[str, Any]) -> None:
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


def _check_schedule(arguments: TrainingArguments) -> None:
    """Refuse options that the schedule does not have, and miss those that it needs, before anything is loaded."""
    given: Any = arguments.lr_scheduler_kwargs or {}
    options = {name: value for name, value in given.items() if not isinstance(value, list)}  # one for each group
    blank = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=arguments.learning_rate)
    try:
        get_scheduler(arguments.lr_scheduler_type, blank, 0, 1, scheduler_specific_kwargs=options)
    except (TypeError, ValueError, ArithmeticError) as error:
        kind = SchedulerType(arguments.lr_scheduler_type).value
        raise LoricaError(f"--lr_scheduler_kwargs of --lr_scheduler_type {kind}: {error}") from error


def _check_launcher() -> None:
    """Refuse processes that nobody waits for, and settings of a launcher that would be ignored."""
    if processes.launched() > processes.size():
        raise LoricaError(processes.alone("this"))
    for engine in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true":
            raise LoricaError(f"accelerate's configuration asks for {engine}, which this does not take; {_SHARDED}")
