"""OSFT: train all linear layers, only in directions that leave the protected ones alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorica.constrain.audit_report import AuditReport
from lorica.constrain.audit_weight import audit_weight
from lorica.constrain.linear import matrix_of
from lorica.constrain.optimizer import Block, ConstrainedOptimizer, WeightConstraint, block_constraints
from lorica.constrain.planning import measured_anew, plan
from lorica.constrain.protect import bases_of, protect, protected_layers, protected_of, release
from lorica.constrain.sharded_audit import audit_sharded
from lorica.errors import LoricaError
from lorica.methods.base import METHODS, Method, Progress
from lorica.methods.carried import Carried
from lorica.methods.curvature_penalty import RANK, CurvaturePenalty, strength_for
from lorica.methods.forgetting import Change, Foresight
from lorica.methods.own_texts import AUTO, Amount, Extent, amount_for, extent_of, written
from lorica.methods.protection import Protection, scheduled_share
from lorica.methods.rehearsal import Rehearsal, prompt_loss
from lorica.methods.task import TaskData
from lorica.subspace.calibration import Batch, is_causal
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import MEASURED, PlanEntry
from lorica.subspace.sources import Protected

_REHEARSING = ("prompts", "rehearse", "rehearse_weight", "rehearse_tokens", "rehearse_length", "rehearse_prompts")

_BESIDE_A_PLAN = ("plan", "protect_learned", *_REHEARSING, "memory_mode", "predict_forgetting")
"""Options that are no part of what a finished plan says."""

_OF_MEASURING = ("curvature_penalty", "remember_tasks", "remember_rows", "remember_size")
"""Options that go with what is measured; beside a finished plan if that has still to be done."""

_CALIBRATION = ("calibration", "calibration_tokens")

_NOT_PLANNED = (*_BESIDE_A_PLAN, *_OF_MEASURING, "rank_schedule")
"""Options that are no arguments of ``lorica.plan``."""


@METHODS.register("osft")
class OSFT(Method):
    """Orthogonal Subspace Fine-Tuning: split each weight anew before each task and protect its top directions.

    The constraints ``two-sided``, ``input`` and ``output`` are held by the model (the reduced engine),
    ``block`` by the optimizer (the projected engine).

    From task to task, as the options say, the protected share follows ``rank_schedule``, the directions that
    finished tasks learned in are protected beside the source's (``protect_learned``), and what finished tasks
    were counts in what the next ones protect (``remember_tasks``). What is kept for this has the same
    size after ten tasks as after one. With ``rehearse`` what the model predicts on text of its own is held besides,
    by a penalty; with ``curvature_penalty`` what a change in the free directions is expected to cost.

    Attributes:
        carried: what goes from task to task.
        rehearsal: the texts of the current task and what was predicted on them, with ``rehearse``.
        curvature: what holds the free directions, with ``curvature_penalty``.

    Source:
        arXiv 2504.07097; ``lorica.methods.rehearsal`` and ``curvature_penalty`` are no part of it.
    """

    options_type = Protection
    summary = "fine-tuning in the free directions of each weight (Orthogonal Subspace Fine-Tuning)"
    stores = (
        "nothing; with rehearse_length auto a number; with protect_learned two thin bases, with remember_tasks two "
        "truncated second moments and that number"
    )
    reproduction = "tested against its factored form, PEFT's and mini_trainer's; no published figure reproduced yet"

    def __init__(self, protection: Protection) -> None:
        super().__init__(protection)
        self.protection = protection
        _check_beside(protection)
        self.carried = Carried(protection)
        self._constraints: dict[nn.Parameter, WeightConstraint] | None = None
        self._before: dict[str, Tensor] = {}
        self.rehearsal: Rehearsal | None = None
        self.curvature: CurvaturePenalty | None = None
        self._foresight: Foresight | None = None

    def begin_task(self, model: nn.Module, task: TaskData, progress: Progress | None = None) -> None:
        self.rehearsal, texts = written(
            model, self.protection, task, self.amount(task), calibrates=self.kept is None, progress=progress
        )
        self.plan = made = self._plan(model, task.index, texts, progress)
        self.forgetting = None
        if self.protection.predict_forgetting:
            self._foresight = Foresight.of(model, self.plan.entries, task.seed + task.index, progress)
        if any(entry.constraint == "block" for entry in self.plan.entries):
            if self.protection.memory_mode != "fast":
                raise LoricaError("memory_mode 'lean' has no effect with constraint 'block', which the optimizer holds")
            self._constraints = block_constraints(model, self.plan, self.kept)
        else:
            protect(model, self.plan, memory=self.protection.memory_mode, progress=progress, kept=self.kept)
        if self.protection.curvature_penalty:
            self.curvature = self._curvature(model, made, task)
        self.plan = made.with_measured(factors={})  # the bases are made of it, and it is as large as they are
        if self._constraints is not None or self.protection.protect_learned or self._foresight is not None:
            dense = [name for name in self.plan.names() if name not in protected_layers(model)]
            self._before = {name: matrix_of(model.get_submodule(name)).detach().clone() for name in dense}
        self._count_learned(model)

    def penalty(self, model: nn.Module, inputs: Mapping[str, Tensor], logits: Tensor) -> Tensor | None:
        parts = [] if self.curvature is None else [self.curvature(model)]
        if self.rehearsal is not None:
            parts.append(self.rehearsal.penalty(model, inputs))
        if self.protection.rehearse_prompts:
            if logits is None:
                raise LoricaError("rehearse_prompts needs logits, and --use_liger_kernel makes none; leave one out")
            parts.append(self.protection.rehearse_prompts * prompt_loss(inputs, logits))
        return sum(parts[1:], parts[0]) if parts else None

    def amount(self, task: TaskData) -> Amount | None:
        """Return how much the model writes to rehearse before a task, None if nothing."""
        asked = self.protection
        depends = AUTO in (asked.rehearse_tokens, asked.rehearse_length)
        return amount_for(asked, self._extent(task) if depends else None) if asked.rehearse else None

    def _extent(self, task: TaskData) -> Extent:
        return extent_of(task.rows, self.carried.longest)

    def _curvature(self, model: nn.Module, made: Plan, task: TaskData) -> CurvaturePenalty:
        """Return what holds the free directions: of what the plan measured, or as it was kept."""
        strength = strength_for(self.protection.curvature_penalty, task.rows, causal=is_causal(model))
        if self.kept is not None:
            return CurvaturePenalty.kept(self.kept, made.names(), strength, next(model.parameters()).device)
        found = {name: made.factors(name) for name in made.names()}
        return CurvaturePenalty.of(model, {name: one for name, one in found.items() if one is not None}, strength)

    def training_state(self) -> Any:
        return None if self.rehearsal is None else {"drawn": self.rehearsal.drawn}

    def load_training_state(self, state: Any) -> None:
        if self.rehearsal is not None:
            self.rehearsal.drawn = state["drawn"]

    def _plan(
        self, model: nn.Module, index: int, texts: Sequence[Batch] | None, progress: Progress | None = None
    ) -> Plan:
        """Return the plan of a task: as the options say, or as it was kept, with what finished tasks left behind.

        Args:
            texts: what the model wrote, where it is at hand: it then calibrates too.
        """
        made = self.protection.plan if self.kept is None else self.kept.plan
        if made is None:
            made = plan(model, **self._planning(model, index), **self._measuring(model, texts), progress=progress)
        elif self.kept is None and made.unmeasured and not next(model.parameters()).is_meta:
            made = measured_anew(model, made, **self._measuring(model, texts), progress=progress)
        learned = {e.name: self.carried.learned.directions(e.name, e.shape) for e in made.entries}
        if any(learned.values()):
            made = made.with_measured(learned={name: pair for name, pair in learned.items() if pair is not None})
        return made

    def _planning(self, model: nn.Module, index: int) -> dict[str, Any]:
        """Return what ``lorica.plan`` is told for a task besides what it measures by."""
        asked, apart = self.protection, (*_NOT_PLANNED, *_CALIBRATION)
        options = {f.name: getattr(asked, f.name) for f in fields(asked) if f.name not in apart}
        if asked.rank_schedule is not None:
            options["effective_rank"] = scheduled_share(asked.rank_schedule, index)
        return options

    def _measuring(self, model: nn.Module, texts: Sequence[Batch] | None) -> dict[str, Any]:
        """Return what it measures by: the calibration, and what finished tasks left behind."""
        asked = self.protection
        found: dict[str, Any] = {"calibration": asked.calibration, "calibration_tokens": asked.calibration_tokens}
        if asked.measures and asked.calibration is None:
            found["calibration"] = "self" if asked.prompts else default_calibration(model)
        if asked.measures and texts is not None and found["calibration"] == "self":
            found = {"calibration": texts}
        earlier = self.carried.tasks.factors if self.carried.tasks else None
        return found | {"earlier": earlier, "beyond": RANK if asked.curvature_penalty else 0}

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
                block = self._block(model, entry.name)
                assert block is not None
                held = [block.u.shape[1], block.v.shape[1]]
            counts = tuple(both - own for both, own in zip(held, entry.given, strict=True))
            self.plan.entries[index] = entry.model_copy(update={"learned": counts})

    def to_keep(self, model: nn.Module) -> dict[str, Tensor]:
        assert self.plan is not None
        if self._constraints is None:
            return bases_of(model) | ({} if self.curvature is None else self.curvature.to_keep())
        found: dict[str, Tensor] = {}
        for name in self.plan.names():
            block = self._block(model, name)
            if block is not None:
                found |= {f"{name}.{part}": tensor for part, tensor in block.parts().items()}
        return found

    def _block(self, model: nn.Module, name: str) -> Block | None:
        """Return what the optimizer holds of a weight, None where it holds nothing."""
        block = (self._constraints or {}).get(model.get_submodule(name).get_parameter("weight"))
        return block if isinstance(block, Block) else None

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
        if any(layer.shards is not None for layer in layers.values()):
            return AuditReport(audit_sharded(layers, self.plan))
        rows = []
        for entry in self.plan.entries:
            learned, measured = self.plan.learned(entry.name), entry.source in MEASURED
            if entry.name in layers:
                layer = layers[entry.name]
                layer.refresh()
                before, after, master = layer.base, layer.matrix, layer.delta()
                held = protected_of(layer) if measured else None
                rows.append(audit_weight(before, after, entry, None, learned, master_delta_MN=master, directions=held))
            elif entry.name in self._before:
                before, after = self._before[entry.name], matrix_of(model.get_submodule(entry.name)).detach()
                block = self._block(model, entry.name) if measured else None
                held = None if block is None else Protected(block.u.double(), block.v.double())
                rows.append(audit_weight(before, after, entry, None, learned, directions=held))
        return AuditReport(rows)

    def end_task(self, model: nn.Module, task: TaskData) -> None:
        assert self.plan is not None
        if self._foresight is not None:
            self.forgetting = self._foresight.outcome(model, self._changes(model))
        if self.protection.protect_learned:
            self._remember_changes(model)
        release(model)
        if self.protection.remember_tasks or self.protection.rehearse_length == AUTO:
            self.carried.longest = self._extent(task).longest
        if self.protection.remember_tasks:
            self.carried.add_task(model, self.plan.entries, list(task.batches(self.protection.remember_rows)))
        self._constraints, self._before, self.rehearsal, self._foresight = None, {}, None, None
        self.curvature = None

    def protected(self, model: nn.Module) -> Iterator[tuple[PlanEntry, Protected]]:
        """Yield each entry of the task's plan with the directions that are protected, also as learned before."""
        assert self.plan is not None
        layers = protected_layers(model)
        for entry in self.plan.entries:
            block = self._block(model, entry.name)
            if entry.name in layers:
                yield entry, protected_of(layers[entry.name])
            elif block is not None:
                yield entry, Protected(block.u.double(), block.v.double())
            else:
                yield entry, Protected(*(torch.zeros(size, 0, dtype=torch.float64) for size in entry.shape))

    def _changes(self, model: nn.Module) -> Iterator[Change]:
        layers = protected_layers(model)
        for entry, directions in self.protected(model):
            layer = layers.get(entry.name)
            if layer is not None:
                layer.refresh()
            before = self._before[entry.name] if layer is None else layer.base
            after = matrix_of(model.get_submodule(entry.name)) if layer is None else layer.matrix
            yield Change(entry, before, after.detach(), directions)

    def _remember_changes(self, model: nn.Module) -> None:
        for name, layer in protected_layers(model).items():
            self.carried.learned.add(name, layer.delta())
        for name, before in self._before.items():
            self.carried.learned.add(name, matrix_of(model.get_submodule(name)).detach().double() - before.double())

    def state_dict(self) -> dict[str, Tensor]:
        return self.carried.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what an earlier ``state_dict`` returned; see ``Carried``."""
        self.carried.load_state_dict(state)


def _check_beside(protection: Protection) -> None:
    """Refuse options that a finished plan leaves without effect."""
    if protection.plan is None:
        return
    known = {*_BESIDE_A_PLAN, *((*_OF_MEASURING, *_CALIBRATION) if protection.plan.unmeasured else ())}
    beside = sorted(protection.given() - known)
    if beside:
        raise LoricaError(f"{beside[0]} has no effect beside a plan: say it in the plan")


def default_calibration(model: nn.Module) -> str | None:
    """Return "self" for models that continue a text by themselves, "random" for the other Hugging Face models."""
    if getattr(model, "config", None) is None:
        return None
    return "self" if is_causal(model) else "random"
