"""``lorica demo``: the shipped model learns the shipped stream with and without protection."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from lorica.data.stream import TaskStream, read_stream
from lorica.report import side_by_side, write_report
from lorica.report.text import metrics_table
from lorica.scores import ScoreMatrix
from lorica.sequence import Say, run

MODEL = Path(str(files("lorica"))) / "assets" / "demo_model"
STREAM = Path(str(files("lorica"))) / "benchmarks" / "demo" / "stream.yaml"


def run_demo(output_dir: Path, *, seed: int = 0, say: Say = print) -> Path:
    """Run the demo's stream with every method it has settings for, print what each learned and lost.

    Args:
        output_dir: gets ``<method>/run.json``, ``report.html`` and ``report.md``.
        seed: of the order of the training rows.
        say: takes each line.

    Returns:
        The path of the report.
    """
    stream = read_stream(STREAM)
    transformers_logging.disable_progress_bar()
    say(_introduction(stream))
    records = run(stream, str(MODEL), output_dir, seed=seed, say=say)
    page = write_report([output_dir / name / "run.json" for name in stream.methods], output_dir)
    say("")
    say(_tables(records))
    say(f"\nreport: {page}")
    return page


def _introduction(stream: TaskStream) -> str:
    lines = [stream.description.strip(), "", "The stream, one task after the other:"]
    lines += [f"  {task.name:9} {task.description}" for task in stream.tasks]
    lines += [f"Held out, never trained on: {ability.name} ({ability.description})" for ability in stream.held_out]
    lines += [f"Method: {one.label}, learning rate {one.learning_rate:g}" for one in stream.methods.values()]
    return "\n".join([*lines, ""])


def _tables(records: list[dict[str, Any]]) -> str:
    matrices = {record["label"]: ScoreMatrix.from_json(record) for record in records}
    retention = {record["label"]: record["retention"] for record in records}
    width = shutil.get_terminal_size((100, 24)).columns
    tables = side_by_side(matrices, retention, width=max(80, width))
    return f"Exact match, percent; * is the score right after learning a task\n\n{tables}\n\n" + metrics_table(
        matrices, retention
    ).text(widest=40)
