"""What a change is expected to make a model forget, as a penalty: the curvature in the free directions of each weight.

Shape suffixes: M outputs, N inputs, P / Q free output / input directions, F either, R kept columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from lorica.constrain.kept import KeptBases
from lorica.constrain.linear import SubspaceLayer, full_precision
from lorica.constrain.protect import protected_layers
from lorica.data.encode import count_trained
from lorica.errors import LoricaError
from lorica.methods.task import Rows
from lorica.subspace.basis import Basis
from lorica.subspace.factor import Factor, Factors

RANK = 512
"""Most directions of a side that are told apart beyond the protected ones; the energy of the rest is spread evenly."""

KEPT = "curvature"
"""In the names of what is kept of it beside a checkpoint."""

AUTO = "auto"
"""In place of a strength: see ``strength_for``."""

KNOWN, WEAKEST, STRONGEST = 1_000_000, 300.0, 10_000.0
"""Under ``AUTO``: how many predictions of a task what the model knows weighs as much as, and the strengths that have
been tried, beyond which it does not go."""

LEAST = 1e-12
"""Columns below this share of the largest are of protected directions, to rounding."""


def strength_for(asked: float | str, rows: Rows, *, causal: bool) -> float:
    """Return the strength that is asked for; for ``AUTO`` ``KNOWN`` over the predictions of the rows, within bounds.

    A task's loss is a mean over its predictions, so beside N of them what is known weighs ``strength * N``: in a
    posterior over the weights that is a number of the model, not of the task (Laplace).

    Args:
        asked: ``curvature_penalty``.
        rows: of the task, encoded.
        causal: whether a label is predicted at the position before it, the first one so not at all.
    """
    if asked != AUTO:
        return float(asked)
    trained, enough = 0, KNOWN / WEAKEST
    for index in range(len(rows)):  # type: ignore[arg-type]
        trained += count_trained(rows[index]["labels"], seq2seq=not causal)
        if trained >= enough:
            return WEAKEST
    return min(STRONGEST, KNOWN / max(trained, 1))


class Side(NamedTuple):
    """A second moment within the free directions of one side of a weight: ``Q^T A Q = G G^T + floor I``, float32.

    Attributes:
        root_FR: G.
        floor: a number, as a tensor so that it can be kept with the bases.
    """

    root_FR: Tensor
    floor: Tensor

    @classmethod
    def of(cls, factor: Factor, basis: Basis, device: torch.device, rank: int = RANK) -> Self:
        """Return what a basis leaves of a second moment, of the same trace.

        Args:
            factor: A.
            basis: Q, of float32.
            rank: columns of G at most, those with the most energy.
        """
        if not basis.free:
            return cls(torch.zeros(0, 0, device=device), torch.zeros((), device=device))
        root_FR = basis.reduce_columns(factor.above_floor(device).float())
        if root_FR.shape[1] > basis.free:
            energies, vectors = torch.linalg.eigh((root_FR @ root_FR.T).double())
            root_FR = (vectors * energies.clamp_min(0).sqrt()).float()
        energies = root_FR.square().sum(0)
        order = energies.argsort(descending=True)[:rank]
        chosen = order[energies[order] > LEAST * energies.max()].sort().values
        rest = (energies.sum() - energies[chosen].sum()).clamp_min(0) / basis.free
        return cls(root_FR[:, chosen].contiguous(), (rest + factor.floor).float())

    def times(self, x_FD: Tensor) -> Tensor:
        """Return ``Q^T A Q x``."""
        return self.root_FR @ (self.root_FR.T @ x_FD) + self.floor * x_FD


class Sides(NamedTuple):
    """Both sides of a weight: of its output gradients and of its inputs."""

    outputs: Side
    inputs: Side

    def penalty(self, core_PQ: Tensor) -> Tensor:
        """Return ``tr(B_f M A_f M^T) / 2``, with the gradient ``B_f M A_f`` by M; differentiable once."""
        with torch.no_grad(), full_precision(core_PQ.device.type):
            m_PQ = core_PQ.detach().float()
            pull_PQ = self.outputs.times(self.inputs.times(m_PQ.T).T).to(core_PQ.dtype)
            value = (m_PQ * pull_PQ).sum() / 2
        return value + ((core_PQ - core_PQ.detach()) * pull_PQ).sum()


class CurvaturePenalty:
    """Holds the free directions by how much each is expected to cost, beside the protected ones, which do not move.

    With D = Q_U M Q_V^T the change of a weight, A the second moment of its inputs and B that of the gradients of
    -log p(y) by its outputs, y drawn from the model before the task, the penalty is

        strength * sum over the weights of tr(B D A D^T) / 2
      = strength * sum over the weights of tr((Q_U^T B Q_U) M (Q_V^T A Q_V) M^T) / 2

    to second order ``strength`` times the mean KL(p || q) of what calibrates. Where a model is certain of
    what it says its curvature vanishes, though a large enough change breaks it; so what holds is a strength of
    hundreds and more. It depends on the core alone: no row and no text goes through the model for it.

    Args:
        strength: above 0.
        sides: by the names of the protected layers.

    Source:
        Kirkpatrick et al. 2017, arXiv 1612.00796 (EWC), which has the diagonal of the Fisher matrix; Ritter, Botev and
        Barber 2018, arXiv 1805.07810, which has these factors, in all directions and of the training data.
    """

    def __init__(self, strength: float, sides: Mapping[str, Sides]) -> None:
        self.strength, self.sides = strength, dict(sides)

    @classmethod
    def of(cls, model: nn.Module, factors: Mapping[str, Factors], strength: float) -> Self:
        """Return that of a protected model.

        Args:
            factors: A and B of each protected layer, of the model before.

        Raises:
            LoricaError: a weight of the plan is not held by the model.
        """
        layers = protected_layers(model)
        missing = next((name for name in factors if name not in layers), None)
        if missing is not None:
            raise _not_held(missing)

        made: dict[tuple[int, int], Side] = {}  # layers with the same input hold one basis, and have one factor of it

        def side(factor: Factor | None, basis: Basis, matrix_FS: Tensor) -> Side:
            assert factor is not None
            key = id(factor), id(basis)
            if key not in made:
                made[key] = Side.of(factor, basis.on(matrix_FS), matrix_FS.device)
            return made[key]

        def sides(layer: SubspaceLayer, found: Factors) -> Sides:
            matrix_MN = layer.matrix.detach()
            outputs = side(found.outputs, layer.out_basis, matrix_MN)
            return Sides(outputs, side(found.inputs, layer.in_basis, matrix_MN.T))

        return cls(strength, {name: sides(layers[name], found) for name, found in factors.items()})

    @classmethod
    def blank(cls, model: nn.Module, strength: float) -> Self:
        """Return one that is as large and as much work for a protected model; its values mean nothing.

        Raises:
            LoricaError: the model holds no weight.
        """
        if not protected_layers(model):
            raise _not_held("any weight")
        made: dict[int, Side] = {}

        def side(basis: Basis, core_PQ: Tensor) -> Side:
            if id(basis) not in made:
                root_FR = core_PQ.new_zeros(basis.free, min(RANK, basis.free), dtype=torch.float32)
                made[id(basis)] = Side(root_FR, core_PQ.new_zeros((), dtype=torch.float32))
            return made[id(basis)]

        layers = protected_layers(model).items()
        return cls(
            strength, {n: Sides(side(one.out_basis, one.core), side(one.in_basis, one.core)) for n, one in layers}
        )

    @classmethod
    def kept(cls, bases: KeptBases, names: Iterable[str], strength: float, device: torch.device) -> Self:
        """Return that of an interrupted run, from what was kept of it."""
        read = cache(lambda place: bases.tensor(place).to(device))

        def side(name: str) -> Side:
            return Side(*(read(bases.place(f"{name}.{leaf}")) for leaf in Side._fields))

        return cls(strength, {name: Sides(*(side(f"{name}.{KEPT}.{one}") for one in Sides._fields)) for name in names})

    def to_keep(self) -> dict[str, Tensor]:
        """Return its tensors, by the names that ``kept`` looks for."""
        return {
            f"{name}.{KEPT}.{one}.{leaf}": tensor
            for name, sides in self.sides.items()
            for one, side in zip(Sides._fields, sides, strict=True)
            for leaf, tensor in zip(Side._fields, side, strict=True)
        }

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the penalty, in nats; its gradient goes to the cores alone."""
        layers = protected_layers(model)
        parts = [sides.penalty(layers[name].core) for name, sides in self.sides.items()]
        return self.strength * torch.stack([part.to(parts[0].device) for part in parts]).sum()


def _not_held(what: str) -> LoricaError:
    return LoricaError(
        f"curvature_penalty: nothing of {what} is protected, so that it trains as it is; give "
        "unfreeze_rank_ratio below 1, or leave curvature_penalty out"
    )
