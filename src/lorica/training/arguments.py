"""TrainingArguments from untyped values: our defaults, every option checked and none ignored."""

from __future__ import annotations

import typing
import warnings
from dataclasses import fields
from enum import Enum
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import SchedulerType, Seq2SeqTrainingArguments, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames

from lorica import processes
from lorica.config import UpdateConfig
from lorica.errors import LoricaError, did_you_mean
from lorica.training import deepspeed
from lorica.training.argument_values import check_values
from lorica.training.in_backward import check_in_backward
from lorica.training.launcher import check_launcher
from lorica.training.optimizers import check_optimizer, check_schedule
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


REFUSED = {
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
        if name == deepspeed.OPTION:
            checked[name] = deepspeed.check_option(value)
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
    check_launcher()
    if optimizer_in_backward and processes.size() > 1:
        raise LoricaError("--optimizer_in_backward is for one process: others would not have seen the gradient yet")
    checked = check_arguments(given)
    if checked.get("fsdp") and checked.get(deepspeed.OPTION):
        raise LoricaError("--fsdp and --deepspeed: each shares the training out in its own way; give one of them")
    checked = {name: value for name, value in checked.items() if name not in SHARDING}
    kind = Seq2SeqTrainingArguments if seq2seq else TrainingArguments
    stray = sorted(set(checked) - {f.name for f in fields(kind)})
    if stray:
        raise LoricaError(f"--{stray[0]} is for encoder-decoder models; this model is none")
    if hidden_size is None and "learning_rate" not in checked:
        raise LoricaError("--learning_rate is needed: the model's width, which sets the default, cannot be told")
    if checked.get(deepspeed.OPTION):
        deepspeed.check_installed()
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
    check_values(arguments, checked)
    check_schedule(arguments)
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
