"""What the projection methods share: sequential fine-tuning whose weights are kept on a feasible set."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from lorica.constrain.audit_report import AuditReport
from lorica.constrain.audit_weight import audit_weight
from lorica.constrain.linear import WRAPPERS, matrix_of
from lorica.constrain.optimizer import ConstrainedOptimizer, JointConstraint, WeightConstraint
from lorica.constrain.projections import Sides, SidesBlock
from lorica.constrain.protect import protected_layers, release
from lorica.errors import LoricaError
from lorica.methods.base import Progress
from lorica.methods.seqft import SeqFT
from lorica.methods.task import TaskData
from lorica.subspace.plan_entry import Constraint
from lorica.subspace.sources import Protected


class ProjectedFT(SeqFT):
    """Sequential fine-tuning in which the optimizer holds a constraint that earlier tasks gave.

    A method says in ``constrain`` what the finished tasks constrain and in ``remember`` what a finished task
    adds. The constraint holds for the weights, not for the gradients alone: see ``ConstrainedOptimizer``.
    While nothing is remembered the optimizer is the Trainer's own, so that a first task is ``seqft``'s, bitwise.
    """

    def __init__(self, options: object) -> None:
        super().__init__(options)
        self._constraints: Mapping[nn.Parameter, WeightConstraint] = {}
        self._joint: JointConstraint | None = None
        self._before: dict[str, Tensor] = {}

    def begin_task(self, model: nn.Module, task: TaskData, progress: Progress | None = None) -> None:
        super().begin_task(model, task, progress)
        refuse_narrow(model)
        self.constrain(model, task)

    def constrain(self, model: nn.Module, task: TaskData) -> None:
        """Set ``_constraints`` or ``_joint`` by what is remembered; called with the planned weights open."""

    def remember(self, model: nn.Module, task: TaskData) -> None:
        """Take from the trained model what the next tasks must leave alone."""

    def hold(self, model: nn.Module, directions: Mapping[str, Protected], constraint: Constraint) -> None:
        """Hold planned weights by directions of earlier tasks, and say so in the plan.

        Args:
            model: with the task begun.
            directions: by layer; a side that the constraint leaves alone has none.
            constraint: what holds for them.
        """
        assert self.plan is not None
        kind = SidesBlock if constraint == "block" else Sides
        self.keep(model)
        layers = self.layers(model)
        self._constraints = {
            layers[name].get_parameter("weight"): kind(
                self._before[name], sides, transposed=WRAPPERS[type(layers[name])].transposed
            )
            for name, sides in directions.items()
        }
        told = {"constraint": constraint, "why": "directions of earlier tasks"}
        entries = [entry.model_copy(update=told) for entry in self.plan.entries]
        self.plan = self.plan.model_copy(update={"entries": entries}).with_measured(learned=directions)

    def keep(self, model: nn.Module) -> None:
        """Copy the planned weights as they are before the task, (out, in)."""
        self._before = {name: matrix_of(layer).detach().clone() for name, layer in self.layers(model).items()}

    def audit(self, model: nn.Module) -> AuditReport | None:
        """Return the share of each weight change in the directions of ``hold``; None where there are none."""
        if not self._constraints or not self._before:
            return None
        assert self.plan is not None
        rows = []
        for entry in self.plan.entries:
            after = matrix_of(model.get_submodule(entry.name)).detach()
            rows.append(audit_weight(self._before[entry.name], after, entry, learned=self.plan.learned(entry.name)))
        return AuditReport(rows)

    @property
    def clips(self) -> bool:
        return bool(self._constraints) or self._joint is not None

    def wrap_optimizer(self, optimizer: Optimizer, max_grad_norm: float) -> Optimizer:
        if not self.clips:
            return optimizer
        return ConstrainedOptimizer(optimizer, self._constraints, joint=self._joint, max_grad_norm=max_grad_norm)

    def end_task(self, model: nn.Module, task: TaskData) -> None:
        self.remember(model, task)
        self._constraints, self._joint, self._before = {}, None, {}
        super().end_task(model, task)

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the planned layers, by name."""
        assert self.plan is not None
        return {name: model.get_submodule(name) for name in self.plan.names()}


def refuse_narrow(model: nn.Module) -> None:
    """Refuse, and release, a model that ``protect`` had to give float32 cores because its weights are narrower."""
    narrow = {name: layer.base.dtype for name, layer in protected_layers(model).items()}
    if narrow:
        release(model)
        name, dtype = next(iter(narrow.items()))
        raise LoricaError(f"{name} is {dtype}; a method that projects needs float32 weights: load the model as float32")


def opened(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def refuse_too_many(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], vectors: int, max_bytes: int, method: str, option: str
) -> None:
    """Refuse, and release the model, if that many float32 vectors over all trained numbers exceed ``max_bytes``."""
    numbers = sum(parameter.numel() for parameter in parameters.values())
    needed = 4 * vectors * numbers
    if needed > max_bytes:
        release(model)
        raise LoricaError(
            f"{method} would store {vectors} vectors of {numbers:,} numbers, {needed / 2**30:.3g} GiB, by the end of "
            f"the stream; max_bytes allows {max_bytes / 2**30:.3g} GiB: lower {option}, narrow target_modules, or "
            "raise max_bytes"
        )
