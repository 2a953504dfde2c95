"""Algorithm 1 of the method's blog article: protect the directions in which earlier tasks moved the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lorica.constrain.accumulate import FlatBasis, SideBases
from lorica.constrain.linear import WRAPPERS
from lorica.constrain.projections import Flat
from lorica.methods.base import METHODS, Targets
from lorica.methods.projected import ProjectedFT, opened, refuse_too_many
from lorica.methods.snapshots import MeanGradient, Snapshots, TopGradients
from lorica.methods.task import TaskData
from lorica.subspace.plan_entry import Constraint
from lorica.subspace.ranks import share_to_count
from lorica.subspace.sources import Protected

REFRESH, MAX_BYTES = 10, 4 * 2**30


@dataclass(frozen=True)
class GradientOptions(Targets):
    """What is remembered of each task, and what it forbids.

    Attributes:
        snapshot: ``gradient``: the task's gradients, every ``refresh`` steps; ``delta``: what the task changed.
        refresh: m, in optimizer steps; 10 by default. For ``gradient``.
        k: directions per task, as a count, or for ``matrix`` as a share of each weight's.
        form: ``matrix``: a basis of each side of each weight; ``flat``: one of all weights laid end to end
            (the article's P x k form; small models only).
        constraint: what the bases of ``matrix`` forbid; ``block`` by default.
        max_bytes: how much may be stored at the end of the stream; 4 GiB by default. For ``flat``.
    """

    snapshot: Literal["gradient", "delta"] = "gradient"
    refresh: int | None = None
    k: int | float = 8
    form: Literal["matrix", "flat"] = "matrix"
    constraint: Constraint | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.snapshot not in ("gradient", "delta"):
            raise ValueError(f"snapshot = {self.snapshot!r} is unknown; known: gradient, delta")
        if self.form not in ("matrix", "flat"):
            raise ValueError(f"form = {self.form!r} is unknown; known: matrix, flat")
        if self.refresh is not None and self.snapshot == "delta":
            raise ValueError("refresh has no effect with snapshot 'delta', which looks at the end of a task only")
        if self.refresh is not None and self.refresh < 1:
            raise ValueError(f"refresh = {self.refresh} is out of range: at least 1 step")
        if self.constraint not in (None, "two-sided", "input", "output", "block"):
            raise ValueError(f"constraint = {self.constraint!r} is unknown; known: two-sided, input, output, block")
        if self.constraint is not None and self.form == "flat":
            raise ValueError("constraint has no effect with form 'flat', which knows no sides")
        if self.max_bytes is not None and self.form == "matrix":
            raise ValueError("max_bytes has no effect with form 'matrix', which stores little")
        if isinstance(self.k, float) and (self.form == "flat" or not 0 <= self.k <= 1):
            raise ValueError(f"k = {self.k} is out of range: a count, or with form 'matrix' a share from 0.0 to 1.0")
        if self.k < 0:
            raise ValueError(f"k = {self.k} is out of range: 0 (nothing) or more directions per task")


@METHODS.register("osft-gradient")
class OSFTGradient(ProjectedFT):
    """Orthogonal updates from gradients: what moved the weights in earlier tasks is closed to later ones.

    For each task, the top k left and right singular vectors of the mean of its gradient snapshots (or of the
    weight change) are orthonormalised against all earlier ones and appended to U and V; every later gradient
    is projected by them, and since AdamW steps out of the set its gradient lies in, the weight is put back
    after each step. Gradients are looked at before they are projected or clipped.

    The default ``constraint`` is ``block``, ``G - U U^T G V V^T``. It is the per-matrix form of the article's
    flattened one: the k leading terms u_i v_i^T of every earlier task's snapshot lie in the span of the
    u_i v_j^T, so that a later change has no inner product with them; and of the four it closes the least.
    ``two-sided``, ``input`` and ``output`` are as in ``PlanEntry``.

    ``flat`` keeps k vectors per task over all trained numbers: the top left singular vectors of the snapshots
    side by side, updated as they come. A change is a single vector, so with ``delta`` it keeps one per task.

    Source:
        Algorithm 1 of the blog article of the method; the paper itself (arXiv 2504.07097) splits the weights
        and stores no gradients.
    """

    options_type = GradientOptions
    summary = "no update along what moved the weights in earlier tasks (the blog article's Algorithm 1)"
    stores = "k directions per task: of each weight's two sides, or over all trained weights; grows with the tasks"
    reproduction = "bases tested against the full SVD, the constraint under AdamW; no published figure reproduced yet"

    def __init__(self, options: GradientOptions) -> None:
        super().__init__(options)
        self.memory: SideBases | FlatBasis = FlatBasis() if options.form == "flat" else SideBases()
        self._start: dict[str, Tensor] = {}
        self._snapshots: Snapshots | None = None

    def constrain(self, model: nn.Module, task: TaskData) -> None:
        tracked = self._tracked(model)
        if isinstance(self.memory, SideBases):
            self._hold_sides(model, self.memory)
        else:
            vectors = (1 if self.options.snapshot == "delta" else int(self.options.k)) * task.count
            allowed = MAX_BYTES if self.options.max_bytes is None else self.options.max_bytes
            refuse_too_many(model, tracked, vectors, allowed, "osft-gradient", "k")
            self._joint = Flat(tracked, self.memory) if len(self.memory) else None
        if self.options.k and self.options.snapshot == "delta":
            self._start = self._before or {
                name: self._laid_out(model, name, parameter.detach().clone()) for name, parameter in tracked.items()
            }
        elif self.options.k:
            self._snapshots = self._snapshots_of(tracked)

    def _snapshots_of(self, tracked: Mapping[str, nn.Parameter]) -> Snapshots:
        refresh = self.options.refresh or REFRESH
        if self.options.form == "flat":
            return TopGradients(tracked, refresh, int(self.options.k))
        return MeanGradient(tracked, refresh)

    def _tracked(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters whose updates are remembered: the planned weights, or all that train."""
        if self.options.form == "flat":
            return opened(model)
        return {name: layer.get_parameter("weight") for name, layer in self.layers(model).items()}

    def _hold_sides(self, model: nn.Module, memory: SideBases) -> None:
        constraint: Constraint = self.options.constraint or "block"
        free = {"input": (True, False), "output": (False, True)}.get(constraint, (False, False))
        directions = {
            name: Protected(*(side[:, : 0 if left else None] for side, left in zip(both, free, strict=True)))
            for name, both in memory.sides.items()
        }
        if directions:
            self.hold(model, directions, constraint)

    @property
    def clips(self) -> bool:
        """True without a constraint too, while gradients are looked at: clipping comes after that."""
        return super().clips or self._snapshots is not None

    def wrap_optimizer(self, optimizer: Optimizer, max_grad_norm: float) -> Optimizer:
        if self._snapshots is not None:
            self._snapshots.watch(optimizer)
        return super().wrap_optimizer(optimizer, max_grad_norm)

    def training_state(self) -> Any:
        return None if self._snapshots is None else self._snapshots.state()

    def load_training_state(self, state: Any) -> None:
        if self._snapshots is not None:
            self._snapshots.load(state)

    def remember(self, model: nn.Module, task: TaskData) -> None:
        vectors = self._snapshots.vectors() if self._snapshots is not None else []
        vectors = [{name: self._laid_out(model, name, one) for name, one in vector.items()} for vector in vectors]
        if self._start:
            now = {name: self._laid_out(model, name, p.detach()) for name, p in self._tracked(model).items()}
            vectors = [{name: one - self._start[name] for name, one in now.items()}]
        self._start, self._snapshots = {}, None
        if isinstance(self.memory, FlatBasis):
            self.memory.add(vectors)
            return
        for vector in vectors:
            for name, matrix_MN in vector.items():
                self.memory.add(name, matrix_MN, self._count(min(matrix_MN.shape)))

    def _laid_out(self, model: nn.Module, name: str, stored: Tensor) -> Tensor:
        """Return a weight or its gradient as (out, in), or for ``flat``, where any order will do, as it is stored."""
        turned = self.options.form == "matrix" and WRAPPERS[type(model.get_submodule(name))].transposed
        return stored.T if turned else stored

    def _count(self, directions: int) -> int:
        k = self.options.k
        return share_to_count(k, directions) if isinstance(k, float) else min(k, directions)

    def state_dict(self) -> dict[str, Tensor]:
        return self.memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.memory.load_state_dict(state)
