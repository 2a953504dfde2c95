"""How checkpoints hold a model that FSDP2 has sharded: what trains, each process its own parts.

torch.distributed.checkpoint writes and reads the parts, as safetensors; any number of processes can read what any other
wrote. What does not train is that of the model that the update began at, which its identity tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lorica import processes
from lorica.constrain.protect import protected_layers
from lorica.constrain.sharded import fold
from lorica.training.model_state import OPTIMIZER, ModelState
from lorica.training.states import load_tree, save_tree

TRAINED = "trained"
"""Folder of the parts of what trains."""

OPTIMIZER_PARTS = f"{OPTIMIZER}.parts"
"""Folder of the parts of the optimizer's state; what is no tensor, or the same everywhere, lies beside it."""

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class ShardedState(ModelState):
    """As ``ModelState``, of a model that ``processes.in_step`` is true of."""

    def save(self, folder: Path) -> None:
        _write_parts(self._trained(), folder / TRAINED)

    def load(self, folder: Path) -> bool:
        _read_parts(self._trained(), folder / TRAINED)
        fold([layer for layer in protected_layers(self.model).values() if layer.shards is not None])
        return True

    def _trained(self) -> dict[str, Tensor]:
        return {name: one.detach() for name, one in self.model.named_parameters() if one.requires_grad}

    def save_optimizer(self, optimizer: Optimizer, folder: Path) -> None:
        parts, rest = self._optimizer(optimizer)
        _write_parts(parts, folder / OPTIMIZER_PARTS)
        processes.by_first(lambda: save_tree(rest, folder, OPTIMIZER))

    def load_optimizer(self, optimizer: Optimizer, folder: Path) -> None:
        parts, _ = self._optimizer(optimizer)
        _read_parts(parts, folder / OPTIMIZER_PARTS)
        set_optimizer_state_dict(self.model, _inner(optimizer), load_tree(folder, OPTIMIZER) | parts, options=_FLAT)

    def _optimizer(self, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the sharded tensors of an optimizer's state, and the rest; a new one takes an empty step for it."""
        flat: dict[str, Any] = get_optimizer_state_dict(self.model, _inner(optimizer), options=_FLAT)
        parts: dict[str, Tensor] = {name: value for name, value in flat.items() if isinstance(value, DTensor)}
        return parts, {name: value for name, value in flat.items() if name not in parts}


def whole_weights(model: torch.nn.Module) -> dict[str, Tensor] | None:
    """Return a model's weights on the host of the first process, for ``save_model``; none of them in the others.

    All processes of a sharded model have to call this. Of a model that is not sharded each has them all: None.
    """
    if not processes.in_step(model):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: dict[str, Any] = get_model_state_dict(model, options=options)
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(one), name) for name, one in model.state_dict(keep_vars=True).items()}
    return {name: found[names[name]] for name in found}  # tied ones are one tensor again, which is saved once


def _inner(optimizer: Any) -> Optimizer:
    """Return the optimizer that Accelerate has wrapped."""
    found: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found


def _write_parts(tensors: Mapping[str, Tensor], folder: Path) -> None:
    if tensors:  # without any there is no file for a reader to find
        with _one_error():
            save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def _read_parts(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fill tensors, in place, with what ``_write_parts`` wrote, in whatever number of processes."""
    if tensors:
        with _one_error():
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))


@contextmanager
def _one_error() -> Iterator[None]:
    """Raise what went wrong in this process; torch tells each process of all of them."""
    try:
        yield
    except CheckpointException as error:
        if (own := error.failures.get(dist.get_rank())) is not None:
            raise own[0] from None
        raise processes.Elsewhere(f"process {min(error.failures)} could not go on") from None
