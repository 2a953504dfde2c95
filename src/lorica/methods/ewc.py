"""Elastic weight consolidation: a spring on every weight, as stiff as the weight mattered so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorica.constrain.linear import SubspaceLayer
from lorica.errors import LoricaError
from lorica.methods.base import METHODS, Progress, Targets
from lorica.methods.positions import trained_positions
from lorica.methods.seqft import SeqFT
from lorica.methods.task import TaskData

_PREFIX = "fisher."


@dataclass(frozen=True)
class EWCOptions(Targets):
    """Options of ``ewc``.

    Attributes:
        ewc_lambda: stiffness of the springs, 0 or more; 400 as in TRACE. Search 1 to 1e6 by powers of ten.
        gamma: what is left of the older tasks' Fisher information when a task is added, 0 to 1.
        fisher_rows: training rows of each task that its Fisher information is estimated on, at least 1; one
            backward pass each.
    """

    ewc_lambda: float = 400.0
    gamma: float = 1.0
    fisher_rows: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.ewc_lambda < float("inf"):
            raise ValueError(f"ewc_lambda = {self.ewc_lambda} is out of range: 0 or more")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma = {self.gamma} is out of range: a share from 0 to 1")
        if self.fisher_rows < 1:
            raise ValueError(f"fisher_rows = {self.fisher_rows} is out of range: at least 1")


@METHODS.register("ewc")
class EWC(SeqFT):
    """Elastic weight consolidation in its online form.

    From the second task on the loss is

        mean token loss + ewc_lambda / 2 * sum_i F_i (theta_i - theta*_i)^2

    with theta* the weights at the start of the task and, after each task, F <- gamma F + F_t. F_t is the diagonal
    of the empirical Fisher information at the trained weights,

        F_t = mean over rows of (d log p(answer | prompt) / d theta)^2,   log p(answer) = sum of its tokens' log p

    taken row by row (the square of a batch's gradient is no Fisher information: the rows' gradients cancel) and
    with the labels of the data rather than sampled ones. The penalty is added to the mean token loss as TRACE does,
    so that the answers' length is part of what ``ewc_lambda`` means.

    What is kept is one number per trained weight, however many tasks there were. Kirkpatrick et al. keep F and
    theta* of each task; with one F and the newest theta* memory does not grow, and nothing needs to be stored for
    theta*. Training takes the memory of F and theta* besides (of F alone where weights train through a core).

    Source:
        Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3; Schwarz et al. 2018, arXiv 1805.06370 (online EWC);
        TRACE, arXiv 2310.06762 (ewc_lambda = 400).
    """

    options_type = EWCOptions
    summary = "sequential fine-tuning with a quadratic penalty on what mattered before (online EWC)"
    stores = "the diagonal Fisher information: a number (float32) per trained weight"
    reproduction = "Fisher information and penalty tested by hand and by autograd; no published figure reproduced yet"

    def __init__(self, options: EWCOptions) -> None:
        super().__init__(options)
        self._fisher: dict[str, Tensor] = {}
        self._anchors: dict[str, Tensor] = {}

    def begin_task(self, model: nn.Module, task: TaskData, progress: Progress | None = None) -> None:
        super().begin_task(model, task, progress)
        for name, parameter, flipped in _trained(model):
            if name not in self._fisher:
                continue
            shape = parameter.T.shape if flipped else parameter.shape
            if self._fisher[name].shape != shape:
                raise LoricaError(
                    f"the state of ewc has {name} as {tuple(self._fisher[name].shape)}, the model as {tuple(shape)}; "
                    "it belongs to another model"
                )
            self._fisher[name] = self._fisher[name].to(parameter.device)
            if parameter is model.get_parameter(name):  # the weight itself trains, not a core that starts at 0
                self._anchors[name] = parameter.detach().clone()

    def penalty(self, model: nn.Module, inputs: Mapping[str, Tensor], logits: Tensor) -> Tensor | None:
        if not self._fisher:
            return None
        terms = []
        for name, parameter, flipped in _trained(model):
            if name in self._fisher:
                fisher = self._fisher[name]
                drift = parameter.to(fisher.dtype)
                if name in self._anchors:
                    drift = drift - self._anchors[name]
                terms.append((fisher * (drift.T if flipped else drift).square()).sum().to(logits.device))
        return self.options.ewc_lambda / 2 * torch.stack(terms).sum() if terms else None

    def end_task(self, model: nn.Module, task: TaskData) -> None:
        for name, new in fisher_information(model, task, self.options.fisher_rows).items():
            old = self._fisher.get(name)
            self._fisher[name] = new if old is None else self.options.gamma * old + new
        self._anchors = {}
        super().end_task(model, task)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{_PREFIX}{name}": fisher for name, fisher in self._fisher.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._fisher = {key.removeprefix(_PREFIX): fisher for key, fisher in state.items()}


def fisher_information(model: nn.Module, task: TaskData, rows: int) -> dict[str, Tensor]:
    """Return the diagonal empirical Fisher information of what trains, by the plain model's names and layout.

    Measured in evaluation mode, on ``task.sample(rows)``, one row at a time; float32 or wider. The model's mode and
    its parameters' ``grad`` are left as they are.
    """
    trained = list(_trained(model))
    sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for _, p, _ in trained]
    training = model.training
    model.eval()
    count = 0
    for row in task.batches(rows, batch_size=1):
        gradients = torch.autograd.grad(
            log_likelihood(model, row), [p for _, p, _ in trained], allow_unused=True, materialize_grads=True
        )
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient.to(total.dtype).square()
        count += 1
    model.train(training)
    return {
        name: (total.T.contiguous() if flipped else total).div_(count)
        for (name, _, flipped), total in zip(trained, sums, strict=True)
    }


def log_likelihood(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the log-probability (nats) of all of a batch's labels: the sum over its trained tokens."""
    inputs = {key: value.to(model.device) for key, value in batch.items()}
    logits, labels = trained_positions(model, inputs["labels"], model(**inputs).logits)
    return -F.cross_entropy(logits.float(), labels, reduction="sum")


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Yield what trains: its name in the plain model, the parameter, and whether it lies transposed to that one."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner, _, leaf = name.rpartition(".")
            layer = model.get_submodule(owner)
            if isinstance(layer, SubspaceLayer) and leaf == "core":
                yield f"{owner}.weight", parameter, layer.transposed
            else:
                yield name, parameter, False
