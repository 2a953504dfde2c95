"""What ``--deepspeed`` asks for: ZeRO-1 or ZeRO-2, each process with the whole model and a part of the optimizer.

The names and values are those of DeepSpeed's JSON. What the command's own options say is filled in from them, and what
would train otherwise than they say, or cast or take apart the weights, is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from lorica import processes
from lorica.errors import LoricaError, did_you_mean
from lorica.json_file import parse_json, read_json

OPTION = "deepspeed"

FILLED = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
"""Settings that follow from the command's options. Left out, DeepSpeed would, for one, clip no gradient."""

HARMLESS = ("steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer")

ZERO, AUTOCAST = "zero_optimization", "torch_autocast"

KNOWN = (*FILLED, *HARMLESS, ZERO, AUTOCAST)

OF_ZERO = (
    "stage", "allgather_partitions", "allgather_bucket_size", "overlap_comm", "reduce_scatter", "reduce_bucket_size",
    "contiguous_gradients",
)  # fmt: skip
"""Fields of ``zero_optimization`` that are taken."""

_CASTS = (
    "it casts the cores, whose folded weights would leak; give "
    '"torch_autocast": {"enabled": true, "dtype": "bfloat16"} in the configuration'
)
_OFFLOADS = "the optimizer's states stay on the devices; --memory_mode lean keeps W0 and the bases on the host"

INSTEAD = {
    "bf16": _CASTS,
    "fp16": _CASTS,
    "amp": _CASTS,
    "optimizer": "--optim and its options say it",
    "scheduler": "--lr_scheduler_type and its options say it",
    "offload_optimizer": _OFFLOADS,
    "offload_param": _OFFLOADS,
}
"""Sections that are not taken unless they are off, and what to do."""

_SWITCHES = dict.fromkeys(("bf16", "fp16", "amp"), "enabled") | dict.fromkeys(
    ("offload_optimizer", "offload_param"), "device"
)
"""The field that switches a section on."""

METHODS = ("osft", "seqft", "ewc", "lwf", "replay")
"""Methods that are known to train under DeepSpeed as in copies."""

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
"""Optimizers that step each number by itself, so that it is no matter which process holds its state."""

NOT_TAKEN = {
    "bf16": _CASTS,
    "fp16": _CASTS,
    "torch_compile": "it is not known to compile what DeepSpeed has wrapped",
    "save_only_model": "a checkpoint holds the model anyway, beside what a run needs to go on",
    "load_best_model_at_end": "DeepSpeed keeps copies of the weights that it would not change",
}
"""Options that are not to be had under DeepSpeed, and why."""

HELD_BY_OPTIMIZER = "--constraint block is held by an optimizer that needs whole weights"

_NUMBERS = ("gradient_accumulation_steps", "gradient_clipping")
"""Numbers that Accelerate's configuration may hold in place of a file."""

_LAUNCHER = "ACCELERATE_USE_DEEPSPEED"


def check_option(value: Any) -> dict[str, Any] | None:
    """Return the configuration that ``--deepspeed`` stands for, a JSON file or its content; None: there is none.

    Raises:
        LoricaError: it cannot be read, or asks for what is not to be had here; with what to do.
    """
    if str(value).lower() in ("none", "false", ""):
        return None
    given = _content(value)
    for name, setting in given.items():
        if name not in KNOWN and not _is_off(name, setting):
            raise LoricaError(f"--deepspeed: {name} is not taken{_instead(name, KNOWN)}")
    made = dict.fromkeys(FILLED, "auto") | {name: given[name] for name in (*FILLED, *HARMLESS) if name in given}
    made[ZERO] = _zero(given.get(ZERO))
    return made | _autocast(given.get(AUTOCAST))


def _content(value: Any) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.lstrip().startswith("{") else read_json(value, "DeepSpeed configuration")
        except ValueError as error:
            raise LoricaError(f"--deepspeed {value}: {error}") from error
    if not isinstance(value, Mapping):
        raise LoricaError(
            "--deepspeed: give a JSON file of DeepSpeed's settings, such as recipes/accelerate/zero2.json"
        )
    return value


def _is_off(name: str, setting: Any) -> bool:
    """Tell whether a section that is not taken asks for nothing, or for what the options say."""
    asked = setting.get(_SWITCHES.get(name, ""), "on") if isinstance(setting, Mapping) else setting
    return name in INSTEAD and str(asked).lower() in ("none", "false", "auto")


def _instead(name: str, known: tuple[str, ...]) -> str:
    return f": {INSTEAD[name]}" if name in INSTEAD else f".{did_you_mean(name, known)}"


