"""Orthogonal Gradient Descent: no step along the gradients that rows of earlier tasks had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorica.constrain.accumulate import FlatBasis
from lorica.constrain.projections import Flat
from lorica.methods.base import METHODS, Targets
from lorica.methods.positions import trained_positions
from lorica.methods.projected import ProjectedFT, opened, refuse_too_many
from lorica.methods.task import TaskData
from lorica.subspace.calibration import Batch


@dataclass(frozen=True)
class OGDOptions(Targets):
    """What OGD keeps of each task.

    Attributes:
        gradients_per_task: rows of a finished task whose gradients are stored.
        gradient_of: each row's ``loss``, or the mean ``logit`` of the tokens it trains (OGD-GTL).
        max_bytes: how much may be stored at the end of the stream.
    """

    gradients_per_task: int = 20
    gradient_of: Literal["loss", "logit"] = "loss"
    max_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        if self.gradients_per_task < 0:
            raise ValueError(f"gradients_per_task = {self.gradients_per_task} is out of range: 0 (none) or more")
        if self.gradient_of not in ("loss", "logit"):
            raise ValueError(f"gradient_of = {self.gradient_of!r} is unknown; known: loss, logit")


@METHODS.register("ogd")
class OGD(ProjectedFT):
    """Orthogonal Gradient Descent: the change d of all trained weights together must satisfy ``B^T d = 0``.

    After each task the gradients of single rows, taken at the weights that the task left and laid end to end
    over all weights, are orthonormalised against those before and appended to B; so to first order no stored
    row's loss moves. The gradient is projected as published, ``g - B B^T g``; for optimizers such as AdamW,
    which step out of the set that their gradient lies in, the weights are put back after each step.

    The paper stores gradients of logits (``gradient_of="logit"`` is its OGD-GTL with the tokens of a row
    averaged); later comparisons on language models store the loss's, which is the default here. The loss's
    gradient nearly vanishes on rows that are known by heart, but only its direction counts.

    Source:
        Farajtabar, Azizan, Mott and Li, "Orthogonal Gradient Descent for Continual Learning", AISTATS 2020
        (arXiv 1910.07104).
    """

    options_type = OGDOptions
    summary = "no step along stored gradients of earlier tasks' rows (Orthogonal Gradient Descent)"
    stores = "one gradient over all trained weights for each stored row; grows with the tasks"
    reproduction = "tested by hand and by what stays unchanged to first order; no published figure reproduced yet"

    def __init__(self, options: OGDOptions) -> None:
        super().__init__(options)
        self.basis = FlatBasis()

    def constrain(self, model: nn.Module, task: TaskData) -> None:
        parameters = opened(model)
        refuse_too_many(
            model, parameters, self.options.gradients_per_task * task.count, self.options.max_bytes,
            "ogd", "gradients_per_task",
        )  # fmt: skip
        if len(self.basis):
            self._joint = Flat(parameters, self.basis)

    def remember(self, model: nn.Module, task: TaskData) -> None:
        training = model.training
        model.eval()
        rows = task.batches(self.options.gradients_per_task, batch_size=1)
        self.basis.add(self._gradient(model, row) for row in rows)
        model.train(training)

    def _gradient(self, model: Any, row: Batch) -> dict[str, Tensor]:
        parameters = opened(model)
        inputs = {key: value.to(next(model.parameters()).device) for key, value in row.items()}
        output = model(**inputs)
        value = (
            output.loss if self.options.gradient_of == "loss" else mean_logit(model, output.logits, inputs["labels"])
        )
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(parameters, gradients, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        return self.basis.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.basis.load_state_dict(state)


def mean_logit(model: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of the logits that a row's labels ask for, where they are not ignored."""
    logits_TV, labels_T = trained_positions(model, labels, logits)
    return logits_TV.gather(-1, labels_T[:, None]).mean()
