"""Evaluation and generation of a protected model against the plain one: both should take the same time.

    python benchmarks/inference.py [--width 512 1024] [--rounds 21]

In each round every model evaluates the same batch without gradients and then generates greedily, one model after the
other in an order that is shuffled from round to round. The protected models took one training step, so that their
weights are folded. Written are the median and quartiles of the ratio to the plain model within a round.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.contestants import CONTESTANTS, PLAIN, batches, llama
from benchmarks.measures import RESULTS, empty_cache, quartiles, write_result

LAYERS, LENGTH, PROMPT = {512: 4, 1024: 2}, 256, 32
METHODS = (PLAIN, "lorica fast 0.75", "lorica lean 0.75")


def evaluate(model: nn.Module, ids: Tensor) -> None:
    """Run the model on a batch."""
    model(input_ids=ids, labels=ids, use_cache=False)


def generate(model: Any, ids: Tensor, new: int) -> None:
    """Continue prompts greedily by exactly ``new`` tokens."""
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                           do_sample=False, pad_token_id=0)  # fmt: skip
    assert found.shape[1] == ids.shape[1] + new


def alternating(models: dict[str, nn.Module], run: Callable[[nn.Module], None], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every model in every round after the first."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for index in range(rounds + 1):
        order = list(models)
        random.Random(index).shuffle(order)
        for name in order:
            began = time.perf_counter()
            run(models[name])
            seconds[name].append(time.perf_counter() - began)
    return {name: own[1:] for name, own in seconds.items()}


@torch.no_grad()
def measure(models: dict[str, nn.Module], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per model and activity."""
    text = next(batches(1, options.tokens, LENGTH))
    prompts = text.flatten()[: options.batch * PROMPT].view(options.batch, PROMPT)
    runs: dict[str, Callable[[nn.Module], None]] = {
        "evaluation": lambda model: evaluate(model, text),
        "generation": lambda model: generate(model, prompts, options.new_tokens),
    }
    rows = []
    for activity, run in runs.items():
        seconds = alternating(models, run, options.rounds)
        rows += [
            {
                "method": name,
                "family": CONTESTANTS[name].family,
                "protected": CONTESTANTS[name].share,
                "activity": activity,
                "seconds": own,
                "seconds_median": quartiles(own)["median"],
                "ratio": quartiles([mine / base for mine, base in zip(own, seconds[PLAIN], strict=True)]),
            }
            for name, own in seconds.items()
        ]
    return rows


def trained(name: str, width: int, layers: int) -> nn.Module:
    """Return a model after one step of a method, ready to evaluate."""
    runner = CONTESTANTS[name].build(copy.deepcopy(llama(width, layers, LENGTH)))
    runner.step(next(batches(1, LENGTH, LENGTH)))
    runner.optimizer.zero_grad()
    return runner.model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--tokens", type=int, default=2048, help="evaluated at once")
    parser.add_argument("--batch", type=int, default=4, help="prompts")
    parser.add_argument("--new_tokens", type=int, default=64, help="generated for each prompt")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    options = parser.parse_args()
    for width in options.width:
        file, layers = options.output / f"inference-{width}.json", LAYERS.get(width, 2)
        if file.exists():
            continue
        with empty_cache():
            models = {name: trained(name, width, layers) for name in METHODS}
        rows = measure(models, options)
        for row in rows:
            print(f"width {width} {row['activity']:11} {row['method']:20} x {row['ratio']['median']:.3f}")
        settings = {key: getattr(options, key) for key in ("rounds", "tokens", "batch", "new_tokens")}
        write_result(file, {"width": width, "layers": layers, "prompt": PROMPT} | settings, rows, [])


if __name__ == "__main__":
    main()
