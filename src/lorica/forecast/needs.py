"""What one way of training needs in each phase of a run: memory of the device and of the host, and disk."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from lorica.constrain.audit_weight import rounding_share
from lorica.constrain.linear import SubspaceLayer
from lorica.constrain.protect import bases_of, protected_layers
from lorica.forecast.dry_run import Step
from lorica.forecast.ledger import Ledger
from lorica.forecast.measuring import DIRECTIONS, MOMENTS, REHEARSED, Measuring
from lorica.forecast.rates import CONTEXT, Machine
from lorica.subspace.linalg import ROWS
from lorica.subspace.store import WORTHWHILE, SplitStore

PROCESS, WORKSPACE, FREED = "process", "float64 workspace", "freed, not given back"
HELD = ("weights", "W0", "bases", "curvature", "cores")
"""What is there from the split on."""

PHASES = ("load", "measure", "split", "score", "train", "audit", "save")


_Held = tuple[str, Mapping[str, int], Mapping[str, int]]


@dataclass(frozen=True)
class Phase:
    """The most that one phase of a run holds at once.

    Attributes:
        device: bytes of the device's memory, by kind. Of a CPU everything is here.
        host: bytes of the host's memory beside a GPU, by kind.
    """

    name: str
    device: Mapping[str, int]
    host: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "device_bytes": dict(self.device), "host_bytes": dict(self.host)}


def phases(
    step: Step, splitting: int, auditing: int, machine: Machine, scoring: Mapping[str, int] | None = None,
    measuring: Measuring | None = None,
) -> list[Phase]:  # fmt: skip
    """Return what each phase holds.

    - load: the weights; beside a GPU they pass through the host.
    - measure: the weights, the sums over what the model is shown, and a pass over a part of it; or what is made of the
      largest sum.
    - split: what is there from the split on, what was measured, and the float64 matrices of the largest weight.
    - score: a batch of the rows that are scored before and after, if any are.
    - train: the peak of a step. On the CPU under Linux also what ``malloc`` holds of freed activations, which is as
      much again as were alive at once in pieces below 32 MB (measured: 0.9 to 1.25 of it), or what measuring left.
    - audit: the float64 matrices of the largest weight's proof, after training.
    - save: what is there still; beside a GPU the weights pass through the host.

    Args:
        step: of ``dry_step``.
        splitting, auditing: of ``split_workspace`` and ``audit_workspace`` for the largest weight.
        scoring: of ``dry_score``.
        measuring: of ``dry_measure``, where something is measured.
    """
    held = {kind: step.steady[kind] for kind in HELD if step.steady[kind]}
    weights = {"weights": step.steady["weights"]}
    keeps = machine.device == "cpu" and sys.platform == "linux"
    left = 2 * measuring.small if measuring and keeps else 0  # what was alive, and as much again
    heap = {FREED: max(step.small, left)} if keeps else {}
    training = {kind: n for kind, n in step.peak.items() if n > 0}
    training |= {FREED: max(step.small, left - step.small)} if keeps else {}
    there = dict(step.host) | ({REHEARSED: measuring.rehearsed} if measuring and measuring.rehearsed else {})
    found: list[_Held] = [("load", weights, weights)]
    more: dict[str, int] = {}
    if measuring and measuring.peak:
        found.append(("measure", _measured(weights, measuring, keeps=keeps), there))
        more = {DIRECTIONS: measuring.directions, FREED: left}
    found.append(("split", held | {WORKSPACE: splitting} | {kind: n for kind, n in more.items() if n}, there))
    found += [("score", {kind: n for kind, n in scoring.items() if n > 0}, there)] if scoring is not None else []
    found += [("train", training, there), ("audit", held | {WORKSPACE: auditing} | heap, there)]
    found.append(("save", held | heap, there | weights))
    return [_phase(name, device, host, machine) for name, device, host in found]


def _measured(weights: Mapping[str, int], measuring: Measuring, *, keeps: bool) -> dict[str, int]:
    """Return the more of both: the passes, and the largest sum's directions in the making beside all sums."""
    passes = {kind: n for kind, n in measuring.peak.items() if n > 0} | ({FREED: measuring.small} if keeps else {})
    making = {**weights, MOMENTS: measuring.peak[MOMENTS], WORKSPACE: measuring.workspace}
    return max(passes, making, key=lambda kinds: sum(kinds.values()))


def _phase(name: str, device: Mapping[str, int], host: Mapping[str, int], machine: Machine) -> Phase:
    process = {PROCESS: machine.process}
    if machine.device != "cpu":
        return Phase(name, {PROCESS: CONTEXT[machine.device], **device}, process | dict(host))
    # Through the host is no way to go on a CPU, but what was set aside lies in the same memory.
    aside = {} if name == "load" else {kind: n for kind, n in host.items() if kind != "weights"}
    return Phase(name, process | dict(Counter(device) + Counter(aside)), {})


