"""Fifty tasks in a row on one model: does the fiftieth cost what the second did?

    python benchmarks/tasks.py [--tasks 50] [--width 512] [--layers 2] [--steps 4] [--tokens 512]

A task is protect, a few steps on random tokens of its own, release. Measured are the seconds of each part, and before
release the state in bytes and the anonymous resident memory of the process, beyond what it held after all imports.
Each memory mode runs in a process of its own, about two minutes on 2 cores. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import lorica
from benchmarks.contestants import VOCABULARY, adamw, llama
from benchmarks.measures import ALLOCATOR, RESULTS, empty_cache, resident, state_of, write_result
from lorica.record import Stopwatch

MODES, PROTECTED, LENGTH = ("fast", "lean"), 0.75, 128


def one_task(model: torch.nn.Module, memory: str, batches: torch.Tensor) -> dict[str, Any]:
    """Update the model once and return what that took."""
    clock = Stopwatch()
    lorica.protect(model, lorica.plan(model, effective_rank=PROTECTED), memory=memory)
    protect_seconds, optimizer, steps = clock.seconds, adamw(model), []
    for ids in batches:
        optimizer.zero_grad()
        began = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        steps.append(time.perf_counter() - began)
    state = state_of(model, optimizer)
    gc.collect()
    state["resident_bytes"] = resident()["anonymous"]
    del optimizer
    clock = Stopwatch()
    lorica.release(model)
    return {
        "protect_seconds": protect_seconds,
        "step_seconds": statistics.median(steps),
        "steps_seconds": sum(steps),
        "release_seconds": clock.seconds,
        **state,
    }


def stream(memory: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per task."""
    start = resident()["anonymous"]
    model = llama(options.width, options.layers, LENGTH)
    generator = torch.Generator().manual_seed(1)
    shape = (options.steps, max(1, options.tokens // LENGTH), LENGTH)
    rows = []
    for task in range(1, options.tasks + 1):
        row = one_task(model, memory, torch.randint(VOCABULARY, shape, generator=generator))
        rows.append({"task": task} | row | {"resident_bytes": row["resident_bytes"] - start})
        print(f"\r{memory}: task {task} of {options.tasks}", end="", flush=True)
    print()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of each task")
    parser.add_argument("--tokens", type=int, default=512, help="per step")
    parser.add_argument("--memory", choices=MODES, help="this mode alone, in this process")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    options = parser.parse_args()
    if not options.memory:
        for mode in MODES:
            words = [sys.executable, *sys.argv, "--memory", mode]
            subprocess.run(words, env=os.environ | ALLOCATOR, check=True)
        return
    file = options.output / f"tasks-{options.memory}.json"
    if file.exists():
        return
    with empty_cache():
        rows = stream(options.memory, options)
    settings = {name: getattr(options, name) for name in ("tasks", "width", "layers", "steps", "tokens", "memory")}
    write_result(file, settings | {"protected": PROTECTED}, rows, [])


if __name__ == "__main__":
    main()
