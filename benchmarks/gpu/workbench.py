"""One part of the suite at work: its clock, its rows, and failures that cost no more than their own row."""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.hardware import Cpu

ROWS = "rows.jsonl"
LONGEST_MESSAGE = 600

Row = dict[str, Any]


class Workbench:
    """What a part gets to work with.

    Attributes:
        job: the part's name, in every row.
        device: the GPU, or the CPU in its place.
        tiny: whether to run the same code on shapes that a CPU does in a second.
        folder: where result files go.
    """

    def __init__(self, job: str, device: Cpu, folder: Path, seconds: float, *, tiny: bool) -> None:
        self.job, self.device, self.folder, self.tiny = job, device, folder, tiny
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that this part still has."""
        return self._end - time.monotonic()

    def measure(self, labels: Row, work: Callable[..., Mapping[str, Any]], *arguments: Any) -> Row | None:
        """Write a row of what ``work(*arguments)`` returns, or of why it failed; return the row unless it failed."""
        start = time.monotonic()
        try:
            values = dict(work(*arguments))
        except Exception as error:
            traceback.print_exc()
            self._write(labels | {"status": "failed", "message": message_of(error)})
            values = None
        self.device.free()  # outside of the handler, whose traceback holds the tensors of the failed work
        if values is None:
            return None
        return self._write(labels | {"status": "ok", "took": time.monotonic() - start} | values)

    def skip(self, labels: Row, reason: str) -> None:
        """Write a row that says why something was not measured."""
        self._write(labels | {"status": "skipped", "message": reason})

    def fits(self, labels: Row, seconds: float, *, share: float | None = None) -> bool:
        """Return whether work of about ``seconds`` fits into what is left (or a share of it); else write why not."""
        left = self.left if share is None else min(self.left, share)
        if seconds <= left:
            return True
        self.skip(labels, f"needs about {seconds:.0f} s, {max(left, 0):.0f} s left")
        return False

    def _write(self, row: Row) -> Row:
        row = {"job": self.job} | row
        with (self.folder / ROWS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")
        print(json.dumps(row, default=str), flush=True)
        return row


def message_of(error: BaseException) -> str:
    """Return an error in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text[:LONGEST_MESSAGE]


def read_rows(folder: Path) -> list[Row]:
    """Return the rows so far; a line that was cut off when its part was ended is left out."""
    file = folder / ROWS
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows
