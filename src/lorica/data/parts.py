"""Work on rows in parts, where memory runs out with all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache

from lorica.errors import LoricaError

Row = TypeVar("Row")
Result = TypeVar("Result")

_SAID = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What the allocator of the CPU says, a driver, and the library of matrix products."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an accelerator, or torch's allocator for the CPU, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in _SAID)


@contextmanager
def told_of_memory(message: Callable[[], str]) -> Iterator[None]:
    """Raise a LoricaError with this message where memory runs out in here."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise LoricaError(f"memory ran out {message()}") from None


def in_parts(
    work: Callable[[Sequence[Row]], list[Result]], rows: Sequence[Row], *, in_step: bool = False
) -> list[Result]:
    """Return ``work(rows)``; where memory runs out, the results of both halves, one after the other.

    For work whose result of a row hangs on that row alone. It may return anything that can be joined: a result for
    each row, or one for all.

    Args:
        in_step: other processes take part in the work and would not know of the halves: there are none.

    Raises:
        LoricaError: memory runs out with one row, or with all where there are no halves.
    """
    results = _attempt(work, rows)
    if results is not None:
        return results
    if in_step:
        raise LoricaError(
            f"memory ran out in scoring, with {len(rows)} rows at a time, and the processes of a sharded model have "
            "gone on with them; lower --per_device_eval_batch_size"
        )
    if len(rows) == 1:
        raise LoricaError(
            "memory ran out in scoring, with one row at a time; a lower --max_length or --max_new_tokens, or narrower "
            "weights (--dtype bfloat16), need less"
        )
    clear_device_cache(garbage_collection=True)
    middle = len(rows) // 2
    return in_parts(work, rows[:middle]) + in_parts(work, rows[middle:])


def _attempt(work: Callable[[Sequence[Row]], list[Result]], rows: Sequence[Row]) -> list[Result] | None:
    """Return None where memory ran out; the error, whose frames hold what filled it, is gone then."""
    try:
        return work(rows)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None
