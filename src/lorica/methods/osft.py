"""OSFT: train all linear layers, only in directions that leave the protected ones alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lorica.constrain.audit import audit_weight
from lorica.constrain.audit_report import AuditReport
from lorica.constrain.linear import matrix_of
from lorica.constrain.optimizer import Block, ConstrainedOptimizer, WeightConstraint, block_constraints
from lorica.constrain.planning import plan
from lorica.constrain.protect import bases_of, protect, protected_layers, protected_of, release
from lorica.errors import LoricaError
from lorica.methods.base import METHODS, Method, Progress, Protection, scheduled_share
from lorica.methods.task import TaskData
from lorica.subspace.calibration import observe
from lorica.subspace.learned import LearnedDirections, SeenInputs
from lorica.subspace.plan import MEASURED, Plan

LEARNED, INPUTS = "learned.", "inputs."
"""What the names in the state begin with."""

_NOT_PLANNED = ("plan", "protect_learned", "remember_inputs", "remember_rows", "rank_schedule", "memory_mode")
"""Options that are no arguments of ``lorica.plan``."""


@METHODS.register("osft")
class OSFT(Method):
    """Orthogonal Subspace Fine-Tuning: split each weight anew before each task and protect its top directions.

    The constraints ``two-sided``, ``input`` and ``output`` are held by the model (the reduced engine),
    ``block`` by the optimizer (the projected engine).

    From task to task, as the options say, the protected share follows ``rank_schedule``, the directions that
    finished tasks learned in are protected beside the source's (``protect_learned``), and what finished tasks'
    inputs were counts in what the next ones protect (``remember_inputs``). What is kept for this has the same
    size after ten tasks as after one.

    Source:
        arXiv 2504.07097.
    """

    options_type = Protection
    summary = "fine-tuning in the free directions of each weight (Orthogonal Subspace Fine-Tuning)"
    stores = "nothing; with protect_learned two thin bases, with remember_inputs an N x N matrix per weight"
    reproduction = "tested against its factored form, PEFT's and mini_trainer's; no published figure reproduced yet"

    def __init__(self, protection: Protection) -> None:
        super().__init__(protection)
        self.protection = protection
        beside = sorted(protection.given() - {"plan", "protect_learned", "memory_mode"})
        if protection.plan is not None and beside:
            raise LoricaError(f"{beside[0]} has no effect beside a plan: say it in the plan")
        self.learned = LearnedDirections(protection.protect_learned or 0.0)
        self.seen = SeenInputs()
        self._constraints: dict[nn.Parameter, WeightConstraint] | None = None
        self._before: dict[str, Tensor] = {}

    def begin_task(self, model: nn.Module, task: TaskData, progress: Progress | None = None) -> None:
        self.plan = self._plan(model, task.index)
        if any(entry.constraint == "block" for entry in self.plan.entries):
            if self.protection.memory_mode != "fast":
                raise LoricaError("memory_mode 'lean' has no effect with constraint 'block', which the optimizer holds")
            self._constraints = block_constraints(model, self.plan, self.kept)
        else:
            protect(model, self.plan, memory=self.protection.memory_mode, progress=progress, kept=self.kept)
        if self._constraints is not None or self.protection.protect_learned:
            dense = [name for name in self.plan.names() if name not in protected_layers(model)]
            self._before = {name: matrix_of(model.get_submodule(name)).detach().clone() for name in dense}
        self._count_learned(model)

    def _plan(self, model: nn.Module, index: int) -> Plan:
        """Return the plan of a task: as the options say, or as it was kept, with what finished tasks left behind."""
        made = self.protection.plan if self.kept is None else self.kept.plan
        if made is None:
            made = plan(model, **self._planning(model, index))
        learned = {e.name: self.learned.directions(e.name, e.shape) for e in made.entries}
        moments = {name: made.moment(name) for name in made.names()}
        if any(learned.values()):
            made = made.with_measured(learned={name: pair for name, pair in learned.items() if pair is not None})
        if self.seen:
            combined = {name: self.seen.combined(name, a) for name, a in moments.items() if a is not None}
            made = made.with_measured(moments=combined)
        return made

    def _planning(self, model: nn.Module, index: int) -> dict[str, Any]:
        """Return the arguments of ``lorica.plan`` for a task."""
        asked = self.protection
        options = {f.name: getattr(asked, f.name) for f in fields(asked) if f.name not in _NOT_PLANNED}
        if asked.rank_schedule is not None:
            options["effective_rank"] = scheduled_share(asked.rank_schedule, index)
        if asked.calibration is None and (asked.source in MEASURED or asked.ranks == "importance"):
            options["calibration"] = _default_calibration(model)
        return options

    def _count_learned(self, model: nn.Module) -> None:
        """Set each entry's ``learned`` to how many directions were new to what the source protects."""
        assert self.plan is not None
        layers = protected_layers(model)
        for index, entry in enumerate(self.plan.entries):
            if not any(entry.learned):
                continue
            if entry.name in layers:
                layer = layers[entry.name]
                held = [basis.dim - basis.free for basis in (layer.out_basis, layer.in_basis)]
            else:
                assert self._constraints is not None
                block = self._constraints[model.get_submodule(entry.name).get_parameter("weight")]
                assert isinstance(block, Block)
                held = [block.u.shape[1], block.v.shape[1]]
            source = entry.model_copy(update={"learned": (0, 0)}).protected
            counts = tuple(both - own for both, own in zip(held, source, strict=True))
            self.plan.entries[index] = entry.model_copy(update={"learned": counts})

    def to_keep(self, model: nn.Module) -> dict[str, Tensor]:
        assert self.plan is not None
        if self._constraints is None:
            return bases_of(model)
        found: dict[str, Tensor] = {}
        for name in self.plan.names():
            block = self._constraints.get(model.get_submodule(name).get_parameter("weight"))
            if isinstance(block, Block):
                found |= {f"{name}.{part}": tensor for part, tensor in block.parts().items()}
        return found

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
            moment, learned = self.plan.moment(entry.name), self.plan.learned(entry.name)
            if entry.name in layers:
                layer = layers[entry.name]
                layer.refresh()
                before, after, master = layer.base, layer.matrix, layer.delta()
                measured = entry.source in MEASURED and moment is None  # in the process that the bases are from
                held = protected_of(layer) if measured else None
                rows.append(
                    audit_weight(before, after, entry, moment, learned, master_delta_MN=master, directions=held)
                )
            elif entry.name in self._before:
                after = matrix_of(model.get_submodule(entry.name)).detach()
                rows.append(audit_weight(self._before[entry.name], after, entry, moment, learned))
        return AuditReport(rows)

    def end_task(self, model: nn.Module, task: TaskData) -> None:
        assert self.plan is not None
        if self.protection.protect_learned:
            self._remember_changes(model)
        release(model)
        if self.protection.remember_inputs:
            layers = {name: model.get_submodule(name) for name in self.plan.names()}
            rows = task.batches(self.protection.remember_rows)
            for name, statistics in observe(model, layers, rows, moments=True).items():
                assert statistics.moment_NN is not None
                self.seen.add(name, statistics.moment_NN)
        self._constraints, self._before = None, {}

    def _remember_changes(self, model: nn.Module) -> None:
        for name, layer in protected_layers(model).items():
            self.learned.add(name, layer.delta())
        for name, before in self._before.items():
            self.learned.add(name, matrix_of(model.get_submodule(name)).detach().double() - before.double())

    def state_dict(self) -> dict[str, Tensor]:
        learned = {LEARNED + name: tensor for name, tensor in self.learned.state_dict().items()}
        return learned | {INPUTS + name: tensor for name, tensor in self.seen.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what an earlier ``state_dict`` returned.

        Raises:
            LoricaError: it holds what an option remembers that is not set here, and so would be lost.
        """
        learned = _part(state, LEARNED)
        if learned and self.protection.protect_learned is None:
            raise LoricaError(
                "finished tasks were learned with protect_learned, and what they learned would now be open to change: "
                "set protect_learned, or 0 to give it up"
            )
        inputs = _part(state, INPUTS)
        if inputs and not self.protection.remember_inputs:
            raise LoricaError(
                "finished tasks were learned with remember_inputs, and what their inputs were would now be forgotten: "
                "set remember_inputs"
            )
        if self.protection.protect_learned:
            self.learned.load_state_dict(learned)
        self.seen.load_state_dict(inputs)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _default_calibration(model: nn.Module) -> str | None:
    """Return "self" for models that continue a text by themselves, "random" for the other Hugging Face models."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    causal = bool(model.can_generate()) and not getattr(config, "is_encoder_decoder", False)  # type: ignore[operator]
    return "self" if causal else "random"
