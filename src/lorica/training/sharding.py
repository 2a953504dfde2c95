"""How a model is shared out among the processes of an update: what ``--fsdp`` asks for, and what cannot be had.

The names and values are those of transformers' ``fsdp`` and ``fsdp_config`` and of Accelerate's configuration. Neither
of the two shards here: transformers loads the model sharded, so that each process reads its own parts of the weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.training_args import OptimizerNames

from lorica import processes
from lorica.config import UpdateConfig
from lorica.errors import LoricaError, did_you_mean
from lorica.json_file import parse_json, read_json

OPTIONS = ("fsdp", "fsdp_config")

OFF = ("none", "false", "")
STRATEGIES = ("true", "full_shard", "hybrid_shard", "auto_wrap")
"""Values of ``--fsdp``; without one it is ``full_shard``. ``auto_wrap``, beside another, says what is done anyway."""

NO_STRATEGY = {
    "shard_grad_op": "weights that stay whole after the forward pass are what sharding is to save",
    "hybrid_shard_zero2": "weights that stay whole after the forward pass are what sharding is to save",
    "no_shard": "leave --fsdp out: each process then has a copy of the model, in DDP",
    "offload": "--memory_mode lean keeps W0 and the bases on the host; the weights stay on the device",
}

TAKEN = {
    "version": ("2",),
    "reshard_after_forward": ("true",),
    "cpu_offload": ("false",),
    "activation_checkpointing": ("false",),
    "auto_wrap_policy": ("transformer_based_wrap",),
    "cpu_ram_efficient_loading": ("true", "false"),
    "state_dict_type": ("full_state_dict", "sharded_state_dict"),
}
"""Fields of ``fsdp_config`` and the values that hold here. Two of them hold whichever is given: each process loads its
own parts alone; checkpoints are written in parts, the finished model whole."""

INSTEAD = {
    "version": "FSDP2 alone shards here; give 2",
    "reshard_after_forward": NO_STRATEGY["shard_grad_op"],
    "cpu_offload": NO_STRATEGY["offload"],
    "activation_checkpointing": "give --activation_checkpointing true",
    "auto_wrap_policy": "each block of the model is a unit, as transformers' plan for the model says",
}

_LAUNCHER = "ACCELERATE_USE_FSDP"
_RENAMED = {"offload_params": "cpu_offload", "transformer_cls_to_wrap": "transformer_layer_cls_to_wrap"}
_OF_ACCELERATE = (*TAKEN, "offload_params", "transformer_cls_to_wrap", "ignored_modules")
"""What of Accelerate's FSDP_... counts for FSDP2."""

METHODS = ("osft", "seqft")
"""Methods that train a sharded model."""

NOT_SHARDED = {
    "protect_learned": "it looks at whole weights after the training",
    "remember_tasks": "it looks at whole weights after the training",
    "rehearse": "each process would write texts of other lengths, and wait for the others",
    "fp16": "its scaled gradients overflow in one process alone; give --bf16",
    "torch_compile": "it is not known to compile a model that is sharded",
    "label_smoothing_factor": "transformers smooths the labels of a sharded model against the wrong tokens",
    "save_only_model": "a checkpoint of a sharded run holds the parts that train, of use to it alone",
}
"""Options that are not to be had of a sharded model, and why."""

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")
"""Optimizers that step each number by itself, so that it is no matter which process holds it."""


class Sharding(NamedTuple):
    """How many processes hold parts of one copy of the model, and how many copies there are."""

    shards: int
    replicas: int = 1

    def config(self) -> DistributedConfig:
        """Return what ``from_pretrained`` takes."""
        return DistributedConfig(fsdp_size=self.shards, dp_replicate_size=self.replicas)


def check_option(name: str, value: Any) -> Any:
    """Return what one of the ``OPTIONS`` stands for: words of ``--fsdp``, or fields and values.

    Raises:
        LoricaError: there is no such value, or it is not to be had here; with what to do.
    """
    if str(value).lower() in OFF:
        return None
    return _strategies(value) if name == "fsdp" else _settings(value)


