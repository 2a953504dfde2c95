"""Time the split of every constrained weight of a model: in full, from the cache, and after a task.

    python scripts/split_time.py [--model llama-3.2-1b] [--dtype float32] [--output docs/results/speed/split-time.json]

The weights are random, of the model's shapes. A shape takes the same time in every layer, so each distinct one is timed
``--repeats`` times, one matrix at a time, and its median is multiplied by how often the model has it; the result says
so (``counted``). All times include the derivation of the long side for the protected directions.

- ``full``: ``split`` of the weight.
- ``first``: the same through an empty cache: hash, split, write.
- ``cached``: hash, read, check. What another count, another run or a resumed one takes.
- ``after_task``: the weight with a change of 1 % in its free directions, rounded to its dtype: hash, read what it grew
  out of, split the block that changed (where that is exact: ``resplit``; otherwise everything), write.

``angle`` is the sine of the largest angle between the protected directions of ``after_task`` and those of a full split.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica.record import Stopwatch, environment, peak_memory, write_json
from lorica.subspace.linalg import Split, split
from lorica.subspace.store import SplitStore

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "speed" / "split-time.json"
Shape = tuple[int, int]
KINDS = ("full", "first", "cached", "after_task")
CHANGE = 0.01


def llama(hidden: int, inner: int, keys: int, layers: int) -> dict[Shape, int]:
    """Return how many weights of each shape (out, in) a Llama's blocks have; ``keys`` is the width of its keys."""
    shapes = {(hidden, hidden): 2, (keys, hidden): 2, (inner, hidden): 2, (hidden, inner): 1}
    return {shape: count * layers for shape, count in shapes.items()}


MODELS = {
    "llama-3.2-1b": llama(2048, 8192, 512, 16),
    "llama-3.2-3b": llama(3072, 8192, 1024, 28),
    "llama-3.1-8b": llama(4096, 14336, 1024, 32),
    "tiny": llama(320, 1024, 256, 2),
}


def after_task(weight: Tensor, parts: Split, seed: int) -> Tensor:
    """Return the weight with a random change in the directions that the split leaves free."""
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    delta -= parts.u_MK @ (parts.u_MK.T @ delta)
    delta -= (delta @ parts.v_NK) @ parts.v_NK.T
    return (weight.double() + delta * (CHANGE * weight.double().norm() / delta.norm())).to(weight.dtype)


def seconds(work: Callable[[], Split]) -> tuple[float, Split]:
    """Return how long a split took, and the split."""
    watch = Stopwatch()
    result = work()
    return watch.seconds, result


def sine(found: Tensor, expected: Tensor) -> float:
    """Return the sine of the largest angle between two spaces."""
    return float(torch.linalg.matrix_norm(found - expected @ (expected.T @ found), 2))


def measure(shape: Shape, dtype: torch.dtype, protected: float, repeats: int) -> dict[str, Any]:
    """Time one shape and return its row."""
    k = int(protected * min(shape))
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for repeat in range(repeats):
        generator = torch.Generator().manual_seed(repeat)
        weight = (torch.randn(shape, generator=generator) / shape[1] ** 0.5).to(dtype)
        with tempfile.TemporaryDirectory() as folder:
            store = SplitStore(Path(folder))
            taken, parts = seconds(lambda: split(weight, k))  # noqa: B023
            times["full"].append(taken)
            times["first"].append(seconds(lambda: store.split(weight, k, "w"))[0])  # noqa: B023
            times["cached"].append(seconds(lambda: store.split(weight, k, "w"))[0])  # noqa: B023
            changed = after_task(weight, parts, seed=100 + repeat)
            taken, found = seconds(lambda: store.split(changed, k, "w"))  # noqa: B023
            times["after_task"].append(taken)
    expected = split(changed, k)
    return {
        "shape": list(shape),
        "k": k,
        "seconds": times,
        "resplit": not torch.equal(found.v_NK, expected.v_NK),  # a full split would be the same bit for bit
        "angle": max(sine(found.u_MK, expected.u_MK), sine(found.v_NK, expected.v_NK)),
    }


def run(model: str, dtype: torch.dtype, protected: float, repeats: int) -> dict[str, Any]:
    """Time every shape of a model, the smallest first, and return the result."""
    shapes = sorted(MODELS[model].items(), key=lambda item: work_of(item[0]))
    total, done, watch, rows = sum(work_of(shape) for shape, _ in shapes), 0.0, Stopwatch(), []
    for shape, count in shapes:
        row = measure(shape, dtype, protected, repeats) | {"count": count}
        rows.append(row)
        done += work_of(shape)
        medians = "  ".join(f"{kind} {statistics.median(row['seconds'][kind]):.2f} s" for kind in KINDS)
        left = watch.seconds * (total - done) / done
        print(f"{shape[0]} x {shape[1]} ({count} in the model): {medians}; about {left:.0f} s left", flush=True)
    totals = {kind: sum(row["count"] * statistics.median(row["seconds"][kind]) for row in rows) for kind in KINDS}
    return {
        "model": model,
        "weights": sum(MODELS[model].values()),
        "numbers": sum(m * n * count for (m, n), count in MODELS[model].items()),
        "dtype": str(dtype).removeprefix("torch."),
        "protected": protected,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "counted": "each distinct shape was timed; model_seconds are medians times how often the model has the shape",
        "model_seconds": totals,
        "shapes": rows,
        "peak_bytes": peak_memory(),
        "environment": environment(),
    }


def work_of(shape: Shape) -> float:
    """Return about how much work a split is: the Gram matrix, the eigenproblem, the long side."""
    short, long = sorted(shape)
    return 4 * long * short**2 + 11 * short**3


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--model", choices=sorted(MODELS), default="llama-3.2-1b")
    words.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    words.add_argument("--protected", type=float, default=0.75, help="share of the directions")
    words.add_argument("--repeats", type=int, default=3)
    words.add_argument("--output", type=Path, default=RESULT)
    given = words.parse_args()
    result = run(given.model, getattr(torch, given.dtype), given.protected, given.repeats)
    for kind, total in result["model_seconds"].items():
        print(f"{kind}: {total:.0f} s for the {result['weights']} weights of {given.model}")
    write_json(given.output, result)


if __name__ == "__main__":
    main()
