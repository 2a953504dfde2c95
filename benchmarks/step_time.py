"""Step time, training state and leakage of Lorica, plain fine-tuning, LoRA and the peers: same model, batch and data.

    python benchmarks/step_time.py                                     # the built-in grid, about 45 minutes on 2 cores
    python benchmarks/step_time.py --width 512 --layers 4 --tokens 2048 8192

In each round every method takes one step on the same tokens, one method after the other, so that a drift of the
machine's speed meets all alike; their order is shuffled from round to round, so that none always follows the same one.
What is compared is the ratio to plain fine-tuning within a round; written are its median and quartiles.

``state`` counts weights, bases, cores, gradients and optimizer state in bytes. ``leakage`` is the share of each
method's change that lies in the protected directions of the weights that came in, computed anew in float64; the
larger of both sides, over all weights. Written is one file per configuration; those that are there are not run again.
Peers that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import Tensor, nn

from benchmarks.contestants import PLAIN, SHARES, Change, Contestant, Runner, batches, chosen, llama
from benchmarks.measures import RESULTS, empty_cache, quartiles, state_of, write_result
from lorica.constrain.audit_weight import leakage
from lorica.subspace.linalg import Split, split

WARM_UP, FEWEST, MOST = 1, 3, 15
"""Rounds: unmeasured ones, and the least and most that are measured."""


class Configuration(NamedTuple):
    """One point of the grid."""

    width: int
    layers: int
    tokens: int
    length: int = 256
    shares: tuple[float, ...] = SHARES

    @property
    def file(self) -> str:
        return f"step-time-{self.width}x{self.layers}-{self.tokens}.json"


GRID = [
    *(Configuration(256, 4, tokens) for tokens in (1024, 2048, 8192, 16384)),
    Configuration(256, 4, 65536, shares=(0.75,)),
    *(Configuration(512, 4, tokens) for tokens in (1024, 2048, 8192)),
    *(Configuration(1024, 2, tokens) for tokens in (1024, 2048)),
    Configuration(1024, 2, 8192, shares=(0.75,)),
    *(Configuration(2048, 1, tokens, shares=(0.75,)) for tokens in (2048, 8192)),
]


class Lineup:
    """All methods of one model size, each built once from the same weights, with what tells how far they moved."""

    def __init__(self, width: int, layers: int, length: int, contestants: list[Contestant]) -> None:
        model = llama(width, layers, length)
        self.given = {name: w.detach().clone() for name, w in _projections(model).items()}
        self.splits: dict[str, Split] = {}
        self.contestants = {one.name: one for one in contestants}
        self.runners: dict[str, Runner] = {}
        self.changes: dict[str, Change] = {}
        for one in contestants:
            print(f"  building {one.name}", flush=True)
            runner = self.runners[one.name] = one.build(copy.deepcopy(model))
            if runner.watch:
                self.changes[one.name] = runner.watch()

    def leakage(self, name: str) -> float | None:
        """Return the share of a method's change in the protected directions, the larger side; None for the free."""
        share = self.contestants[name].share
        if share is None:
            return None
        change, total, leak_u, leak_v = self.changes[name], 0.0, 0.0, 0.0
        for weight in self.given:
            whole, k = self._split(weight), int(share * min(self.given[weight].shape))
            delta = change(weight)
            u, v = leakage(delta, whole.u_MK[:, :k], whole.v_NK[:, :k])
            size = delta.square().sum().item()
            total, leak_u, leak_v = total + size, leak_u + u**2 * size, leak_v + v**2 * size
        return (max(leak_u, leak_v) / total) ** 0.5

    def _split(self, weight: str) -> Split:
        if weight not in self.splits:
            share = max(one.share or 0 for one in self.contestants.values())
            matrix = self.given[weight]
            self.splits[weight] = split(matrix, int(share * min(matrix.shape)))
        return self.splits[weight]


def _projections(model: nn.Module) -> dict[str, Tensor]:
    return {n.removesuffix(".weight"): p for n, p in model.named_parameters() if n.endswith("_proj.weight")}


def timed_step(runner: Runner, ids: Tensor) -> float:
    """Take one step and return its seconds."""
    start = time.perf_counter()
    runner.step(ids)
    runner.optimizer.zero_grad()
    return time.perf_counter() - start


