"""Part 4: where the time of a step goes, by stage and by operation."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.methods import METHODS
from benchmarks.gpu.steps import Runner, Setup
from benchmarks.gpu.workbench import Row, Workbench
from lorica.constrain.protect import protected_layers

SEQUENCES = 2
STEPS = 3
OPERATIONS = 25
FILE = "profile.txt"


def run(bench: Workbench, *, shape: str, methods: tuple[str, ...]) -> None:
    """Measure the stages of each method's step, then profile some steps and write the operations' table."""
    for name in methods:
        labels = {"shape": shape, "method": name}
        holder: list[Runner] = []  # emptied before the next method is built
        if bench.measure(labels | {"what": "build"}, _build, bench, Setup(shape, (name,)), holder) is not None:
            bench.measure(labels | {"what": "stages"}, stages, holder[0])
            bench.measure(labels | {"what": "operations"}, operations, holder[0])
        holder.clear()
        bench.device.free()


def _build(bench: Workbench, setup: Setup, holder: list[Runner]) -> Row:
    runner = Runner(bench, METHODS[setup.methods[0]], setup)
    holder.append(runner)
    return {"prepare_seconds_per_layer": runner.prepare_seconds, "layers": runner.layers}


def stages(runner: Runner) -> Row:
    """Return the seconds of forward, backward, optimizer and fold, and which takes longest."""
    device, batches = runner.bench.device, runner.batches(SEQUENCES)
    stamps = []
    for _ in range(2 + STEPS):
        marks = [device.stamp()]
        with torch.autocast(device.name, torch.bfloat16, enabled=runner.method.autocast):
            loss = runner.model(input_ids=batches[0], labels=batches[0], use_cache=False).loss
        marks.append(device.stamp())
        loss.backward()
        marks.append(device.stamp())
        runner.update()
        stamps.append([*marks, device.stamp()])
    device.synchronize()
    seconds = {
        name: statistics.median(device.seconds(marks[i], marks[i + 1]) for marks in stamps[2:])
        for i, name in enumerate(("forward", "backward", "update"))
    }
    fold = _fold_seconds(runner)
    parts = {"forward": seconds["forward"], "backward": seconds["backward"], "fold": fold}
    parts["optimizer"] = max(seconds["update"] - fold, 0.0)
    return {"seconds": sum(seconds.values()), "stages": parts, "slowest": max(parts, key=parts.__getitem__)}


def _fold_seconds(runner: Runner) -> float:
    layers = list(protected_layers(runner.model).values())

    def fold() -> None:
        for layer in layers:
            layer.fold()

    return runner.bench.device.median(fold, repeats=3, warm_up=1) if layers else 0.0


def operations(runner: Runner) -> Row:
    """Return the operations that take longest on the device; the whole table goes to a file."""
    bench = runner.bench
    gpu = bench.device.name == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    batches = runner.batches(SEQUENCES)
    with profile(activities=activities) as recorded:
        for _ in range(STEPS):
            runner.gradients(batches)
            runner.update()
        bench.device.synchronize()
    averages = recorded.key_averages()
    key = "self_device_time_total" if gpu else "self_cpu_time_total"
    with (bench.folder / FILE).open("a", encoding="utf-8") as file:
        table = averages.table(sort_by=key, row_limit=OPERATIONS, max_name_column_width=90)
        file.write(f"{runner.method.name}: {STEPS} steps of {batches[0].numel()} tokens\n{table}\n\n")
    found = sorted(averages, key=lambda event: getattr(event, key), reverse=True)[:OPERATIONS]
    return {"operations": [_operation(event, key) for event in found], "slowest": found[0].key}


def _operation(event: Any, key: str) -> Row:
    return {"name": event.key[:160], "ms_per_step": getattr(event, key) / 1000 / STEPS, "calls": event.count / STEPS}
