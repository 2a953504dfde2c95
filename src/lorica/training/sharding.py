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
from torch import nn
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.training_args import OptimizerNames

from lorica import processes
from lorica.errors import LoricaError, did_you_mean
from lorica.json_file import parse_json, read_json
from lorica.subspace.plan_entry import MEASURED

OPTIONS = ("fsdp", "fsdp_config")

OFF = ("none", "false", "")
STRATEGIES = ("true", "full_shard", "hybrid_shard", "offload", "auto_wrap")
"""Values of ``--fsdp``. The last two stand beside another: ``offload`` keeps what is sharded on the host, ``auto_wrap``
says what is done anyway. Without a strategy it is ``full_shard``."""

NO_STRATEGY = {
    "shard_grad_op": "weights that stay whole after the forward pass are what sharding is to save",
    "hybrid_shard_zero2": "weights that stay whole after the forward pass are what sharding is to save",
    "no_shard": "leave --fsdp out: each process then has a copy of the model, in DDP",
}

TAKEN = {
    "version": ("2",),
    "reshard_after_forward": ("true",),
    "cpu_offload": ("true", "false"),
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
    "activation_checkpointing": "give --activation_checkpointing true",
    "auto_wrap_policy": "each block of the model is a unit, as transformers' plan for the model says",
}

_LAUNCHER = "ACCELERATE_USE_FSDP"
_RENAMED = {"offload_params": "cpu_offload", "transformer_cls_to_wrap": "transformer_layer_cls_to_wrap"}
_OF_ACCELERATE = (*TAKEN, "offload_params", "transformer_cls_to_wrap", "ignored_modules")
"""What of Accelerate's FSDP_... counts for FSDP2."""

METHODS = ("osft", "seqft")
"""Methods that train a sharded model."""

_LENGTHS = "each process would write texts of other lengths, and wait for the others"

NOT_SHARDED = {
    "protect_learned": "it looks at whole weights after the training",
    "remember_tasks": "it looks at whole weights after the training",
    "curvature_penalty": "it looks at whole cores in each step",
    "prompts_file": _LENGTHS,
    "rehearse": _LENGTHS,
    "predict_forgetting": _LENGTHS,
    "fp16": "its scaled gradients overflow in one process alone; give --bf16",
    "torch_compile": "it is not known to compile a model that is sharded",
    "label_smoothing_factor": "transformers smooths the labels of a sharded model against the wrong tokens",
    "save_only_model": "a checkpoint of a sharded run holds the parts that train, of use to it alone",
}
"""Options that are not to be had of a sharded model, and why."""

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")
"""Optimizers that step each number by itself, so that it is no matter which process holds it."""


class Sharding(NamedTuple):
    """How many processes hold parts of one copy of the model, how many copies there are, and where the parts rest.

    Attributes:
        offload: on the host, between their uses; where there is no accelerator they lie there anyway.
    """

    shards: int
    replicas: int = 1
    offload: bool = False

    @property
    def moves(self) -> bool:
        """Whether the parts rest on another device than computes."""
        return self.offload and torch.accelerator.is_available()

    def config(self) -> DistributedConfig:
        """Return what ``from_pretrained`` takes."""
        return DistributedConfig(fsdp_size=self.shards, dp_replicate_size=self.replicas, fsdp_cpu_offload=self.moves)


def offloads(training: Mapping[str, Any]) -> bool:
    """Tell whether training arguments, as they were given, ask for a sharded model that rests on the host.

    Raises:
        LoricaError: see ``check_option``.
    """
    words, fields = (check_option(name, training.get(name)) for name in OPTIONS)
    return words is not None and _offloads(words, fields)


def _offloads(words: list[str], fields: Mapping[str, Any] | None) -> bool:
    return "offload" in words or str((fields or {}).get("cpu_offload")).lower() == "true"


def rest_on_host(model: nn.Module) -> None:
    """Move a model's parameters to the host, where FSDP2's offload expects them, and leave its buffers.

    transformers loads them onto the device that computes, whatever ``fsdp_cpu_offload`` says.
    """
    buffers = dict(model.named_buffers(remove_duplicate=False))
    model._apply(lambda tensor: tensor.cpu())
    for name, buffer in buffers.items():
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module)._buffers[leaf] = buffer


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
    offload = _offloads(words, given.get("fsdp_config"))
    if offload and not processes.exchange_on_host():
        raise LoricaError("--fsdp offload: give it with the command: the processes have met for GPUs alone by now")
    size, node = processes.launched(), int(os.environ.get("LOCAL_WORLD_SIZE") or processes.launched())
    if size == 1:
        raise LoricaError("--fsdp needs several processes: torchrun --nproc_per_node N -m lorica ...")
    if "hybrid_shard" not in words:
        return Sharding(size, offload=offload)
    if node == size or node == 1 or size % node:
        raise LoricaError(
            f"--fsdp hybrid_shard shards within each node and copies between them; of {size} processes {node} are on "
            "this node: give --fsdp full_shard"
        )
    return Sharding(node, size // node, offload)


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


def check_sharded(arguments: TrainingArguments, method: str, settings: Mapping[str, Any]) -> None:
    """Refuse what a sharded model cannot be trained with.

    Args:
        method: its name.
        settings: what else is set, by name: the method's options, or all of an update's.

    Raises:
        LoricaError: it names the option.
    """
    if method not in METHODS:
        raise LoricaError(f"--fsdp: --method {method} needs whole weights; give {' or '.join(METHODS)}")
    options = vars(arguments) | dict(settings)
    if options.get("constraint") == "block":
        raise LoricaError("--fsdp: --constraint block is held by an optimizer that needs whole weights")
    if options.get("ranks") == "marginal":
        raise LoricaError("--fsdp: --ranks marginal compares what was measured of all weights, which no process has")
    optim = OptimizerNames(arguments.optim).value
    if optim not in OPTIMIZERS:
        raise LoricaError(f"--fsdp: --optim {optim} is not known to step parts of a weight; give {OPTIMIZERS[0]}")
    for name, why in NOT_SHARDED.items():
        if options.get(name):
            raise LoricaError(f"--fsdp: --{name} is not taken: {why}")
    measures = options.get("source") in MEASURED or options.get("ranks") == "importance"
    writes = options.get("calibration") in (None, "self") and options.get("calibration_file") is None
    if measures and writes and not isinstance(arguments, Seq2SeqTrainingArguments):
        raise LoricaError(f"--fsdp: --calibration self is not taken: {_LENGTHS}; give random or --calibration_file")
    if arguments.use_cpu and torch.accelerator.is_available():
        raise LoricaError("--fsdp: --use_cpu is not taken where there is a GPU, on which the model is loaded")
