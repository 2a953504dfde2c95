"""Fifty tasks in a row on one model: does the fiftieth cost what the second did?

    python benchmarks/tasks.py [--tasks 50] [--rounds 20] [--width 512] [--layers 2] [--steps 4] [--tokens 512]

A task is protect, a few steps on random tokens of its own, release. Measured are the seconds of each part, and before
release the state in bytes and the anonymous resident memory of the process, beyond what it held after all imports.

A machine's speed drifts by more over fifty tasks than the few percent that are looked for. So a second stream, in a new
process, starts at its first task when the long one is twenty tasks from its end, and both take turns from then on: task
31 beside task 2, 32 beside 3, ... 50 beside 21. What is compared is the ratio within a round. About three minutes for
each memory mode on 2 cores. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
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


def stream(memory: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Update one model task after task and yield what each took."""
    start = resident()["anonymous"]
    model = llama(options.width, options.layers, LENGTH)
    generator = torch.Generator().manual_seed(1)
    shape = (options.steps, max(1, options.tokens // LENGTH), LENGTH)
    for task in range(1, options.tasks + 1):
        row = one_task(model, memory, torch.randint(VOCABULARY, shape, generator=generator))
        yield {"task": task} | row | {"resident_bytes": row["resident_bytes"] - start}


def serve(memory: str, options: argparse.Namespace) -> None:
    """Do one task for each line of standard input and print its row."""
    rows = stream(memory, options)
    for _ in sys.stdin:
        print(json.dumps(next(rows)), flush=True)


class Stream:
    """A stream of tasks in a process of its own, which works only when it is asked for the next one."""

    def __init__(self, name: str, memory: str) -> None:
        self.name = name
        words = [sys.executable, *sys.argv, "--serve", memory]
        self.process = subprocess.Popen(
            words, env=os.environ | ALLOCATOR, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def next(self) -> dict[str, Any]:
        """Let the process do its next task and return the row."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.name} stream ended early")
        return {"stream": self.name} | json.loads(line)

    def close(self) -> None:
        """Let the process end."""
        self.process.communicate()


def measure(memory: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the long stream and of the one that is young when the long one is old."""
    old, rows = Stream("old", memory), []
    for task in range(1, options.tasks - options.rounds + 1):
        rows.append(old.next())
        print(f"\r{memory}: task {task} of {options.tasks}", end="", flush=True)
    young = Stream("young", memory)
    rows.append(young.next())
    for turn in range(options.rounds):
        order = [old, young]
        random.Random(turn).shuffle(order)
        rows += [one.next() for one in order]
        print(f"\r{memory}: task {options.tasks - options.rounds + turn + 1} of {options.tasks}", end="", flush=True)
    print()
    old.close()
    young.close()
    return sorted(rows, key=lambda row: (row["stream"], row["task"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=20, help="last tasks that take turns with a new stream")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of each task")
    parser.add_argument("--tokens", type=int, default=512, help="per step")
    parser.add_argument("--serve", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    options = parser.parse_args()
    with empty_cache():
        if options.serve:
            serve(options.serve, options)
            return
        for memory in MODES:
            file = options.output / f"tasks-{memory}.json"
            if not file.exists():
                rows = measure(memory, options)
                names = ("tasks", "rounds", "width", "layers", "steps", "tokens")
                settings = {name: getattr(options, name) for name in names}
                write_result(file, settings | {"memory": memory, "protected": PROTECTED}, rows, [])


if __name__ == "__main__":
    main()
