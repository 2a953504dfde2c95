"""A model of its own for every task: the upper bound of what can be learned."""

from __future__ import annotations

from lorica.methods.base import METHODS
from lorica.methods.seqft import SeqFT


@METHODS.register("per-task")
class PerTask(SeqFT):
    """Fine-tune the model that came in on each task alone, as ``seqft`` does on the first.

    An upper bound of plasticity: nothing forgets, since no model learns twice, and how far a method's learning
    accuracy falls short of this one's is the plasticity it gave up. It is no continual learner: there is a model per
    task, and a row can only be answered by who knows which one to ask.
    """

    summary = "upper bound: a separate model for every task"
    stores = "nothing while learning; to be used, a model per task"
    reproduction = "training tested against sequential fine-tuning; no published figure reproduced yet"
    needs_task_id = True
    restarts = True
    bound = True
