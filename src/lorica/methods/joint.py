"""All tasks at once: the upper bound of what one model can hold."""

from __future__ import annotations

from torch.utils.data import ConcatDataset

from lorica.errors import LoricaError
from lorica.methods.base import METHODS
from lorica.methods.seqft import SeqFT
from lorica.methods.task import Rows, TaskData


@METHODS.register("joint")
class Joint(SeqFT):
    """Fine-tune once, at the last task, on the rows of all tasks together (multi-task learning, MTL).

    The upper bound that needs every old row: nothing is learned one after the other, so nothing is overwritten.
    Until the last task the model stays as it came in.
    """

    summary = "upper bound: one model trained on the rows of all tasks together"
    stores = "nothing; the rows of every task must still be there"
    reproduction = "training tested against sequential fine-tuning on the same rows; no published figure reproduced yet"
    needs_old_data = True
    bound = True

    def learns(self, task: TaskData) -> bool:
        return task.index == task.count - 1

    def training_data(self, task: TaskData) -> Rows:
        if len(task.earlier) != task.index:
            raise LoricaError(
                f"joint needs the rows of all {task.index} tasks before {task.name!r} and got those of "
                f"{len(task.earlier)}; run it on a whole stream"
            )
        return ConcatDataset([*task.earlier, task.rows])
