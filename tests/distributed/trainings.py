"""The same training on one process and on several, which each take a part of every batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from transformers.distributed import DistributedConfig

import lorica
from lorica.subspace.plan import Plan
from tests.builders import batch, leakage, tiny, trainable

Weights = dict[str, Any]
Wrap = Callable[[nn.Module], nn.Module]

STEPS = 20
PROTECTED = 0.75


@dataclass(frozen=True)
class Course:
    """A training, of which each process does its share.

    Attributes:
        steps, tasks: how many.
        parts: into how many each batch falls, which are accumulated: a multiple of the number of processes.
    """

    steps: int = STEPS
    tasks: int = 1
    parts: int = 4

    def train(self, model: nn.Module, forward: nn.Module, rank: int, size: int, task: int = 0) -> None:
        """Train with AdamW, weight decay and clipping.

        Args:
            model: the protected model.
            forward: what is called, such as the model in DDP.
        """
        optimizer = AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
        for step in range(self.steps):
            for part in range(rank, self.parts, size):
                loss = forward(**batch(model, seed=1000 * task + self.parts * step + part)).loss
                (loss * size / self.parts).backward()  # the processes' gradients are averaged
            nn.utils.clip_grad_norm_(trainable(model), 0.2)
            optimizer.step()
            optimizer.zero_grad()

    def run(self, model: nn.Module, rank: int = 0, size: int = 1, wrapped: Wrap = lambda model: model) -> list[Weights]:
        """Protect, train and release for each task, and return the weights after each."""
        after = []
        for task in range(self.tasks):
            lorica.protect(model, plan_of_shapes(model))
            self.train(model, wrapped(model), rank, size, task)
            after.append(weights_of(model))
            if task + 1 < self.tasks:
                lorica.release(model)
        return after


def plan_of_shapes(model: nn.Module) -> Plan:
    return lorica.plan(model, 1 - PROTECTED)


def weights_of(model: nn.Module) -> Weights:
    """Return all weights as lists, wherever their parts are, by the names that the plain model has."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".core")}
    return {name: whole(tensor).tolist() for name, tensor in state.items()}


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, wherever its parts are."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def difference(a: Weights, b: Weights) -> float:
    """Return the largest there is between two models."""
    assert a.keys() == b.keys()
    return max(float((torch.tensor(a[name]) - torch.tensor(b[name])).abs().max()) for name in a)


def worst_leakage(before: nn.Module, after: Weights) -> float:
    """Return the largest share of a weight's change along directions that were protected in the model before."""
    leaks = []
    for name, weight in before.state_dict().items():
        if "proj" in name:
            leaks += leakage(weight, torch.tensor(after[name]), int(PROTECTED * min(weight.shape)))
    return max(leaks)


def in_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def in_fsdp(model: nn.Module) -> nn.Module:
    """Shard each block and the rest, as the tutorials of FSDP2 do it."""
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block)
    fully_shard(model)
    return model


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a small model and return where."""
    tiny(name, dtype).save_pretrained(folder / name)
    return folder / name


def load_sharded(folder: Path, size: int) -> nn.Module:
    """Load a model of ``save`` as transformers shards it: each process reads its own parts."""
    kind = type(tiny(folder.name))
    return kind.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=size)).train()
