"""What OSFT carries from task to task: directions that were learned in, and what finished tasks were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorica.constrain.linear import matrix_of
from lorica.errors import LoricaError
from lorica.methods.protection import Protection
from lorica.subspace.calibration import Batch
from lorica.subspace.learned import LearnedDirections
from lorica.subspace.measure import Wanted, measure
from lorica.subspace.memory import FactorMemory, memory_rank
from lorica.subspace.plan_entry import PlanEntry

LEARNED, TASKS = "learned.", "tasks."
"""What the names in the state begin with."""

LONGEST = "longest"
"""Name in the state."""


class Carried:
    """The memory of OSFT, of the same size after ten tasks as after one; empty where no option asks for any.

    Attributes:
        learned: the directions that finished tasks changed most, with ``protect_learned``.
        tasks: the second moments of what finished tasks were, with ``remember_tasks``.
        longest: tokens of the longest row of finished tasks, see ``extent_of``, with ``remember_tasks`` or
            ``rehearse_length`` auto; 0: not known.
    """

    def __init__(self, asked: Protection) -> None:
        self.asked = asked
        self.learned = LearnedDirections(asked.protect_learned or 0.0)
        self.tasks = FactorMemory()
        self.longest = 0

    def add_task(self, model: nn.Module, entries: Sequence[PlanEntry], batches: Sequence[Batch]) -> None:
        """Fold what a finished task's inputs and gradients are into the memory of tasks.

        Args:
            model: plain, with what it has learned.
            entries: of the plan.
            batches: rows of the task.
        """
        layers = {entry.name: model.get_submodule(entry.name) for entry in entries}
        weights = [matrix_of(layer) for layer in layers.values()]
        outputs = any(entry.source == "curvature" for entry in entries)
        dims = [dim for m, n in (weight.shape for weight in weights) for dim in ((m, n) if outputs else (n,))]
        rank = memory_rank(dims, self.asked.remember_size * sum(weight.nbytes for weight in weights))
        wanted = {one.name: Wanted(one.shape, inputs=rank, outputs=rank if outputs else None) for one in entries}
        self.tasks.fold(measure(model, layers, batches, wanted), rank)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all of it, tensors by name."""
        learned = {LEARNED + name: tensor for name, tensor in self.learned.state_dict().items()}
        longest = {LONGEST: torch.tensor(self.longest)} if self.longest else {}
        return learned | {TASKS + name: tensor for name, tensor in self.tasks.state_dict().items()} | longest

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what an earlier ``state_dict`` returned.

        Raises:
            LoricaError: it holds what an option remembers that is not set here, and so would be lost.
        """
        learned = _part(state, LEARNED)
        if learned and self.asked.protect_learned is None:
            raise LoricaError(
                "finished tasks were learned with protect_learned, and what they learned would now be open to change: "
                "set protect_learned, or 0 to give it up"
            )
        tasks = _part(state, TASKS)
        if tasks and not self.asked.remember_tasks:
            raise LoricaError(
                "finished tasks were learned with remember_tasks, and what they were would now be forgotten: "
                "set remember_tasks (for every source but weight), or remove the folder memory beside the model to "
                "give it up"
            )
        if self.asked.protect_learned:
            self.learned.load_state_dict(learned)
        self.tasks.load_state_dict(tasks)
        self.longest = int(state.get(LONGEST, 0))


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
