"""Part 6: the peers, as far as they are installed, on two layers of the 1B shape (their split takes long).

All hold float32 weights and compute under bfloat16 autocast, as mini_trainer does; AdamW is not fused, since
mini_trainer wraps it. The ratios are to plain fine-tuning in the same form.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.contestants import CONTESTANTS, PLAIN, Contestant, Runner
from benchmarks.gpu.models import config_of
from benchmarks.gpu.workbench import Row, Workbench

LAYERS = 2
NAMES = (PLAIN, "lorica fast 0.75", "peft osf 0.75", "mini_trainer 0.75")
LENGTH, TINY_LENGTH = 4096, 32
SEQUENCES = 2


def run(bench: Workbench) -> None:
    """Measure the installed ones, plain fine-tuning first."""
    plain: dict[str, float] = {}
    took = 0.0
    for name in NAMES:
        contestant = CONTESTANTS[name]
        labels = {"shape": "Llama-3.2-1B", "layers": LAYERS, "method": name, "what": "step"}
        if not contestant.installed:
            bench.skip(labels, f"{contestant.module} is not installed")
            continue
        if not bench.fits(labels, 2 * took):  # a peer's split is not known beforehand, and no faster than Lorica's
            continue
        start = time.monotonic()
        bench.measure(labels, _row, bench, contestant, plain)
        took = time.monotonic() - start


def _row(bench: Workbench, contestant: Contestant, plain: dict[str, float]) -> Row:
    torch.manual_seed(0)
    start = time.monotonic()
    with torch.device(bench.device.name):
        model = LlamaForCausalLM(config_of("Llama-3.2-1B", tiny=bench.tiny, layers=LAYERS))
        runner = contestant.build(model)
    bench.device.synchronize()
    built = time.monotonic() - start
    bench.device.reset_peak()
    length = TINY_LENGTH if bench.tiny else LENGTH
    ids = torch.randint(model.config.vocab_size, (SEQUENCES, length), device=bench.device.name)
    seconds = statistics.median(_step(bench, runner, ids) for _ in range(8))
    base = plain.setdefault("seconds", seconds)
    return {
        "tokens": ids.numel(),
        "build_seconds": built,
        "seconds": seconds,
        "ratio": seconds / base,
        **bench.device.peak(),
    }


def _step(bench: Workbench, runner: Runner, ids: Tensor) -> float:
    start = bench.device.stamp()
    with torch.autocast(bench.device.name, torch.bfloat16):
        loss = runner.model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    runner.optimizer.step()
    runner.optimizer.zero_grad()
    end = bench.device.stamp()
    bench.device.synchronize()
    return bench.device.seconds(start, end)
