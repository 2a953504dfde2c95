"""Gradients as they come to the optimizer, before anything projects or clips them, summed up as training goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Gradients = dict[str, Tensor]


class Snapshots:
    """Looks at the gradients of some parameters at the first and then every m-th step of an optimizer.

    Args:
        parameters: by name.
        refresh: m, in optimizer steps.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], refresh: int) -> None:
        self.parameters, self.refresh = dict(parameters), refresh
        self.steps = 0
        self._held: Gradients = {}

    def state(self) -> dict[str, Any]:
        """Return what was seen so far."""
        return {"steps": self.steps, "held": self._held}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state`` returned."""
        self.steps = state["steps"]
        self._held = {name: held.to(self.parameters[name].device) for name, held in state["held"].items()}

    def watch(self, optimizer: Optimizer) -> None:
        """Look at every step from here on; hooks that are registered later see the gradients later."""
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        due = self.steps % self.refresh == 0
        self.steps += 1
        if due and any(parameter.grad is not None for parameter in self.parameters.values()):
            self.take(
                {
                    name: torch.zeros_like(p) if p.grad is None else p.grad.detach()
                    for name, p in self.parameters.items()
                }
            )

    def take(self, gradients: Gradients) -> None:
        """Add one snapshot; the tensors are the optimizer's own."""
        raise NotImplementedError

    def vectors(self) -> list[Gradients]:
        """Return what is made of the snapshots so far; nothing if there were none."""
        raise NotImplementedError


class MeanGradient(Snapshots):
    """The mean of all snapshots, up to its length, which no direction depends on."""

    def take(self, gradients: Gradients) -> None:
        for name, gradient in gradients.items():
            self._held[name] = self._held[name] + gradient if name in self._held else gradient.clone()

    def vectors(self) -> list[Gradients]:
        return [self._held] if self._held else []


class TopGradients(Snapshots):
    """The top k left singular vectors of the matrix whose columns are the snapshots, laid end to end.

    One snapshot at a time: with columns C (the k vectors so far, each times its singular value) and a new g,
    the eigenvectors of the small ``[C g]^T [C g]`` rotate them into the new ones, of which k stay. Exact while
    there are no more than k snapshots; after that what was cut before is lost.

    Args:
        parameters, refresh: see :class:`Snapshots`.
        k: how many vectors are kept.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], refresh: int, k: int) -> None:
        super().__init__(parameters, refresh)
        self.k = k

    def take(self, gradients: Gradients) -> None:
        wide = {
            name: torch.cat([*([self._held[name]] if self._held else []), gradient.flatten()[None]])
            for name, gradient in gradients.items()
        }
        gram = torch.stack([part.double() @ part.double().T for part in wide.values()]).sum(0)
        _, rotation = torch.linalg.eigh(gram)
        kept = rotation.flip(1)[:, : self.k].T
        self._held = {name: kept.to(part) @ part for name, part in wide.items()}

    def vectors(self) -> list[Gradients]:
        count = len(next(iter(self._held.values()), ()))
        return [{name: part[i] for name, part in self._held.items()} for i in range(count)]
