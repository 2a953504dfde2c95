"""``lorica.protect`` a model in place and ``lorica.release`` it again."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from lorica.constrain.bases import SIDES, WIDE, Bases
from lorica.constrain.checkpoint import Weights
from lorica.constrain.kept import KeptBases
from lorica.constrain.linear import WRAPPERS, Aside, SubspaceLayer, matrix_of
from lorica.constrain.origin import check_memory_mode, files_of, lean, on_host
from lorica.constrain.sharded import fold
from lorica.constrain.sharding import Held, split_sharded
from lorica.constrain.targets import check_targets, user_pattern
from lorica.constrain.transport import put_back
from lorica.errors import LoricaError, did_you_mean
from lorica.subspace.basis import Basis
from lorica.subspace.calibration import Progress
from lorica.subspace.orthonormal import complement
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import PlanEntry
from lorica.subspace.sources import Protected

_RECORD = "_lorica_protection"
_NOT_SENT = "_ddp_params_and_buffers_to_ignore"


def protect(
    model: nn.Module,
    plan: Plan,
    *,
    memory: str = "fast",
    progress: Progress | None = None,
    kept: KeptBases | None = None,
) -> nn.Module:
    """Constrain the planned weights in place; from here on any training leaves the protected directions alone.

    Each planned layer is replaced by a ``SubspaceLinear`` that shares its parameters. With nothing protected a layer of
    float32 or float64 stays as it is and trains plainly; a narrower one trains through a float32 core all the
    same (W = W0 + M, rounded once), since most of each small update is lost when it is added in bfloat16.
    Every other parameter is frozen unless ``plan.train_also`` names it; those train in their own dtype.
    The model computes what it did before, bit for bit, and goes into any Trainer or hand-written loop with
    any optimizer; build the optimizer after this call.

    A model that FSDP2 has sharded (``from_pretrained`` with a ``distributed_config``, or ``fully_shard`` by hand) stays
    sharded; all processes have to call this. Of each weight one process makes and keeps the bases.

    Args:
        model: the model that the plan was made for. A model on the meta device gets layers without values: what
            they would take can be counted before anything is loaded.
        plan: from ``lorica.plan`` or ``Plan.load``.
        memory: ``fast``: all on the device of the weight. ``lean``: W0 (for weights of 16 bits also the float32 bases)
            on the host, or where the weight itself is there in a memory map of the file it was loaded from; the
            long-side basis read off the weight. The same constraint, slower steps.
        progress: called as ``progress(name, done, total)`` after each weight's split.
        kept: the bases of an interrupted run that this one goes on with; nothing is split then.

    Returns:
        The same model.

    Raises:
        LoricaError: the plan is empty, does not fit the model or asks for ``block`` (held by the optimizer, not
            by the model: see ``lorica.ConstrainedOptimizer``), ``train_also`` is no pattern or matches nothing,
            ``memory`` is unknown, a weight holds NaN or inf, or ``kept`` is of another model. The model is then
            untouched.
    """
    check_memory_mode(memory)
    put_back(model)
    targets = fitting_targets(model, plan)
    _also_trained(model, plan)
    _check_constraints(plan)
    told = itertools.count(1)

    def tell(name: str) -> None:
        if progress:
            progress(name, next(told), len(plan))

    work = _Wrapping(plan, memory, kept, files_of(model))
    wrapped: dict[str, SubspaceLayer] = {}
    sharded: list[PlanEntry] = []
    for entry in plan.entries:
        module = targets[entry.name]
        constrained = any(entry.protected) or matrix_of(module).dtype not in WIDE
        if constrained and isinstance(module.weight, DTensor):
            sharded.append(entry)
            continue
        if constrained:
            wrapped[entry.name] = work.layer(entry, module)
        tell(entry.name)
    splits = split_sharded(model, sharded, targets, work.held, tell)  # the last of what can go wrong
    free = [name for name in plan.names() if name not in wrapped and name not in splits]
    freeze_all_but(model, plan, [targets[name].get_parameter("weight") for name in free])
    for name, (held, shards) in splits.items():
        wrapped[name] = WRAPPERS[type(targets[name])].wrap_sharded(targets[name], *held, shards)
    _swap(model, {id(targets[name]): layer for name, layer in wrapped.items()})
    _leave_to_each_process(model)
    return model


class _Wrapping:
    """Makes the protected form of one layer after the other."""

    def __init__(self, plan: Plan, memory: str, kept: KeptBases | None, files: Weights | None) -> None:
        self._bases, self._lean, self._files = Bases(plan, memory, kept), memory == "lean", files
        self._asides: dict[Basis, Basis] = {}

    def layer(self, entry: PlanEntry, module: nn.Linear | Conv1D) -> SubspaceLayer:
        sides = self._bases.of(entry, matrix_of(module).detach())
        return WRAPPERS[type(module)].wrap(module, *sides, self._aside(entry, module.weight.detach(), sides))

    def held(self, entry: PlanEntry, weight_MN: Tensor, home: torch.device) -> Held:
        """Return what the owner of a sharded weight keeps of it.

        Args:
            home: where the parts of the weight lie.
        """
        sides = self._bases.of(entry, weight_MN)
        offloaded = home.type != weight_MN.device.type
        aside = on_host(weight_MN, sides, self._asides) if offloaded else self._aside(entry, weight_MN, sides)
        return Held(weight_MN, sides) if aside is None else Held(aside.weight, aside.bases or sides)

    def _aside(self, entry: PlanEntry, weight: Tensor, sides: tuple[Basis, Basis]) -> Aside | None:
        return lean(weight, sides, self._files, f"{entry.name}.weight", self._asides) if self._lean else None


def _check_constraints(plan: Plan) -> None:
    for entry in plan.entries:
        if entry.constraint == "block":
            raise LoricaError(
                f"{entry.name}: constraint 'block' is held by lorica.ConstrainedOptimizer, not by protect"
            )


def freeze_all_but(model: nn.Module, plan: Plan, weights: Sequence[nn.Parameter]) -> None:
    """Freeze every parameter but these weights and what ``plan.train_also`` names; ``release`` undoes it."""
    also = _also_trained(model, plan)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    _, trainable = getattr(model, _RECORD, (None, trainable))  # a second call must not record the first one's flags
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in (*weights, *also):
        parameter.requires_grad_(True)
    bare = plan.with_measured(factors={})  # the bases are made of what was measured, which is as large as they are
    setattr(model, _RECORD, (bare, trainable))


def fitting_targets(model: nn.Module, plan: Plan) -> dict[str, nn.Linear | Conv1D]:
    """Return the modules that a plan names, by name.

    Raises:
        LoricaError: the plan is empty, the model has no such module, or its weight has another shape.
    """
    if not plan.entries:
        raise LoricaError("the plan has no entries: it names no weight to train")
    modules = dict(model.named_modules())
    missing = [name for name in plan.names() if name not in modules]
    if missing:
        raise LoricaError(
            f"the plan names {missing[0]}, which the model does not have.{did_you_mean(missing[0], modules)}"
        )
    targets = {name: modules[name] for name in plan.names()}
    check_targets(model, targets)
    for entry in plan.entries:
        shape = tuple(matrix_of(targets[entry.name]).shape)
        if shape != entry.shape:
            raise LoricaError(f"the plan has {entry.name} as {entry.shape}, the model as {shape}")
    return targets


def _also_trained(model: nn.Module, plan: Plan) -> list[nn.Parameter]:
    constrained = {f"{name}.weight" for name in plan.names()}
    outside = {name: p for name, p in model.named_parameters() if name not in constrained}
    chosen = []
    for pattern in plan.train_also:
        compiled = user_pattern("train_also", pattern)
        hits = [p for name, p in outside.items() if compiled.search(name)]
        if not hits:
            raise LoricaError(f"train_also: {pattern!r} matches no parameter outside the constrained weights")
        chosen += hits
    return chosen


def _swap(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in new:
                setattr(parent, name, new[id(child)])


def release(model: nn.Module) -> nn.Module:
    """Give the plain model back, in place: the same modules, keys, dtype and flags as before ``protect``.

    The weights are the trained ones. Releasing a model that is not protected changes nothing.

    Raises:
        LoricaError: FSDP2 was applied after ``protect``; it cannot be taken off again. The model is untouched.
    """
    if any(layer.taken_over for layer in protected_layers(model).values()):
        raise LoricaError(
            "FSDP2 was applied to the model after lorica.protect and holds its layers; save its state without the "
            "keys that end in .core, or load the model sharded before lorica.protect (docs/distributed.md)"
        )
    put_back(model)
    sharded = [layer for layer in protected_layers(model).values() if layer.shards is not None]
    fold(sharded)  # what was written to their cores otherwise than by an optimizer
    layers = {id(module): module.unwrap() for module in model.modules() if isinstance(module, SubspaceLayer)}
    _swap(model, layers)
    if hasattr(model, _RECORD):
        _, trainable = getattr(model, _RECORD)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)
        delattr(model, _RECORD)
        if hasattr(model, _NOT_SENT):
            delattr(model, _NOT_SENT)
    return model


def _leave_to_each_process(model: nn.Module) -> None:
    """Keep W0 and the bases, which every process has, out of what DDP sends before each forward pass."""
    layers = protected_layers(model)
    names = [f"{name}.{buffer}" for name, layer in layers.items() for buffer, _ in layer.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def protected_layers(model: nn.Module) -> dict[str, SubspaceLayer]:
    """Return the protected layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SubspaceLayer)}


