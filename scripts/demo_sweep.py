"""Find the learning rate of every method of ``lorica demo``, and measure what each then learns and loses.

    python scripts/demo_sweep.py --output docs/results/demo-sweep.json

Every candidate runs the demo's stream with every learning rate of one grid and several seeds, scored on the
validation rows. Its learning rate is the smallest whose learning accuracy (the mean score on each task right
after learning it) is within one point of its best; retention plays no part. With that rate it runs again,
scored on the test rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch

from lorica.data.stream import MethodSettings, TaskStream, read_stream
from lorica.record import environment, write_json
from lorica.sequence import run

SOURCE = Path(__file__).resolve().parents[1] / "src" / "lorica"
MODEL = SOURCE / "assets" / "demo_model"
STREAM = SOURCE / "benchmarks" / "demo" / "stream.yaml"
GRID = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
TOLERANCE = 1.0
"""Points of learning accuracy that count as equal."""

Measured = dict[str, Any]
Keep = Callable[[Measured], None]
CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "seqft": ("seqft", {}),
    "weight-1/2": ("osft", {"unfreeze_rank_ratio": 0.5, "source": "weight"}),
    "weight-3/4": ("osft", {"unfreeze_rank_ratio": 0.25, "source": "weight"}),
    "activation-1/2": ("osft", {"unfreeze_rank_ratio": 0.5, "source": "activation", "calibration": "self"}),
    "activation-3/4": ("osft", {"unfreeze_rank_ratio": 0.25, "source": "activation", "calibration": "self"}),
    "activation-random-1/2": ("osft", {"unfreeze_rank_ratio": 0.5, "source": "activation", "calibration": "random"}),
    "seqft-all": ("seqft", {"train_also": [".*"]}),
}
"""Method and arguments of ``lorica.plan``; the fraction is the protected share."""


class Job(NamedTuple):
    """One run over the stream."""

    candidate: str
    learning_rate: float
    seed: int


def measure(stream: TaskStream, job: Job) -> Measured:
    """Run one candidate over the stream once."""
    method, protection = CANDIDATES[job.candidate]
    settings = MethodSettings(
        method=method, label=job.candidate, learning_rate=job.learning_rate, protection=protection
    )
    one = stream.model_copy(update={"methods": {"candidate": settings}})
    with tempfile.TemporaryDirectory() as folder:
        (record,) = run(one, str(MODEL), folder, seed=job.seed, say=lambda _: None)
    metrics, atlas = record["metrics"], record["retention"]["atlas"]
    result = {
        **job._asdict(),
        "learning_accuracy": metrics["learning_accuracy"],
        "average_accuracy": metrics["average_accuracy"],
        "atlas": atlas,
        "atlas_lost": atlas[0] - atlas[-1],
        "scores": record["scores"],
        "seconds": record["cost"]["seconds"],
    }
    print(line(result), f"seed {job.seed}, {result['seconds']:.0f} s", flush=True)
    return result


def measure_all(pool: ProcessPoolExecutor, stream: TaskStream, jobs: Iterable[Job], keep: Keep) -> list[Measured]:
    """Run all jobs, as many at once as the pool has workers, and keep each result as it comes."""
    rows = []
    for row in pool.map(measure, itertools.repeat(stream), jobs):
        rows.append(row)
        keep(row)
    return rows


def choose(rows: list[Measured]) -> float:
    """Return the smallest learning rate whose mean learning accuracy is within ``TOLERANCE`` of the best."""
    rates = sorted({row["learning_rate"] for row in rows})
    learned = {r: mean(row["learning_accuracy"] for row in rows if row["learning_rate"] == r) for r in rates}
    return next(rate for rate in rates if learned[rate] >= max(learned.values()) - TOLERANCE)


def summaries(rows: list[Measured]) -> list[Measured]:
    """Return mean and standard deviation over the seeds, by candidate and learning rate."""
    groups: dict[tuple[str, float], list[Measured]] = {}
    for row in rows:
        groups.setdefault((row["candidate"], row["learning_rate"]), []).append(row)
    return [summary(group) for group in groups.values()]


def summary(rows: list[Measured]) -> Measured:
    """Return mean and standard deviation of runs that differ in their seed alone."""
    result = {key: rows[0][key] for key in ("candidate", "learning_rate")}
    for key in ("learning_accuracy", "average_accuracy", "atlas_lost"):
        values = [row[key] for row in rows]
        result[key] = mean(values)
        result[f"{key}_sd"] = stdev(values) if len(values) > 1 else 0.0
    return result


def line(row: Measured) -> str:
    """Return a result as one line; standard deviations where there are any."""
    cells = [f"{row['candidate']:22s} lr {row['learning_rate']:<8g}"]
    for key in ("learning_accuracy", "average_accuracy", "atlas_lost"):
        spread = f" +- {row[f'{key}_sd']:4.1f}" if f"{key}_sd" in row else ""
        cells.append(f"{key} {row[key]:5.1f}{spread}")
    return "  ".join(cells)


def on_validation_rows(stream: TaskStream) -> TaskStream:
    """Return the stream scored on ``*.valid.jsonl`` in place of ``*.test.jsonl``."""
    tasks = [t.model_copy(update={"test_file": t.test_file.replace(".test.", ".valid.")}) for t in stream.tasks]
    return stream.model_copy(update={"tasks": tasks})


def sweep(
    pool: ProcessPoolExecutor, stream: TaskStream, names: list[str], grid: list[float], seeds: range, keep: Keep
) -> Measured:
    """Return the runs on the validation rows, and those on the test rows with the rates they lead to."""
    jobs = itertools.starmap(Job, itertools.product(names, grid, seeds))
    validation = measure_all(pool, on_validation_rows(stream), jobs, keep)
    rates = {name: choose([row for row in validation if row["candidate"] == name]) for name in names}
    test = measure_all(pool, stream, (Job(name, rates[name], seed) for name in names for seed in seeds), keep)
    return {
        "validation": summaries(validation),
        "test": summaries(test),
        "runs": {"validation": validation, "test": test},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--grid", nargs="+", type=float, default=list(GRID), help="learning rates")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="runs at once, one thread each")
    arguments = parser.parse_args()
    stream = read_stream(STREAM)
    seeds = range(arguments.seeds)
    settings = {
        "schema": 1,
        "kind": "demo-sweep",
        **environment(),
        "stream_version": stream.version,
        "training": stream.training,
        "candidates": {name: CANDIDATES[name] for name in arguments.candidates},
        "grid": arguments.grid,
        "seeds": list(seeds),
        "selection": " ".join((__doc__ or "").split("\n\n")[-1].split()),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    partial = arguments.output.with_suffix(".partial.jsonl")

    def keep(row: Measured) -> None:
        with partial.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    with ProcessPoolExecutor(arguments.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = sweep(pool, stream, arguments.candidates, arguments.grid, seeds, keep)
    write_json(arguments.output, settings | results)
    partial.unlink()
    print("\n".join(["", "on the test rows:", *map(line, results["test"])]))


if __name__ == "__main__":
    main()