def race(
    runners: dict[str, Runner], configuration: Configuration, budget: float, most: int = MOST
) -> dict[str, list[float]]:
    """Return the seconds of every method in every measured round, as many rounds as the budget of seconds allows."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    rounds = WARM_UP + FEWEST
    began = time.perf_counter()
    for index, ids in enumerate(batches(WARM_UP + most, configuration.tokens, configuration.length)):
        if index == rounds:
            break
        order = list(runners)
        random.Random(index).shuffle(order)
        for name in order:
            seconds[name].append(timed_step(runners[name], ids))
        each = (time.perf_counter() - began) / (index + 1)
        rounds = WARM_UP + max(FEWEST, min(most, int(budget / each)))
        print(f"\r  round {index + 1} of {rounds}, {each:.1f} s each ", end="", flush=True)
    print()
    return {name: own[WARM_UP:] for name, own in seconds.items()}


def state_after_a_step(runner: Runner, ids: Tensor) -> dict[str, int]:
    """Return the bytes that training keeps, gradients among them."""
    runner.step(ids)
    count = state_of(runner.model, runner.optimizer)
    runner.optimizer.zero_grad()
    return count


def measure(lineup: Lineup, configuration: Configuration, budget: float) -> list[dict[str, Any]]:
    """Return one row per method."""
    taking_part = {
        name: runner
        for name, runner in lineup.runners.items()
        if lineup.contestants[name].share in (None, *configuration.shares)
    }
    few = next(batches(1, configuration.length, configuration.length))
    states = {name: state_after_a_step(runner, few) for name, runner in taking_part.items()}
    seconds = race(taking_part, configuration, budget)
    rows = timed_rows(lineup.contestants, PLAIN, seconds, states, configuration.tokens)
    return [row | {"leakage": lineup.leakage(row["method"])} for row in rows]


def timed_rows(
    contestants: dict[str, Contestant],
    base: str,
    seconds: dict[str, list[float]],
    states: dict[str, dict[str, int]],
    tokens: int,
) -> list[dict[str, Any]]:
    """Return one row per method that was timed, with its ratios to the method ``base``; that of time in each round."""
    rows = []
    for name, own in seconds.items():
        middle = quartiles(own)["median"]
        rows.append(
            {
                "method": name,
                "family": contestants[name].family,
                "protected": contestants[name].share,
                "seconds": own,
                "seconds_median": middle,
                "tokens_per_second": tokens / middle,
                "ratio": quartiles([mine / other for mine, other in zip(own, seconds[base], strict=True)]),
                "state_ratio": states[name]["state_bytes"] / states[base]["state_bytes"],
                **states[name],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text."""
    head = f"{'method':20} {'s / step':>9} {'x plain':>8} {'quartiles':>13} {'state':>9} {'x plain':>8} {'leakage':>9}"
    return "\n".join([head, *map(_line, rows)])


def _line(row: dict[str, Any]) -> str:
    ratio, leak = row["ratio"], "-" if row["leakage"] is None else f"{row['leakage']:.1e}"
    speed = f"{row['seconds_median']:9.3f} {ratio['median']:8.2f} {ratio['low']:6.2f}-{ratio['high']:5.2f}"
    return f"{row['method']:20} {speed} {row['state_bytes'] / 1e6:6.0f} MB {row['state_ratio']:8.2f} {leak:>9}"


def run(configurations: list[Configuration], budget: float, folder: Path) -> None:
    """Measure what is not in the folder yet, the configurations of one model size with one set of models."""
    todo = [one for one in configurations if not (folder / one.file).exists()]
    for (width, layers, length), group in groupby(todo, key=lambda one: (one.width, one.layers, one.length)):
        points = list(group)
        contestants, missing = chosen(tuple(sorted({share for one in points for share in one.shares})))
        print(f"width {width}, {layers} layers")
        lineup = Lineup(width, layers, length, contestants)
        for point in points:
            print(f"  {point.tokens} tokens per step")
            rows = measure(lineup, point, budget)
            print(table(rows))
            settings = point._asdict() | {"dtype": "float32", "rounds": len(rows[0]["seconds"]), "budget": budget}
            write_result(folder / point.file, settings, rows, missing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, help="one width instead of the built-in grid")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="per step; with --width")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence; with --width")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="protected; with --width")
    parser.add_argument("--seconds", type=float, default=100, help="for the rounds of a configuration")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    options = parser.parse_args()
    own = [
        Configuration(options.width, options.layers, tokens, options.length, tuple(options.shares))
        for tokens in options.tokens
    ]
    with empty_cache():
        run(own if options.width else GRID, options.seconds, options.output)


if __name__ == "__main__":
    main()
