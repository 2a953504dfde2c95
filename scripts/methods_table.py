"""Measure what every method carries from task to task and write the tables of docs/methods.md.

    python scripts/methods_table.py             # runs every method, a minute or two on one core
    python scripts/methods_table.py --no-run    # only writes the page's tables anew, from the results

Every method learns the first three tasks of the demo's stream for a few steps with the demo's model. The bytes are
those of the tensors in the method's state after each task; the steps hardly matter to them, the rows and the shapes do.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lorica
from lorica.benchmarks import find_stream
from lorica.data.stream import MethodSettings, TaskStream
from lorica.demo import MODEL
from lorica.methods import METHODS
from lorica.record import environment, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "docs" / "results" / "methods.json", ROOT / "docs" / "methods.md"
STEPS = 5
BESIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "osft, protect_learned 0.1": ("osft", {"protect_learned": 0.1}),
    "osft, remember_tasks": ("osft", {"source": "activation", "remember_tasks": True}),
}
"""Options that carry something where the defaults carry nothing."""


def measured() -> dict[str, Any]:
    """Run everything and return the record."""
    found = find_stream("demo")
    rows: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in METHODS} | BESIDE
    settings = {
        label: MethodSettings(method=name, learning_rate=5e-4, options=options)
        for label, (name, options) in rows.items()
    }
    stream = found.model_copy(update={"methods": settings})
    tasks = [task.name for task in stream.tasks[:3]]
    runs = {label: one_run(stream, label, tasks) for label in rows}
    return {
        "schema": 1,
        "kind": "methods-table",
        "model": MODEL.name,
        "model_parameters": next(iter(runs.values()))["model_parameters"],
        "stream": stream.name,
        "stream_version": stream.version,
        "tasks": tasks,
        "steps": STEPS,
        "options": {label: options for label, (_, options) in BESIDE.items()},
        "carried_bytes": {label: run["carried_bytes"] for label, run in runs.items()},
        "trainable_parameters": {label: run["cost"]["trainable_parameters"] for label, run in runs.items()},
        **environment(),
    }


def one_run(stream: TaskStream, label: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Run one method over the tasks and return its record."""
    with tempfile.TemporaryDirectory() as folder:
        config: dict[str, Any] = {"stream": "demo", "model_name_or_path": str(MODEL), "output_dir": folder}
        config |= {"methods": [label], "tasks": list(tasks), "max_steps": STEPS, "max_test_rows": 4}
        (record,) = lorica.run(config, lambda _: None, stream=stream)
    print(f"{label:28} {record['carried_bytes']}", flush=True)
    return record


def facts_table(record: dict[str, Any]) -> str:
    """Return one line for each method: what it is, what it needs, what it trains."""
    lines = ["| method | in one line | old data | task id | rate | trains |", "|---|---|---|---|---|---|"]
    for name in METHODS:
        kind = METHODS[name]
        needs = ["yes" if needed else "no" for needed in (kind.needs_old_data, kind.needs_task_id)]
        cells = [kind.summary, *needs, f"x {kind.learning_rate_scale:g}", f"{record['trainable_parameters'][name]:,}"]
        lines.append(f"| [`{name}`](#{name}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table(record: dict[str, Any]) -> str:
    """Return one line for each row of the record: what is carried, and its bytes after each task."""
    lines = ["| method | carries | task 1 | task 2 | task 3 |", "|---|---|---|---|---|"]
    for label, counts in record["carried_bytes"].items():
        name = label.partition(",")[0]
        carries = METHODS[name].stores if label == name else "the same, with this option"
        lines.append(f"| {label.replace(name, f'`{name}`', 1)} | {carries} | {' | '.join(map(size, counts))} |")
    return "\n".join(lines)


def size(count: int) -> str:
    """Return bytes as a reader wants them."""
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB" if count else "0"


def with_tables(page: str, record: dict[str, Any]) -> str:
    """Return the page with both tables as the record and the methods have them."""
    for name, table in (("facts", facts_table(record)), ("memory", memory_table(record))):
        block = f"<!-- {name}: scripts/methods_table.py -->\n{table}\n<!-- end -->"
        page, found = re.subn(rf"<!-- {name}: .*?<!-- end -->", lambda _, b=block: b, page, flags=re.S)  # type: ignore[misc]
        if found != 1:
            raise SystemExit(f"{PAGE.name} has {found} places for the table {name!r}; it needs one")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-run", action="store_true", help="take the figures of the committed results")
    if not parser.parse_args().no_run:
        write_json(RESULTS, measured())
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")


if __name__ == "__main__":
    main()
