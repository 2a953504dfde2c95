"""OSFT as the paper parametrises it: the factors of the lower singular directions train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorica.constrain.audit_report import AuditReport
from lorica.constrain.audit_weight import audit_weight
from lorica.constrain.factored import START, FactoredLinear
from lorica.constrain.kept import KeptBases
from lorica.constrain.linear import matrix_of
from lorica.constrain.optimizer import ConstrainedOptimizer, WeightConstraint
from lorica.constrain.planning import plan
from lorica.constrain.projections import GradientOnly, Sides
from lorica.constrain.protect import fitting_targets, freeze_all_but, release
from lorica.constrain.targets import check_whole
from lorica.errors import LoricaError
from lorica.methods.base import METHODS, Method, Progress, Targets
from lorica.methods.task import TaskData
from lorica.subspace.plan import Plan
from lorica.subspace.sources import Protected


@dataclass(frozen=True)
class FactoredOptions(Targets):
    """How much is protected, and how.

    Attributes:
        unfreeze_rank_ratio, effective_rank, rank_pattern: as in ``lorica.plan``.
        retract: put the factors back into the complement after each step, as mini_trainer does; without it their
            gradients are projected and nothing else, as in the paper and PEFT.
    """

    unfreeze_rank_ratio: float | None = None
    effective_rank: float | int | None = None
    rank_pattern: Mapping[str, float | int] = field(default_factory=dict)
    retract: bool = True


@METHODS.register("osft-factored")
class OSFTFactored(Method):
    """OSFT by factors: before each task ``W = U_high S_high V_high^T + U_low S_low V_low^T``, and the low ones train.

        dU_low <- dU_low - U_high (U_high^T dU_low)        dV_low <- dV_low - V_high (V_high^T dV_low)

    S_low needs no projection. The gradients are projected as the optimizer takes them, before they are clipped,
    which is what hooks on the factors come to. The factors do not stay orthonormal, and nothing makes them so.
    The feasible set is that of ``osft`` with ``two-sided``; the path through it is another, since each step
    is scaled by the small singular values.

    With ``retract`` the factors are projected too after each step, and ``U_high^T dW = 0 = dW V_high`` holds to the
    rounding of the factors: next to a small change that can be 1e-4 of it. Without ``retract`` an element-wise
    optimizer such as AdamW leaves the set. ``audit`` tells how far, either way.

    Source:
        arXiv 2504.07097, sections 3.1 and 3.2.
    """

    options_type = FactoredOptions
    summary = "OSFT with the paper's trainable factors U, S, V instead of dense weights (reference)"
    reproduction = "tested step by step against a literal transcription; no published figure reproduced yet"

    def __init__(self, options: FactoredOptions) -> None:
        super().__init__(options)
        self._layers: dict[str, FactoredLinear] = {}
        self._constraints: dict[nn.Parameter, WeightConstraint] = {}

    def begin_task(self, model: nn.Module, task: TaskData, progress: Progress | None = None) -> None:
        self.plan = self._plan(model) if self.kept is None else self.kept.plan
        targets = fitting_targets(model, self.plan)
        check_whole(targets, "method 'osft-factored'")
        for name, module in targets.items():
            if matrix_of(module).dtype not in (torch.float32, torch.float64):
                raise LoricaError(
                    f"{name} is {matrix_of(module).dtype}; method 'osft-factored' needs float32 weights: load the "
                    "model as float32"
                )
        for done, entry in enumerate(self.plan.entries, start=1):
            self._layers[entry.name] = factored(entry.name, targets[entry.name], entry.k, self.kept)
            if progress:
                progress(entry.name, done, len(self.plan))
        freeze_all_but(model, self.plan, [])
        replace(model, {targets[name]: layer for name, layer in self._layers.items()})
        for layer in self._layers.values():
            self._constraints |= self._held(layer)

    def _plan(self, model: nn.Module) -> Plan:
        asked = self.options
        return plan(
            model,
            asked.unfreeze_rank_ratio,
            effective_rank=asked.effective_rank,
            rank_pattern=asked.rank_pattern,
            target_modules=asked.target_modules,
            train_also=asked.train_also,
            freeze_experts=asked.freeze_experts,
        )

    def to_keep(self, model: nn.Module) -> dict[str, Tensor]:
        return {
            f"{name}.{part}": tensor for name, layer in self._layers.items() for part, tensor in layer.start.items()
        }

    def _held(self, layer: FactoredLinear) -> dict[nn.Parameter, WeightConstraint]:
        held: dict[nn.Parameter, WeightConstraint] = {}
        for name, factor, high in zip(("u_low", "v_low"), (layer.u_low, layer.v_low), layer.protected, strict=True):
            sides = Sides(layer.start[name], Protected(high, high.new_zeros(factor.shape[1], 0)))
            held[factor] = sides if self.options.retract else GradientOnly(sides)
        return held

    @property
    def clips(self) -> bool:
        return bool(self._constraints)

    def wrap_optimizer(self, optimizer: Optimizer, max_grad_norm: float) -> Optimizer:
        return ConstrainedOptimizer(optimizer, self._constraints, max_grad_norm=max_grad_norm)

    def audit(self, model: nn.Module) -> AuditReport:
        """Return the leakage of the weights that the factors stand for, rounded once to their dtype."""
        assert self.plan is not None
        layers = [self._layers[entry.name] for entry in self.plan.entries]
        pairs = zip(layers, self.plan.entries, strict=True)
        return AuditReport([audit_weight(layer.before(), layer.dense(), entry) for layer, entry in pairs])

    def end_task(self, model: nn.Module, task: TaskData) -> None:
        replace(model, {layer: layer.unwrap() for layer in self._layers.values()})
        release(model)
        self._layers, self._constraints = {}, {}


def factored(name: str, plain: nn.Module, k: int, kept: KeptBases | None) -> FactoredLinear:
    """Return a layer's factored form; a ``LoricaError`` names the layer."""
    try:
        start = None if kept is None else {part: kept.tensor(f"{name}.{part}") for part in START}
        return FactoredLinear(plain, k, start)
    except LoricaError as error:
        raise LoricaError(f"{name}: {error}") from error


def replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, wherever in the model these are."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, name, new[child])