def split_workspace(m: int, n: int, k: int) -> int:
    """Return the bytes of float64 that the split of one weight and its bases take at once.

    First the Gram matrix, its eigenvectors and as much again inside the eigensolver, beside some rows; then all
    vectors of the short side, k of each side, and the larger basis in the making: three K-column pieces of a reflector,
    or what an explicit complement is made of.
    """
    short, long = min(m, n), max(m, n)
    eigen = 4 * short**2 + 2 * min(ROWS, long) * short
    basis = max(3 * d * k if k < d - k else 2 * d * k + d * d + 2 * d * (d - k) for d in (m, n))
    return 8 * max(eigen, short**2 + (short + long) * k + basis)


def protected_directions(layer: SubspaceLayer) -> int:
    """Return how many directions of a layer are protected, of the side that has more."""
    return max(basis.dim - basis.free for basis in (layer.out_basis, layer.in_basis))


def audit_workspace(m: int, n: int, k: int) -> int:
    """Return the bytes that ``audit_weight`` takes at once beside the weights.

    The change before rounding is there throughout: while the directions are computed anew, and then with the change
    in float64, the directions, what they have in common, and the rows that ``rounding_share`` looks at (a dry run).
    """
    weight = torch.empty(m, n, device="meta")
    with Ledger() as ledger:
        rounding_share(weight, weight)
    proof = 8 * (m * n + (m + n) * k + k * n) + ledger.peak.total()
    return weight.nbytes + max(split_workspace(m, n, k), proof)


def largest(workspace: Callable[[int, int, int], int], model: Any) -> int:
    """Return a workspace of the weight of a protected model that takes most."""
    return max(
        (
            workspace(layer.out_basis.dim, layer.in_basis.dim, protected)
            for layer in protected_layers(model).values()
            if (protected := protected_directions(layer))
        ),
        default=0,
    )


@dataclass(frozen=True)
class Disk:
    """Bytes on disk.

    Attributes:
        model: the output model, with what it carries to the next update.
        checkpoint: one checkpoint.
        kept: how many checkpoints are there at once, while the last of them is written.
        lasting: how many of them are left when the model is written.
        bases: what the weights were split into, once for all checkpoints.
        cache: the splits that are kept for the next run, as far as the cache may grow.
    """

    model: int
    checkpoint: int
    kept: int
    lasting: int
    bases: int
    cache: int

    @property
    def checkpoints(self) -> int:
        """The most that checkpoints take."""
        return self.kept * self.checkpoint

    @property
    def output(self) -> int:
        """The most that the output folder takes."""
        return self.bases + max(self.checkpoints, self.lasting * self.checkpoint + self.model)

    def to_json(self) -> dict[str, int]:
        return {
            "model_bytes": self.model,
            "checkpoint_bytes": self.checkpoints,
            "bases_bytes": self.bases,
            "split_cache_bytes": self.cache,
        }


def disk(
    model: Any, step: Step | None, arguments: TrainingArguments, steps: int | None, *, in_parts: bool = False,
    remembered: float = 0.0,
) -> Disk:  # fmt: skip
    """Return what a run writes.

    Args:
        model: on the meta device; protected if there is a step.
        step: of ``dry_step``; without it the least that any method writes.
        steps: how many the run has, if that is known.
        in_parts: checkpoints hold what trains alone.
        remembered: what is carried to the next update takes at most so many times the protected weights.
    """
    weights = step.steady["weights"] if step else sum(p.nbytes for p in model.parameters())
    cores = step.steady["cores"] if step else 0
    states = step.steady["optimizer states"] if step and not arguments.save_only_model else 0
    limit = arguments.save_total_limit if (arguments.save_total_limit or 0) > 0 else None
    if limit is not None and arguments.load_best_model_at_end:
        limit = max(limit, 2)  # the best one and the newest
    written = _checkpoints(arguments, steps)
    if written is None:  # not known: as many as are kept, or at least two
        written = (limit or 1) + 1
    lasting = min(written, limit or written)
    split = bases_of(model) if lasting and not arguments.save_only_model else {}
    bases = sum({id(tensor): tensor.nbytes for tensor in split.values()}.values())
    bases += step.steady["curvature"] if step and split else 0
    saved = weights + round(remembered * sum(layer.matrix.nbytes for layer in protected_layers(model).values()))
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    held = trained if in_parts else weights + cores
    return Disk(saved, held + states, min(written, lasting + 1), lasting, bases, _cache(model))


def _checkpoints(arguments: TrainingArguments, steps: int | None) -> int | None:
    """Return how many checkpoints a run writes; None where that is not known."""
    if arguments.save_strategy == "no":
        return 0
    if arguments.save_strategy == "steps" and steps is not None:
        every = arguments.save_steps if arguments.save_steps >= 1 else max(1, round(arguments.save_steps * steps))
        return -(-steps // int(every))
    epochs = arguments.save_strategy == "epoch" and arguments.max_steps <= 0
    return math.ceil(arguments.num_train_epochs) if epochs else None


def _cache(model: Any) -> int:
    """Return the bytes of a float64 matrix of the short side for each weight that is split."""
    store = SplitStore.from_environment()
    if store.folder is None:
        return 0
    sides = [min(layer.matrix.shape) for layer in protected_layers(model).values() if protected_directions(layer)]
    return min(sum(8 * (s * s + s) for s in sides if s >= WORTHWHILE), store.limit)
