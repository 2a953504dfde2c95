"""Experience replay: keep a share of every task's rows and train on them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from lorica.methods.base import METHODS, Targets
from lorica.methods.seqft import SeqFT
from lorica.methods.task import Row, Rows, TaskData

_PREFIX, _TASK, _LENGTHS = "rows.", "task", ".lengths"


@dataclass(frozen=True)
class ReplayOptions(Targets):
    """Options of ``replay``.

    Attributes:
        ratio: share of each task's training rows that is kept, 0 to 1; 0.1 as in TRACE, 0.01 to 0.02 elsewhere.
    """

    ratio: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio = {self.ratio} is out of range: a share from 0 to 1")


@METHODS.register("replay")
class Replay(SeqFT):
    """Experience replay: each task trains on its own rows and on all rows kept of the tasks before it.

    Of n rows ``round(ratio * n)`` are kept, at least one unless ``ratio`` is 0, drawn without replacement by the
    task's seed (TRACE keeps the first 10 %, and adds general instructions, which this does not). They are appended
    to the new rows, and the Trainer shuffles them all: an epoch of a later task has more steps. With ``ratio`` 0 it
    is sequential fine-tuning; with 1 it still trains on the tasks in order, unlike ``joint``.

    The state holds token ids, so whoever has it can read the rows.

    Source:
        Rolnick et al. 2019, arXiv 1811.11682; TRACE, arXiv 2310.06762.
    """

    options_type = ReplayOptions
    summary = "sequential fine-tuning on the new rows and a share of all earlier tasks' rows"
    stores = "a share of every task's training rows, as token ids; grows with the tasks"
    reproduction = "kept and replayed rows tested one by one; no published figure reproduced yet"
    needs_old_data = True

    def __init__(self, options: ReplayOptions) -> None:
        super().__init__(options)
        self._kept = StoredRows({})

    def training_data(self, task: TaskData) -> Rows:
        return ConcatDataset([task.rows, self._kept]) if len(self._kept) else task.rows

    def end_task(self, model: nn.Module, task: TaskData) -> None:
        total = len(task.rows)  # type: ignore[arg-type]
        size = max(round(self.options.ratio * total), 1) if self.options.ratio > 0 else 0
        new = pack([task.rows[index] for index in task.sample(size)], task.index)
        self._kept = StoredRows(joined(self._kept.tensors, new))
        super().end_task(model, task)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{_PREFIX}{name}": tensor for name, tensor in self._kept.tensors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._kept = StoredRows({key.removeprefix(_PREFIX): tensor for key, tensor in state.items()})


class StoredRows(Dataset[Row]):
    """Rows of any lengths in a few flat int32 tensors.

    Attributes:
        tensors: for each field of a row its values end to end and, under ``<field>.lengths``, how many each row
            has; a field that is a number rather than a list (a classifier's label) has no lengths. Under ``task``
            the index of the task that each row is from. Empty where there are no rows.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self._fields = [name for name in self.tensors if name != _TASK and not name.endswith(_LENGTHS)]
        lengths = {name: self.tensors.get(name + _LENGTHS) for name in self._fields}
        self._ends = {name: size.cumsum(0).tolist() for name, size in lengths.items() if size is not None}

    def __len__(self) -> int:
        return len(self.tensors[_TASK]) if self.tensors else 0

    def __getitem__(self, index: int) -> Row:
        return {name: self._value(name, index) for name in self._fields}

    def where(self, index: int) -> str:
        """Return where a row comes from."""
        return f"row {index} of those kept, of task {int(self.tensors[_TASK][index])}"

    def _value(self, name: str, index: int) -> Any:
        if name not in self._ends:
            return self.tensors[name][index].item()
        ends = self._ends[name]
        return self.tensors[name][ends[index - 1] if index else 0 : ends[index]].tolist()


def pack(rows: Sequence[Row], task_index: int) -> dict[str, Tensor]:
    """Return rows as the tensors of ``StoredRows``; empty for no rows."""
    if not rows:
        return {}
    tensors = {_TASK: torch.full((len(rows),), task_index, dtype=torch.int32)}
    for name in rows[0]:
        values: list[Any] = [row[name] for row in rows]
        if isinstance(values[0], list):
            tensors[name + _LENGTHS] = torch.tensor([len(value) for value in values], dtype=torch.int32)
            values = [number for value in values for number in value]
        tensors[name] = torch.tensor(values, dtype=torch.int32)
    return tensors


def joined(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of both sets of rows, the old ones first."""
    if not old or not new:
        return dict(old or new)
    return {name: torch.cat([old[name], new[name]]) for name in old}
