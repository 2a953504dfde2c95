"""What a finished cell leaves: its record and its answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorica import processes
from lorica.bootstrap import interval
from lorica.errors import LoricaError
from lorica.evaluation.metrics import majority_floor, recall_per_label
from lorica.experiments.abilities import FromFile
from lorica.experiments.cell import CellRun
from lorica.experiments.progress import Progress
from lorica.experiments.selection import Selection
from lorica.files import write_text
from lorica.hub import commits
from lorica.json_file import load_record
from lorica.methods import METHODS
from lorica.record import SCHEMA, environment, redacted
from lorica.scores import ScoreMatrix

RUN, PREDICTIONS = "run.json", "predictions.jsonl"


def record_of(run: CellRun, progress: Progress, selection: Selection | None) -> dict[str, Any]:
    """Return the run record of a finished cell; the report needs nothing else."""
    setup, cell = run.setup, run.cell
    settings, stream = setup.settings[cell.method], setup.stream
    matrix = ScoreMatrix(list(progress.tasks), progress.scores)  # type: ignore[arg-type]
    return {
        "schema": SCHEMA,
        "kind": "run",
        "stream": stream.name,
        "stream_version": stream.version,
        "order": cell.order,
        "left_out": stream.left_out,
        "seed": cell.seed,
        "method": settings.method,
        "label": settings.title,
        "name": cell.method,
        "facts": method_facts(settings.method),
        "model": redacted(Path(setup.config.model_name_or_path).name),
        "commits": commits(setup.config.model_name_or_path, setup.config.model_revision),
        "model_kind": setup.kind,
        "model_parameters": progress.parameters,
        "learning_rate": cell.learning_rate,
        "processes": processes.size(),
        "sweep": selection.to_json() if selection else None,
        **matrix.to_json(),
        "retention": progress.retention,
        "beside": progress.beside,
        "metrics": matrix.metrics(),
        "intervals": intervals(matrix, progress),
        "row_scores": {name: _compact(rows) for name, rows in progress.rows.items()},
        "metric_names": {task.name: task.metric for task in run.tasks},
        "floors": floors(run),
        "recall": recalls(run, progress),
        "carried_bytes": progress.carried_bytes,
        "worst_leakage": progress.worst_leakage,
        "predicted_forgetting": progress.forgetting,
        "notices": progress.notices,
        "cost": progress.cost.to_json(),
        "plan": progress.plan,
        "leakage": progress.leakage,
        "data": redacted(run.data()),
        "config": redacted(
            {
                "settings": settings.model_dump(mode="json"),
                "training": setup.training,
                "run": setup.config.model_dump(mode="json"),
            }
        ),
        **environment(),
    }


def method_facts(method: str) -> dict[str, Any]:
    """Return what a reader must know of a method beside its scores."""
    kind = METHODS[method]
    return {
        "stores": kind.stores,
        "reproduction": kind.reproduction,
        "needs_old_data": kind.needs_old_data,
        "needs_task_id": kind.needs_task_id,
    }


def floors(run: CellRun) -> dict[str, float]:
    """Return what always giving the most frequent answer scores: measured where there are choices, else as stated."""
    scored = [*run.tasks, *(one.scored for one in run.setup.held_out if isinstance(one, FromFile))]
    stated = {one.name: one.floor for one in scored if one.floor is not None and not one.choices}
    return stated | {one.name: majority_floor(_references(run, one.name)) for one in scored if one.choices}


def recalls(run: CellRun, progress: Progress) -> dict[str, dict[str, float]]:
    """Return, for each task with choices, the share of each label's rows that are answered rightly at the end.

    A model that stops writing one of four letters loses a part of every average; here it shows which.
    """
    shares = {}
    for task in run.tasks:
        if task.choices and task.name in progress.rows:
            answers = _references(run, task.name)
            given = [one if score == 100 else "" for one, score in zip(answers, progress.rows[task.name], strict=True)]
            shares[task.name] = recall_per_label(given, answers)
    return shares


def _references(run: CellRun, name: str) -> list[str]:
    return [(row.answer or "").strip() for row in run.setup.rows.test(name).examples]


def intervals(matrix: ScoreMatrix, progress: Progress) -> dict[str, Any]:
    """Return 95 % bootstrap intervals over the scored rows at the end: the average's, and each task's."""
    rows = {name: progress.rows[name] for name in matrix.tasks if name in progress.rows}
    if len(rows) < len(matrix.tasks) or matrix.average_accuracy is None:
        return {}
    whole = interval(rows)
    each = {name: interval({name: values}) for name, values in rows.items()}
    return {
        "average_accuracy": [whole.low, whole.high],
        "tasks": {name: [one.low, one.high] for name, one in each.items()},
    }


def write_predictions(progress: Progress, path: Path) -> None:
    """Write the answers at the end of the stream, one line for each row: task, row, answer, score."""
    lines = []
    for name, answers in progress.answers.items():
        for where, (answer, score) in enumerate(zip(answers, progress.rows[name], strict=True)):
            lines.append(json.dumps({"task": name, "row": where, "answer": answer, "score": score}, ensure_ascii=False))
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_run(path: Path) -> dict[str, Any]:
    """Return the record that a finished cell wrote."""
    try:
        record: Mapping[str, Any] = load_record(path)
    except (OSError, ValueError) as error:
        raise LoricaError(f"{path}: cannot read it: {error}; remove it to score that cell anew") from error
    return dict(record)


def _compact(rows: list[float]) -> str:
    """Return scores as one string; a list would take a line of JSON for each."""
    return " ".join(f"{score:g}" for score in rows)