def bases_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the bases of all protected layers, as exact as they are held, by the names that ``kept`` looks for.

    Of layers that FSDP2 has sharded only those that this process owns.
    """
    return {
        f"{name}.{side}.{leaf}": tensor
        for name, layer in protected_layers(model).items()
        for side, basis in zip(SIDES, layer.exact_bases, strict=True)
        for leaf, tensor in basis.named_buffers()
    }


def protected_of(layer: SubspaceLayer) -> Protected:
    """Return the directions that a layer's bases leave out, which is what was protected when they were made.

    They are on the device that computes.

    Raises:
        LoricaError: another process owns the bases.
    """
    layer.check_owned()
    matrix = layer.matrix
    device = torch.device(matrix.device_mesh.device_type) if isinstance(matrix, DTensor) else matrix.device
    origin_MN = layer.base.to(device)
    u_MA, v_NB = (
        complement(basis.on(weight).matrix().double().to(device)) if basis.free < basis.dim
        else torch.zeros(basis.dim, 0, dtype=torch.float64, device=device)
        for basis, weight in zip(layer.exact_bases, (origin_MN, origin_MN.T), strict=True)
    )  # fmt: skip
    return Protected(u_MA, v_NB)


def plan_of(model: nn.Module) -> Plan | None:
    """Return the plan a model is protected by, without what was measured for it, or None."""
    record = getattr(model, _RECORD, None)
    return None if record is None else record[0]
