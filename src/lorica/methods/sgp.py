"""Scaled Gradient Projection: GPM's directions, each held as firmly as it is important."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lorica.constrain.linear import WRAPPERS
from lorica.constrain.optimizer import WeightConstraint
from lorica.constrain.projections import ScaledGradient, ScaledStep
from lorica.methods.base import METHODS
from lorica.methods.gpm import GPM, GPMOptions, new_directions
from lorica.methods.task import TaskData


@dataclass(frozen=True)
class SGPOptions(GPMOptions):
    """What SGP keeps of each task, and how it holds it.

    Attributes:
        scale: a, 0 (importance is the share of the largest singular value) upwards (all held as by GPM).
        scaled: what is scaled: the ``gradient``, or the ``step`` that the optimizer makes of it.
    """

    scale: float = 10.0
    scaled: Literal["gradient", "step"] = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.scale < float("inf"):
            raise ValueError(f"scale = {self.scale} is out of range: 0 or more")
        if self.scaled not in ("gradient", "step"):
            raise ValueError(f"scaled = {self.scaled!r} is unknown; known: gradient, step")


@METHODS.register("sgp")
class SGP(GPM):
    """Scaled Gradient Projection: the gradient loses the share l_i of its part along each stored direction.

        G <- G - G V diag(l) V^T        l_i = (a + 1) s_i / (a s_i + max s)

    with s_i the root of the task's energy along direction i: its singular value if the task added it,
    ``sqrt(v_i^T A v_i)`` if it is an older one. Over tasks the importances of a direction add up, to 1 at most.
    With every l_i = 1 it is GPM's projection of the gradient.

    A direction that is only partly held leaves no set of weights to keep to, so nothing is put back after a
    step. With SGD that is the published method to the letter. AdamW scales the entries of the gradient anew and
    gives part of what was taken back; ``scaled="step"`` takes the share from AdamW's step instead, as the
    authors' code can for reinforcement learning.

    Source:
        Saha and Roy, "Continual Learning with Scaled Gradient Projection", AAAI 2023 (arXiv 2302.01386), and the
        authors' code for the importance of older directions.
    """

    options_type = SGPOptions
    summary = "updates along inputs of earlier tasks scaled down by importance (Scaled Gradient Projection)"
    stores = "GPM's basis per layer, with importances; grows with the tasks, to the layer's width at most"
    reproduction = "importances tested by hand, its limit against GPM; no published figure reproduced yet"

    def __init__(self, options: SGPOptions) -> None:
        super().__init__(options)
        self.importance: dict[str, Tensor] = {}

    def constrain(self, model: nn.Module, task: TaskData) -> None:
        layers = self.layers(model)
        self._constraints = {
            layers[name].get_parameter("weight"): self._scaled(name, layers[name]) for name in self.bases
        }

    def _scaled(self, name: str, layer: nn.Module) -> WeightConstraint:
        weight = layer.get_parameter("weight")
        sides = (self.bases[name].to(weight), self.importance[name].to(weight))
        scaling = ScaledGradient(*sides, transposed=WRAPPERS[type(layer)].transposed)
        return scaling if self.options.scaled == "gradient" else ScaledStep(weight, scaling)

    def extend(self, name: str, moment_NN: Tensor, energy: float) -> None:
        old_NK = self.bases.get(name, torch.zeros(len(moment_NN), 0))
        v_NK = old_NK.to(moment_NN)
        new_NJ, values_J = new_directions(moment_NN, v_NK, energy)
        along_K = (v_NK * (moment_NN @ v_NK)).sum(0).clamp_min(0)
        share = importances(torch.cat([along_K, values_J]).sqrt(), self.options.scale).float().cpu()
        known = self.importance.get(name, torch.zeros(0))
        share[: len(known)] = (share[: len(known)] + known).clamp_max(1)
        self.bases[name] = torch.cat([old_NK, new_NJ.float().cpu()], dim=1)
        self.importance[name] = share

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {f"{name}.importance": one for name, one in self.importance.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        suffix = ".importance"
        self.importance = {
            key.removesuffix(suffix): value.clone() for key, value in state.items() if key.endswith(suffix)
        }


def importances(sigma_K: Tensor, scale: float) -> Tensor:
    """Return ``(a + 1) s_i / (a s_i + max s)``: 1 for the largest, 0 for none; all 0 where all s are."""
    largest = sigma_K.max() if len(sigma_K) else 0.0
    return torch.nan_to_num((scale + 1) * sigma_K / (scale * sigma_K + largest))
