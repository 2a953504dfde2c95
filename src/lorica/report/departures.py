"""Where our runs depart from the benchmark whose name they bear; none of ours is like for like then."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from lorica.errors import LoricaError
from lorica.report.notices import left_out, limits_told
from lorica.report.parts import flat
from lorica.report.records import RunRecord, _Part
from lorica.report.replicates import MethodRuns
from lorica.units import listed

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FILE_NAME = "protocol.json"


class Protocol(_Part):
    """What a benchmark's published figures were made on.

    Attributes:
        rows: how many a file of the benchmark has, by task and part ("train", "test").
        beside: what a reader must know of our protocol beside theirs, a sentence.
    """

    rows: dict[str, dict[str, int]] = Field(default_factory=dict)
    beside: str = ""


def benchmark_file(stream: str, name: str, folder: Path = BENCHMARKS) -> Path | None:
    """Return a file of one of our benchmarks; None where it is none of ours or has no such file."""
    found = next((child / name for child in sorted(folder.iterdir()) if child.name == stream), None)
    return found if found is not None and found.is_file() else None


def read_protocol(stream: str, folder: Path = BENCHMARKS) -> Protocol:
    """Return the protocol of a benchmark, an empty one where there is no file of it.

    Raises:
        LoricaError: the file is not what it should be.
    """
    file = benchmark_file(stream, FILE_NAME, folder)
    if file is None:
        return Protocol()
    try:
        return Protocol.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, ValidationError) as error:
        raise LoricaError(f"{file}: not a protocol: {str(error).splitlines()[0]}") from None


def departures(
    methods: Sequence[MethodRuns], orders: Sequence[str] = (), protocol: Protocol | None = None
) -> list[str]:
    """Return where our runs depart from their benchmark, each in a few words.

    Args:
        orders: of the benchmark; every method has to have run in each.
        protocol: of the benchmark, for the numbers of its rows.
    """
    cells = [cell for one in methods for cell in one.cells]
    found = [f"without {listed(names)}"] if (names := left_out(methods)) else []
    found += limits_told(methods)
    found += [f"training settings of our own: {told}" for told in dict.fromkeys(_training(cells))]
    if any(_run(cell).get("stream", cell.stream) != cell.stream for cell in cells):
        found.append("a stream file of our own")
    found += _rows(cells, protocol or Protocol())
    if missing := [order for order in orders if any(order not in one.orders for one in methods)]:
        found.append(f"not in order {listed(missing)}")
    return found


def _run(cell: RunRecord) -> dict[str, Any]:
    run = cell.config.get("run")
    return run if isinstance(run, dict) else {}


def _training(cells: Sequence[RunRecord]) -> Iterator[str]:
    """Yield TrainingArguments over what the stream says: those of the run, and those of a method's settings."""
    for cell in cells:
        for part in (_run(cell), cell.config.get("settings")):
            training = part.get("training") if isinstance(part, dict) else None
            if isinstance(training, dict) and training:
                yield flat(training)


def _rows(cells: Sequence[RunRecord], protocol: Protocol) -> list[str]:
    """Return what is not as in the benchmark's own files, and whether a new head answers in place of words."""
    parts = [(task, part, told) for cell in cells for task in cell.tasks for part, told in _parts(cell, task)]
    numbers: dict[str, dict[str, None]] = {}
    for task, part, told in parts:
        read, expected = told.get("rows_read"), protocol.rows.get(task, {}).get(part)
        if None not in (read, expected) and read != expected:
            numbers.setdefault(f"{read} {part} rows instead of {expected}", {})[task] = None
    from_hub = list(dict.fromkeys(task for task, _, told in parts if told.get("from_hub")))
    found = [f"{told} in {listed(list(tasks))}" for told, tasks in numbers.items()]
    found += [f"rows of the hub, not the benchmark's own: {listed(from_hub)}"] if from_hub else []
    if any(told.get("loss") == "class" for _, _, told in parts):
        found.append("a classification head in place of written answers")
    return found


def _parts(cell: RunRecord, task: str) -> list[tuple[str, dict[str, Any]]]:
    parts = cell.data.get(task)
    return [(part, told) for part, told in parts.items() if isinstance(told, dict)] if isinstance(parts, dict) else []