def _strategies(value: Any) -> list[str]:
    words = [str(word).lower() for word in (value if isinstance(value, list) else str(value).split())]
    for word in words:
        if word in NO_STRATEGY:
            raise LoricaError(f"--fsdp {word} is not taken: {NO_STRATEGY[word]}")
        if word not in STRATEGIES:
            known = [name for name in STRATEGIES if name != "true"]
            raise LoricaError(f"--fsdp {word}: there is none of that name.{did_you_mean(word, known)}")
    return words


def _settings(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.lstrip().startswith("{") else read_json(value, "FSDP configuration")
        except ValueError as error:
            raise LoricaError(f"--fsdp_config {value}: {error}") from error
    if not isinstance(value, Mapping):
        raise LoricaError("--fsdp_config: give names and values, or a JSON file of them")
    found = {str(name).removeprefix("fsdp_"): setting for name, setting in value.items()}
    found = {_RENAMED.get(name, name): setting for name, setting in found.items()}
    for name, setting in found.items():
        if name not in TAKEN:
            raise LoricaError(f"--fsdp_config: {name} is not taken.{did_you_mean(name, TAKEN)}")
        if str(setting).lower() not in TAKEN[name]:
            way = INSTEAD.get(name, f"give {' or '.join(TAKEN[name])}")
            raise LoricaError(f"--fsdp_config: {name} = {setting} is not taken: {way}")
    return found


def sharding(given: Mapping[str, Any]) -> Sharding | None:
    """Return how training arguments that went through ``check_option`` ask the model to be sharded; None: not at all.

    Raises:
        LoricaError: there are not the processes for it.
    """
    words = given.get("fsdp")
    if words is None:
        if given.get("fsdp_config") is not None:
            raise LoricaError("--fsdp_config has no effect without --fsdp full_shard")
        return None
    size, node = processes.launched(), int(os.environ.get("LOCAL_WORLD_SIZE") or processes.launched())
    if size == 1:
        raise LoricaError("--fsdp needs several processes: torchrun --nproc_per_node N -m lorica train ...")
    if "hybrid_shard" not in words:
        return Sharding(size)
    if node == size or node == 1 or size % node:
        raise LoricaError(
            f"--fsdp hybrid_shard shards within each node and copies between them; of {size} processes {node} are on "
            "this node: give --fsdp full_shard"
        )
    return Sharding(node, size // node)


@contextmanager
def launcher_settings() -> Iterator[dict[str, Any]]:
    """Yield as training arguments what Accelerate's launcher was told of FSDP, which Accelerate does not see in here.

    It would shard the model a second time.
    """
    if (asked := os.environ.get(_LAUNCHER)) is None or asked.lower() != "true":
        yield {}
        return
    told = {name: os.environ.get(f"FSDP_{name.upper()}") for name in _OF_ACCELERATE}
    del os.environ[_LAUNCHER]
    try:
        yield {"fsdp": "full_shard", "fsdp_config": {name: value for name, value in told.items() if value}}
    finally:
        os.environ[_LAUNCHER] = asked


def check_sharded(arguments: TrainingArguments, config: UpdateConfig) -> None:
    """Refuse what a sharded model cannot be trained with.

    Raises:
        LoricaError: it names the option.
    """
    if config.method not in METHODS:
        raise LoricaError(f"--fsdp: --method {config.method} needs whole weights; give {' or '.join(METHODS)}")
    if config.constraint == "block":
        raise LoricaError("--fsdp: --constraint block is held by an optimizer that needs whole weights")
    optim = OptimizerNames(arguments.optim).value
    if optim not in OPTIMIZERS:
        raise LoricaError(f"--fsdp: --optim {optim} is not known to step parts of a weight; give {OPTIMIZERS[0]}")
    options = vars(arguments) | vars(config)
    for name, why in NOT_SHARDED.items():
        if options[name]:
            raise LoricaError(f"--fsdp: --{name} is not taken: {why}")
    if arguments.use_cpu and torch.accelerator.is_available():
        raise LoricaError("--fsdp: --use_cpu is not taken where there is a GPU, on which the model is loaded")
