"""The micro-batches of a step: as they come, or in parts where they do not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from lorica.data.parts import is_out_of_memory
from lorica.errors import LoricaError
from lorica.methods.base import Method
from lorica.methods.task import Collate, Rows
from lorica.training.rows import NUMBER, where
from lorica.training.states import random_state, set_random_state

Pass = Callable[[dict[str, Any], int | None], Tensor]
"""Forward and backward pass of a batch, to its loss. Of a part of a micro-batch, given how many labels are trained in
the whole micro-batch, the loss is that part's share of the whole's."""


class MicroBatches:
    """Runs the micro-batches of one step after the other, in halves from the first time that memory runs out.

    A pass that breaks off may leave a part of its gradients behind. So all gradients of the step are dropped, the
    random state and what the method has gathered are set to those of the step's beginning, and every micro-batch of
    the step so far is run again, in parts of half as many rows. A step stays what it was: the same rows, each with the
    same weight in the loss. The result is that of a run with the smaller micro-batches and as much more accumulation
    from the start.

    How small the parts are is no part of a checkpoint: a resumed run tries whole micro-batches first.

    Args:
        rows: the dataset.
        collate: makes a batch of its rows.
        count: tells how many of a batch's labels are trained.
        size: rows of a micro-batch.
        once: why a step cannot be run again; None: it can.
        method: what it has gathered is taken back where a step is run again.
        tell: takes a notice.
    """

    def __init__(
        self,
        rows: Rows,
        collate: Collate,
        count: Callable[[Tensor], Tensor],
        size: int,
        *,
        once: str | None,
        method: Method,
        tell: Callable[[str], None],
    ) -> None:
        self.rows, self.collate, self.count, self.tell = rows, collate, count, tell
        self.method = method
        self.size = self.most = size
        self.once = once
        self.step, self.begun = 0, 0
        self.numbers: list[list[int]] = []
        self._running: list[int] = []
        self._random: dict[str, Any] = {}
        self._gathered: Any = None

    def begin_step(self, step: int, batches: Sequence[dict[str, Any]]) -> None:
        """Take the numbers of the rows out of the micro-batches of a step."""
        self.step, self.begun = step, 0
        self.numbers = [batch.pop(NUMBER) for batch in batches]

    @property
    def current(self) -> list[int]:
        """The rows of the micro-batch that was begun last."""
        return self.numbers[self.begun - 1]

    @property
    def whole_step(self) -> list[int]:
        """The rows of all micro-batches of the step."""
        return [number for numbers in self.numbers for number in numbers]

    def run(self, batch: dict[str, Any], one_pass: Pass, drop_gradients: Callable[[], None]) -> Tensor:
        """Run the next micro-batch of the step and return its loss.

        Raises:
            LoricaError: a row does not fit by itself, or the step cannot be run again.
        """
        if self.begun == 0:  # not earlier: a resumed run sets it after the batches are there
            self._random, self._gathered = random_state(), self.method.training_state()
        self.begun += 1
        loss = self._attempt([self.current], one_pass, batch)
        while loss is None:
            self._halve()
            drop_gradients()
            clear_device_cache(garbage_collection=True)
            set_random_state(self._random)
            self.method.load_training_state(self._gathered)
            loss = self._attempt(self.numbers[: self.begun], one_pass)
        return loss

    def _attempt(
        self, micro_batches: Sequence[list[int]], one_pass: Pass, batch: dict[str, Any] | None = None
    ) -> Tensor | None:
        """Return the loss of the last of these micro-batches, None where memory ran out.

        The error, whose frames hold what filled the memory, is gone when this returns.
        """
        try:
            return [self._in_parts(numbers, one_pass, batch) for numbers in micro_batches][-1]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _in_parts(self, numbers: list[int], one_pass: Pass, batch: dict[str, Any] | None) -> Tensor:
        if len(numbers) <= self.most:
            self._running = numbers
            return one_pass(batch or self._made(numbers), None)
        parts = [numbers[start : start + self.most] for start in range(0, len(numbers), self.most)]
        batches = [self._made(part) for part in parts]
        trained = sum(int(self.count(part["labels"])) for part in batches)
        losses = []
        for self._running, part in zip(parts, batches, strict=True):
            losses.append(one_pass(part, trained))
        return torch.stack(losses).sum()

    def _made(self, numbers: list[int]) -> dict[str, Any]:
        return self.collate([self.rows[number] for number in numbers])

    def _halve(self) -> None:
        rows = len(self._running)
        if self.once is not None:
            raise LoricaError(
                f"memory ran out at step {self.step}, with {rows} rows at a time; {self.once}, so the rows cannot be "
                "run in smaller parts: lower --per_device_train_batch_size"
            )
        if rows == 1:
            place, length = where(self.rows, self._running[0]), len(self.rows[self._running[0]]["input_ids"])
            raise LoricaError(
                f"{place}: memory ran out at step {self.step} with this row alone, of {length} tokens; lower "
                "--max_length, or spend less memory: --activation_checkpointing true, --memory_mode lean, --dtype "
                "bfloat16"
            )
        self.most = -(-rows // 2)
        self.tell(
            f"memory ran out at step {self.step} with {rows} rows at a time; from this step on at most {self.most} are "
            f"run at a time, and accumulated to as many rows a step as before. A resumed run tries {self.size} again"
        )
