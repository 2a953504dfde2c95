"""``lorica demo``: the shipped model learns the shipped stream with and without protection."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from lorica.benchmarks import find_stream
from lorica.data.stream import TaskStream
from lorica.experiments.story import Say, run
from lorica.report import side_by_side, write_report
from lorica.report.text import metrics_table
from lorica.scores import ScoreMatrix

MODEL = Path(str(files("lorica"))) / "assets" / "demo_model"
METHODS = ("seqft", "osft")
"""The two that the demo shows; the stream has settings for every method."""


def run_demo(output_dir: Path, *, seed: int = 0, say: Say = print) -> Path:
    """Run the demo's stream with and without protection, print what each learned and lost.

    Args:
        output_dir: gets ``<method>/run.json``, ``report.html`` and ``report.md``.
        seed: of the order of the training rows.
        say: takes each line.

    Returns:
        The path of the report.
    """
    stream = find_stream("demo")
    transformers_logging.disable_progress_bar()
    say(_introduction(stream))
    config = {
        "stream": "demo",
        "model_name_or_path": str(MODEL),
        "output_dir": str(output_dir),
        "methods": list(METHODS),
        "seeds": [seed],
    }
    records = run(config, say)
    page = write_report([output_dir / name / "run.json" for name in METHODS], output_dir)
    say("")
    say(_tables(records))
    say(f"\nreport: {page}")
    return page


def _introduction(stream: TaskStream) -> str:
    lines = [stream.description.strip(), "", "The stream, one task after the other:"]
    lines += [f"  {task.name:9} {task.description}" for task in stream.tasks]
    lines += [f"Held out, never trained on: {ability.name} ({ability.description})" for ability in stream.held_out]
    chosen = [stream.methods[name] for name in METHODS]
    lines += [f"Method: {one.title}, learning rate {one.learning_rate:g}" for one in chosen]
    return "\n".join([*lines, ""])


def _tables(records: list[dict[str, Any]]) -> str:
    matrices = {record["label"]: ScoreMatrix.from_json(record) for record in records}
    retention = {record["label"]: record["retention"] for record in records}
    width = shutil.get_terminal_size((100, 24)).columns
    tables = side_by_side(matrices, retention, width=max(80, width))
    return f"Exact match, percent; * is the score right after learning a task\n\n{tables}\n\n" + metrics_table(
        matrices, retention
    ).text(widest=40)
