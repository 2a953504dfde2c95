"""OSFT: train all linear layers, only in directions that leave the protected ones alone."""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor, nn
from torch.optim import Optimizer

from lorica.constrain.audit import audit_weight
from lorica.constrain.audit_report import AuditReport
from lorica.constrain.linear import matrix_of
from lorica.constrain.optimizer import ConstrainedOptimizer, WeightConstraint, block_constraints
from lorica.constrain.planning import plan
from lorica.constrain.protect import protect, protected_layers, release
from lorica.errors import LoricaError
from lorica.methods.base import METHODS, Method, Progress, Protection


@METHODS.register("osft")
class OSFT(Method):
    """Orthogonal Subspace Fine-Tuning: split each weight anew before each task and protect its top directions.

    The constraints ``two-sided``, ``input`` and ``output`` are held by the model (the reduced engine),
    ``block`` by the optimizer (the projected engine).

    Source:
        arXiv 2504.07097.
    """

    summary = "fine-tuning in the free directions of each weight (Orthogonal Subspace Fine-Tuning)"

    def __init__(self, protection: Protection) -> None:
        super().__init__(protection)
        beside = sorted(protection.given() - {"plan"})
        if protection.plan is not None and beside:
            raise LoricaError(f"{beside[0]} has no effect beside a plan: say it in the plan")
        self._constraints: dict[nn.Parameter, WeightConstraint] | None = None
        self._before: dict[str, Tensor] = {}

    def begin_task(self, model: nn.Module, progress: Progress | None = None) -> None:
        asked = self.protection
        options = {f.name: getattr(asked, f.name) for f in fields(asked) if f.name != "plan"}
        self.plan = asked.plan if asked.plan is not None else plan(model, **options)
        if any(entry.constraint == "block" for entry in self.plan.entries):
            self._before = {name: matrix_of(model.get_submodule(name)).detach().clone() for name in self.plan.names()}
            self._constraints = block_constraints(model, self.plan)
        else:
            protect(model, self.plan, progress=progress)

    @property
    def clips(self) -> bool:
        return self._constraints is not None

    def wrap_optimizer(self, optimizer: Optimizer, max_grad_norm: float) -> Optimizer:
        if self._constraints is None:
            return optimizer
        return ConstrainedOptimizer(optimizer, self._constraints, max_grad_norm=max_grad_norm)

    def audit(self, model: nn.Module) -> AuditReport:
        """Return the audit of every weight that was split; of the reduced engine's also before rounding."""
        assert self.plan is not None
        layers = protected_layers(model)
        rows = []
        for entry in self.plan.entries:
            moment = self.plan.moment(entry.name)
            if entry.name in layers:
                layer = layers[entry.name]
                layer.refresh()
                rows.append(audit_weight(layer.base, layer.matrix, entry, moment, master_delta_MN=layer.delta()))
            elif entry.name in self._before:
                after = matrix_of(model.get_submodule(entry.name))
                rows.append(audit_weight(self._before[entry.name], after, entry, moment))
        return AuditReport(rows)

    def end_task(self, model: nn.Module) -> None:
        release(model)
        self._constraints, self._before = None, {}
