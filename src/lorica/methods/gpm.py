"""Gradient Projection Memory: later tasks move no weight along the inputs that earlier tasks had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorica.constrain.linear import matrix_of
from lorica.methods.base import METHODS, Targets
from lorica.methods.projected import ProjectedFT
from lorica.methods.task import TaskData
from lorica.subspace.observe import observe, within_memory
from lorica.subspace.sources import Protected


@dataclass(frozen=True)
class GPMOptions(Targets):
    """What GPM keeps of each task.

    Attributes:
        energy: share of the squared norm of a layer's inputs that the bases must hold after the first task.
        energy_step: how much more after each further task; the sum is cut at 1.
        rows: training rows of a finished task whose inputs are looked at.
    """

    energy: float = 0.97
    energy_step: float = 0.003
    rows: int = 125

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy = {self.energy} is out of range: above 0 (one direction) to 1 (all of it)")
        if not 0 <= self.energy_step <= 1:
            raise ValueError(f"energy_step = {self.energy_step} is out of range: 0 to 1")
        if self.rows < 1:
            raise ValueError(f"rows = {self.rows} is out of range: at least 1")


@METHODS.register("gpm")
class GPM(ProjectedFT):
    """Gradient Projection Memory: every change D of a layer's weight must satisfy ``D V = 0``.

    V holds the principal directions of what the layer saw in the finished tasks, so that what it made of them
    stays: ``(W + D) x = W x`` for every x in its span. After each task V grows by the fewest directions
    with which it holds the threshold of the task's energy (see ``new_directions``); it is never cut, so a layer
    whose inputs are used up stops learning. The first task is unconstrained.

    The gradient is projected as published, ``G - G V V^T``; for optimizers such as AdamW, which step out of
    the set that their gradient lies in, the weight itself is put back after each step.

    Source:
        Saha, Garg and Roy, "Gradient Projection Memory for Continual Learning", ICLR 2021 (arXiv 2103.09762),
        equations 5, 8, 9; threshold and 125 rows of the authors' code. That code keeps one direction less than
        equation 5 after the first task; here it is the equation's number.
    """

    options_type = GPMOptions
    summary = "no update along the principal inputs of earlier tasks (Gradient Projection Memory)"
    stores = "an orthonormal basis of past inputs per layer; grows with the tasks, to the layer's width at most"
    reproduction = "directions tested by hand and against the SVD of the inputs; no published figure reproduced yet"

    def __init__(self, options: GPMOptions) -> None:
        super().__init__(options)
        self.bases: dict[str, Tensor] = {}

    def constrain(self, model: nn.Module, task: TaskData) -> None:
        if self.bases:
            self.hold(model, {name: self._directions(model, name) for name in self.bases}, "input")

    def _directions(self, model: nn.Module, name: str) -> Protected:
        weight_MN = matrix_of(model.get_submodule(name))
        return Protected(weight_MN.new_zeros(len(weight_MN), 0), self.bases[name].to(weight_MN))

    def remember(self, model: nn.Module, task: TaskData) -> None:
        energy = min(1.0, self.options.energy + task.index * self.options.energy_step)
        layers = self.layers(model)
        for names in within_memory({name: 8 * matrix_of(layer).shape[1] ** 2 for name, layer in layers.items()}):
            seen = observe(model, {name: layers[name] for name in names}, task.batches(self.options.rows), moments=True)
            for name, statistics in seen.items():
                assert statistics.moment_NN is not None
                self.extend(name, statistics.moment_NN, energy)

    def extend(self, name: str, moment_NN: Tensor, energy: float) -> None:
        """Add to a layer's basis what the finished task's inputs need."""
        old_NK = self.bases.get(name, torch.zeros(len(moment_NN), 0))
        new_NJ, _ = new_directions(moment_NN, old_NK.to(moment_NN), energy)
        self.bases[name] = torch.cat([old_NK, new_NJ.float().cpu()], dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{name}.basis": basis for name, basis in self.bases.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.bases = {
            key.removesuffix(".basis"): value.clone() for key, value in state.items() if key.endswith(".basis")
        }


def new_directions(moment_NN: Tensor, basis_NK: Tensor, energy: float) -> tuple[Tensor, Tensor]:
    """Return the fewest directions that a basis needs to hold a share of a task's inputs.

    With A = X X^T over the task's inputs and P = V V^T, the directions are the leading eigenvectors of
    ``(I - P) A (I - P)``, with eigenvalues e_1 >= e_2 >= ..., and their number J is the least with

        tr(P A) + e_1 + ... + e_J  >=  energy tr(A)

    Args:
        moment_NN: A, float64.
        basis_NK: V, orthonormal columns; K may be 0.
        energy: above 0 to 1.

    Returns:
        The new directions (N x J), orthonormal and orthogonal to V, in float64, and e_1 ... e_J.
    """
    outside = moment_NN - basis_NK @ (basis_NK.T @ moment_NN)
    outside = outside - (outside @ basis_NK) @ basis_NK.T
    values, vectors = torch.linalg.eigh((outside + outside.T) / 2)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    total = moment_NN.trace()
    missing = energy * total - (total - values.sum())
    noise = 1e-12 * total
    count = int((values.cumsum(0) < missing - noise).sum()) + 1 if missing > noise else 0
    count = min(count, int((values > noise).sum()), len(values) - basis_NK.shape[1])
    new_NJ = vectors[:, :count]
    new_NJ = new_NJ - basis_NK @ (basis_NK.T @ new_NJ)
    return torch.linalg.qr(new_NJ).Q, values[:count]
