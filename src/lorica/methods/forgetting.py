"""Forgetting, foreseen and measured: how far a task moves what the model predicts on text of its own.

Shape suffixes: M outputs, N inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from lorica import processes
from lorica.errors import LoricaError
from lorica.methods.rehearsal import LOGITS, Rehearsal
from lorica.subspace.calibration import LENGTH, Progress, evaluating, own_text
from lorica.subspace.factor import Factors
from lorica.subspace.plan_entry import PlanEntry
from lorica.subspace.prediction import Outlook, both_factors, expected_divergence, kind_of
from lorica.subspace.sources import Protected

NEEDED_BY, INSTEAD = "predict_forgetting", "leave it out"
"""What the errors of a model that writes no text name, and what they say to do."""

TOKENS = 8192
"""So many tokens the text has that forgetting is measured on."""

ASIDE = 2**40
"""Added to the seed of that text; what calibrates and what is rehearsed are of smaller ones."""


class Change(NamedTuple):
    """A weight before and after its training, both as they are stored, and what was protected in it."""

    entry: PlanEntry
    before_MN: Tensor
    after_MN: Tensor
    directions: Protected


@dataclass(frozen=True)
class Forgetting:
    """How far a finished task was to move the predictions, and did, in nats per token.

    Attributes:
        predicted: ``sum tr(B D A D^T) / 2`` over the weights, D what training changed in each.
        measured: mean KL(p || q) on other text, p before the task and q after it; see ``Prediction.divergence``.
        tokens: how many predictions that is the mean of.
        by_kind: the parts of ``predicted``, by kind of layer.
        shares: what the plan left open, see ``Outlook.to_json``.
    """

    predicted: float
    measured: float
    tokens: int
    by_kind: dict[str, float]
    shares: dict[str, Any]

    def told(self) -> str:
        """Return it as a line."""
        return (
            f"forgetting: predictions on the model's own text moved by {self.measured:.3g} nats per token, "
            f"{self.predicted:.3g} were expected ({self.tokens:,} tokens)"
        )


@dataclass(frozen=True)
class Foresight:
    """What is taken down of a model before a task, so that its forgetting can be foreseen and measured after it.

    Attributes:
        factors: A and B of each weight on the text that calibrates, on the CPU; together no larger than the weights.
        aside: other text, with what was predicted there.
    """

    factors: dict[str, Factors]
    aside: Rehearsal

    @classmethod
    def of(cls, model: Any, entries: Sequence[PlanEntry], seed: int, progress: Progress | None = None) -> Self:
        """Let a plain causal model write text and look at it there.

        Args:
            model: before the task.
            entries: of the plan, of any source.
            seed: another one for each task.
            progress: is told of what is written and measured.

        Raises:
            LoricaError: the model writes no text, or processes share it.
        """
        if processes.in_step(model):
            raise LoricaError(f"{NEEDED_BY} is not for a model that several processes share; {INSTEAD}")
        writing = partial(own_text, model, needed_by=NEEDED_BY, instead=INSTEAD, progress=progress)
        text = writing()
        weights = [model.get_submodule(entry.name).get_parameter("weight") for entry in entries]
        factors = both_factors(model, entries, text, sum(weight.nbytes for weight in weights), progress)
        other = writing(tokens=TOKENS, seed=ASIDE + seed)
        return cls(factors, Rehearsal.of(model, other, ratio=1.0, weight=1.0))

    def outcome(self, model: Any, changes: Iterable[Change]) -> Forgetting:
        """Return what became of it.

        Args:
            model: after the task.
            changes: of every weight.
        """
        moved: dict[str, float] = {}
        outlooks = []
        for entry, before_MN, after_MN, directions in changes:
            factors, kind = self.factors[entry.name], kind_of(entry.name)
            delta_MN = after_MN.double() - before_MN.to(after_MN.device).double()
            moved[kind] = moved.get(kind, 0.0) + expected_divergence(factors, delta_MN)
            outlooks.append(Outlook.of(factors, directions, entry.constraint))
        tokens = self.aside.positions
        shares = Outlook.together(outlooks).to_json()
        return Forgetting(sum(moved.values()), self._divergence(model) / tokens, tokens, moved, shares)

    def _divergence(self, model: Any) -> float:
        """Return the sum over the predictions of the text set aside."""
        rows = max(1, LOGITS // (LENGTH * model.get_input_embeddings().num_embeddings))
        indices = list(range(len(self.aside.texts)))
        with torch.no_grad(), evaluating(model):
            parts = (self.aside.divergence(model, indices[at : at + rows]) for at in range(0, len(indices), rows))
            return sum(float(part.double().sum()) for part in parts)