def _zero(section: Any) -> dict[str, Any]:
    given = section if isinstance(section, Mapping) else {}
    stage = given.get("stage")
    if stage == 3:
        raise LoricaError("--deepspeed: ZeRO-3 takes the weights apart; --fsdp full_shard does so, docs/distributed.md")
    if stage not in (1, 2):
        raise LoricaError(f"--deepspeed: zero_optimization has the stage {stage}; give 1 or 2")
    for name, setting in given.items():
        if name not in OF_ZERO and not _is_off(name, setting):
            raise LoricaError(f"--deepspeed: {ZERO}.{name} is not taken{_instead(name, OF_ZERO)}")
    return {name: setting for name, setting in given.items() if name in OF_ZERO}


def _autocast(section: Any) -> dict[str, Any]:
    given = section if isinstance(section, Mapping) else {}
    if not given.get("enabled", False):
        return {}
    if set(given) - {"enabled", "dtype"} or str(given.get("dtype")).removeprefix("torch.") not in ("bfloat16", "bf16"):
        raise LoricaError(f"--deepspeed: {AUTOCAST} takes enabled and dtype bfloat16, not {dict(given)}")
    return {AUTOCAST: dict(given)}


@contextmanager
def launcher_settings() -> Iterator[dict[str, Any]]:
    """Yield as training arguments what Accelerate's launcher was told of DeepSpeed.

    Accelerate does not see it in here: it would take it besides what the arguments say. It leaves such a mark itself,
    which is gone afterwards.
    """
    asked = os.environ.pop(_LAUNCHER, None)
    try:
        yield {OPTION: _of_launcher()} if (asked or "").lower() == "true" else {}
    finally:
        unmarked()
        if asked is not None:
            os.environ[_LAUNCHER] = asked


def unmarked() -> None:
    """Remove the mark that Accelerate leaves where it has begun DeepSpeed: it would begin it again."""
    os.environ.pop(_LAUNCHER, None)


def _of_launcher() -> Any:
    if (file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
        return file
    devices = {
        name: {"device": os.environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}_DEVICE", "none")}
        for name in ("offload_optimizer", "offload_param")
    }
    numbers = {name: os.environ.get(f"ACCELERATE_{name.upper()}", "auto") for name in _NUMBERS}
    told = {name: parse_json(value) for name, value in numbers.items() if value not in ("auto", "none")}
    return told | {ZERO: {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))} | devices}


def check_installed() -> None:
    """Refuse to begin where the package is missing."""
    if find_spec(OPTION) is None:
        raise LoricaError("--deepspeed needs the package deepspeed: pip install 'lorica[deepspeed]'")


def undivided(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return training arguments without DeepSpeed: of the same training, where each process has all states.

    Raises:
        LoricaError: see ``check_option``.
    """
    check_option(training.get(OPTION))
    return {name: value for name, value in training.items() if name != OPTION}


def check_deepspeed(arguments: TrainingArguments, method: str, options: Mapping[str, Any]) -> None:
    """Refuse what does not go with DeepSpeed.

    Args:
        arguments: made with ``check_option``'s configuration.
        options: of the method, by name.

    Raises:
        LoricaError: it names the option.
    """
    if processes.size() == 1:
        raise LoricaError("--deepspeed needs several processes: torchrun --nproc_per_node N -m lorica ...")
    if method not in METHODS:
        known = f"{', '.join(METHODS[:-1])} or {METHODS[-1]}"
        raise LoricaError(f"--deepspeed: --method {method} is not known to be right; give {known}")
    if options.get("constraint") == "block":
        raise LoricaError(f"--deepspeed: {HELD_BY_OPTIMIZER}")
    optim = OptimizerNames(arguments.optim).value
    if optim not in OPTIMIZERS:
        raise LoricaError(f"--deepspeed: --optim {optim} is not known to step parts of a weight; give {OPTIMIZERS[0]}")
    for name, why in NOT_TAKEN.items():
        if getattr(arguments, name):
            raise LoricaError(f"--deepspeed: --{name} is not taken: {why}")
    if arguments.use_cpu and torch.accelerator.is_available():
        raise LoricaError("--deepspeed: --use_cpu is not taken where there is a GPU, which DeepSpeed would take")
    if arguments.mixed_precision != "no":
        raise LoricaError(f"--deepspeed: the launcher's mixed_precision is not taken: {_CASTS}")
    wrong = arguments.hf_deepspeed_config.mismatches
    if wrong:
        raise LoricaError(f"--deepspeed: the configuration and the options disagree ({wrong[0][2:]}); give it as auto")
