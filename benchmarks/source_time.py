"""Step time, state and peak memory of the sources that measure, each beside ``weight`` under the same constraint.

    python benchmarks/source_time.py                          # the built-in configurations, about 30 minutes on 2 cores
    python benchmarks/source_time.py --width 512 --layers 4 --tokens 2048

``curvature`` stands beside ``weight`` two-sided, ``activation`` beside ``weight`` with constraint ``input``: the same
model, the same number of protected directions of every side, the same degrees of freedom. What differs is where the
directions come from, and that layers with the same input have one basis of it. The two of a pair take turns on the same
tokens as in ``step_time.py``; the ratio is that within a round.

Each then goes through the phases of ``peak_memory.py`` in a process of its own: ``peak_ratio`` compares the peak of the
anonymous memory in three steps.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import nn

from benchmarks import peak_memory
from benchmarks.contestants import SOURCE_PAIRS, SOURCES, Contestant, batches, llama
from benchmarks.measures import ALLOCATOR, RESULTS, empty_cache, write_result
from benchmarks.step_time import Configuration, race, state_after_a_step, timed_rows
from lorica.constrain.protect import plan_of

MOST, SECONDS = 41, 150.0
"""Rounds of a pair at most, and the seconds for them."""

Row = dict[str, Any]


class Point(Configuration):
    """A model and a batch, and the shares that are protected."""

    @property
    def file(self) -> str:
        return f"source-time-{self.width}x{self.layers}-{self.tokens}.json"


GRID = [Point(512, 4, 2048, shares=(0.5, 0.75)), Point(1024, 2, 2048, shares=(0.5, 0.75))]


def pairs(shares: tuple[float, ...]) -> list[list[Contestant]]:
    """Return what is compared: ``weight`` first, then the source beside it."""
    return [
        [SOURCES[f"{source} {constraint} {share:g}"] for source in pair]
        for share in shares
        for constraint, pair in SOURCE_PAIRS.items()
    ]


def facts(model: nn.Module) -> Row:
    """Return what a protected model was protected by: source, constraint, degrees of freedom."""
    plan = plan_of(model)
    assert plan is not None
    first = plan.entries[0]
    return {"source": first.source, "constraint": first.constraint, "free": plan.free}


def timed(pair: list[Contestant], point: Point, model: nn.Module, budget: float, most: int) -> list[Row]:
    """Return a row for both of a pair, with their ratios to the first."""
    names = {one.name: one for one in pair}
    print(f"  {' and '.join(names)}", flush=True)
    runners = {name: one.build(copy.deepcopy(model)) for name, one in names.items()}
    few = next(batches(1, point.length, point.length))
    states = {name: state_after_a_step(runner, few) for name, runner in runners.items()}
    rows = timed_rows(names, pair[0].name, race(runners, point, budget, most), states, point.tokens)
    return [row | facts(runners[row["method"]].model) for row in rows]


def with_peaks(rows: list[Row], folder: Path, point: Point) -> list[Row]:
    """Return the rows of a pair with the peaks of both, each measured in a process of its own."""
    place = peak_memory.Configuration(point.width, point.layers, point.tokens, point.length)
    phases = [peak_memory.in_a_process(row["method"], folder, place)["phases"] for row in rows]
    peaks = [one["train"]["peak_anonymous"] for one in phases]
    return [
        row | {"peak_bytes": peak, "peak_ratio": peak / peaks[0], "phases": one}
        for row, peak, one in zip(rows, peaks, phases, strict=True)
    ]


def measure(point: Point, budget: float, most: int) -> list[Row]:
    """Return a row per source, constraint and share."""
    model, rows = llama(point.width, point.layers, point.length), []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for pair in pairs(point.shares):
            rows += with_peaks(timed(pair, point, model, budget, most), Path(folder), point)
            print(_line(rows[-1]), flush=True)
    return rows


def _line(row: Row) -> str:
    ratio = row["ratio"]
    time = f"step x {ratio['median']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})"
    memory = f"state x {row['state_ratio']:.3f}, peak x {row['peak_ratio']:.3f}"
    return f"  {row['method']}, beside weight: {time}, {memory}"


def run(points: list[Point], budget: float, most: int, folder: Path) -> None:
    """Measure what is not in the folder yet."""
    for point in points:
        if (folder / point.file).exists():
            continue
        print(f"width {point.width}, {point.layers} layers, {point.tokens} tokens per step")
        rows = measure(point, budget, most)
        settings = {"dtype": "float32", "budget": budget, "steps": peak_memory.STEPS, "allocator": ALLOCATOR}
        write_result(folder / point.file, point._asdict() | settings, rows, [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, help="one width instead of the built-in configurations")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="per step; with --width")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence; with --width")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.75], help="protected; with --width")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the rounds of a pair")
    parser.add_argument("--rounds", type=int, default=MOST, help="of a pair, at most")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    options = parser.parse_args()
    own = [Point(options.width or 0, options.layers, options.tokens, options.length, tuple(options.shares))]
    with empty_cache():
        run(own if options.width else GRID, options.seconds, options.rounds, options.output)


if __name__ == "__main__":
    main()
