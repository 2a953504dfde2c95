"""One task of a stream by hand, as the loop around a method would do it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lorica.methods.base import Method
from lorica.methods.task import TaskData
from tests.builders import batch, task_of, train, trainable


def adamw(lr: float = 5e-3) -> Callable[[list[nn.Parameter]], Optimizer]:
    return partial(AdamW, lr=lr)


def begun(
    method: Method,
    model: nn.Module,
    task: TaskData,
    make: Callable[[list[nn.Parameter]], Optimizer],
    max_grad_norm: float = 0.0,
) -> Optimizer:
    """Begin a task and return the optimizer to train with."""
    method.begin_task(model, task)
    return method.wrap_optimizer(make(trainable(model)), max_grad_norm)


def learn(
    method: Method,
    model: nn.Module,
    index: int = 0,
    *,
    make: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    steps: int = 4,
    rows: int = 12,
) -> None:
    """Learn one task from beginning to end."""
    task = task_of(model, index, rows=rows)
    optimizer = begun(method, model, task, make or adamw())
    train(model, optimizer, steps, lambda step: batch(model, 100 * (index + 1) + step))
    method.end_task(model, task)


def reloaded(method: Method, folder: Path) -> Method:
    """Return a new method with the state that this one saved."""
    save_file(method.state_dict(), folder / "state.safetensors")
    new = type(method)(method.options)
    new.load_state_dict(load_file(folder / "state.safetensors"))
    return new


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


def assert_orthonormal(basis_DK: Tensor) -> None:
    torch.testing.assert_close(basis_DK.T @ basis_DK, torch.eye(basis_DK.shape[1]), atol=2e-6, rtol=0)
