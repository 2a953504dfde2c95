"""Part 1: what a training step costs, method after method in one process, plain fine-tuning first and last."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.methods import METHODS, PLAIN, Method, adamw
from benchmarks.gpu.models import config_of, deepen, one_layer, storage_bytes
from benchmarks.gpu.workbench import Row, Workbench
from lorica.constrain.audit_weight import leakage
from lorica.constrain.linear import SubspaceLayer
from lorica.constrain.protect import plan_of, protected_layers
from lorica.subspace.basis import Basis
from lorica.subspace.linalg import split

LENGTH, TINY_LENGTH = 4096, 32
MICRO = 2
"""Sequences of one forward and backward pass; larger steps accumulate gradients over several."""

Sizes = tuple[tuple[int, int, int], ...]
"""Sequences per step, steps to warm up, steps to measure."""

SIZES: Sizes = ((1, 3, 8), (4, 1, 4), (16, 0, 2))
TINY_SIZES: Sizes = ((1, 1, 2), (4, 1, 1))

SAMPLED = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
"""The weights whose leakage is measured."""

MOST_PROTECTED = 0.9


@dataclass(frozen=True)
class Setup:
    """What all methods of one table have in common."""

    shape: str
    methods: tuple[str, ...]
    attention: str = "sdpa"
    compiled: bool = False
    checkpointing: bool = False
    sizes: Sizes = SIZES

    @property
    def labels(self) -> Row:
        return {
            "shape": self.shape,
            "attention": self.attention,
            "compiled": self.compiled,
            "checkpointing": self.checkpointing,
        }


class Runner:
    """A method that is ready to step on one model.

    Attributes:
        prepare_seconds: what the method's preparation of one decoder layer took: for Lorica, the split.
    """

    def __init__(self, bench: Workbench, method: Method, setup: Setup) -> None:
        self.bench, self.method = bench, method
        device = bench.device
        model = one_layer(setup.shape, method.dtype, device.name, tiny=bench.tiny, attention=setup.attention)
        device.synchronize()
        start = time.monotonic()
        model = method.prepare(model)
        device.synchronize()
        self.prepare_seconds = time.monotonic() - start
        self.layers = config_of(setup.shape, tiny=bench.tiny).num_hidden_layers
        deepen(model, self.layers)
        self.blocks = model.model.layers
        self.model: Any = method.finish(model)
        if setup.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if setup.compiled:  # each decoder layer: the same graphs serve all of them
            for block in self.blocks:
                block.compile(backend=device.compiler, dynamic=False)
        self.optimizer = adamw(self.model)
        device.reset_peak()

    def batches(self, sequences: int) -> list[Tensor]:
        """Return the micro-batches of a step: random tokens, the same ones every time."""
        length = TINY_LENGTH if self.bench.tiny else LENGTH
        vocabulary = self.model.config.vocab_size
        device = self.bench.device.name
        generator = torch.Generator(device).manual_seed(1)
        ids = torch.randint(vocabulary, (sequences, length), generator=generator, device=device)
        return list(ids.split(MICRO))

    def gradients(self, batches: list[Tensor]) -> None:
        """Run forward and backward over the micro-batches."""
        for ids in batches:
            with torch.autocast(self.bench.device.name, torch.bfloat16, enabled=self.method.autocast):
                loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
            (loss / len(batches)).backward()

    def update(self) -> None:
        """Step the optimizer (Lorica folds the weights in it) and drop the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def times(self, sequences: int, warm_up: int, repeats: int) -> tuple[list[float], list[float]]:
        """Return the seconds of whole steps and of their updates."""
        batches, device = self.batches(sequences), self.bench.device
        stamps = []
        for _ in range(warm_up + repeats):  # without a pause in between, as in training
            start = device.stamp()
            self.gradients(batches)
            middle = device.stamp()
            self.update()
            stamps.append((start, middle, device.stamp()))
        device.synchronize()
        measured = stamps[warm_up:]
        whole = [device.seconds(start, end) for start, _, end in measured]
        return whole, [device.seconds(middle, end) for _, middle, end in measured]

    def state(self) -> Row:
        """Return the bytes of weights, bases, cores and optimizer state, on the device and on the host."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *_set_aside(self.model)]
        states = self.optimizer.state.values()
        tensors += [value for state in states for value in state.values() if isinstance(value, Tensor)]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        here = self.bench.device.name
        return {
            "state_bytes": storage_bytes(tensors, here),
            "host_bytes": 0 if here == "cpu" else storage_bytes(tensors, "cpu"),
            "trainable": sum(p.numel() for p in trained),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }


def _set_aside(model: torch.nn.Module) -> Iterator[Tensor]:
    """Yield what protected layers hold outside their parameters and buffers."""
    for layer in model.modules():
        if isinstance(layer, SubspaceLayer):
            for value in vars(layer).values():
                if isinstance(value, Tensor):
                    yield value
                elif isinstance(value, tuple):
                    yield from (b for basis in value if isinstance(basis, Basis) for b in basis.buffers())


@dataclass
class Comparison:
    """One table: every method of a setup at every size, as far as the time goes."""

    bench: Workbench
    setup: Setup
    plain: dict[int, float] = field(default_factory=dict)
    """Seconds of a plain step by sequences per step."""
    took: dict[bool, float] = field(default_factory=dict)
    """Seconds that making a runner took last, for methods that protect and others."""
    directions: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def run(self) -> None:
        """Measure all methods, then plain fine-tuning again: how far the two are apart is the machine's drift."""
        names = [*self.setup.methods, f"{PLAIN.name} again"]
        sizes = TINY_SIZES if self.bench.tiny else self.setup.sizes
        for index, name in enumerate(names):
            again = name not in METHODS
            method = PLAIN if again else METHODS[name]
            labels = self.setup.labels | {"method": name}
            share = self.bench.left / (len(names) - index)
            self.one(method, labels, sizes[:1] if again else sizes, share)

    def one(self, method: Method, labels: Row, sizes: Sizes, share: float) -> None:
        """Measure one method within its share of the seconds."""
        if not method.installed:
            self.bench.skip(labels, f"{method.package} is not installed")
            return
        protects = method.share is not None
        if not self.bench.fits(labels | {"what": "build"}, self.took.get(protects, 0.0)):
            return
        start = time.monotonic()
        holder: list[Runner] = []  # emptied before the next method is built: two models may not fit
        known = protects and protects in self.took  # the split of the same weights lies in Lorica's cache
        built = self.bench.measure(labels | {"what": "build", "cached": known}, self._build, method, holder)
        self.took[protects] = time.monotonic() - start
        if built is not None:
            self._sizes(holder[0], labels, sizes, start + share)
        holder.clear()
        if self.setup.compiled:
            torch.compiler.reset()
        self.bench.device.free()

    def _build(self, method: Method, holder: list[Runner]) -> Row:
        runner = Runner(self.bench, method, self.setup)
        holder.append(runner)
        return {"prepare_seconds_per_layer": runner.prepare_seconds, "layers": runner.layers}

    def _sizes(self, runner: Runner, labels: Row, sizes: Sizes, end: float) -> None:
        guess = 0.0
        for index, (sequences, warm_up, repeats) in enumerate(sizes):
            labels = labels | {"what": "step", "tokens": sequences * (TINY_LENGTH if self.bench.tiny else LENGTH)}
            steps = warm_up + repeats
            # The first size is owed to every method; larger ones come out of the method's own share.
            share = None if index == 0 else max(end - time.monotonic(), 0.0)
            if not self.bench.fits(labels, guess * sequences * steps, share=share):
                return
            row = self.bench.measure(labels, self._step, runner, sequences, warm_up, repeats)
            if row is None:
                return
            guess = row["seconds"] / sequences
            if index == 0 and runner.method.share is not None:
                self.bench.measure(labels | {"what": "leakage"}, self._leakage, runner)

    def _step(self, runner: Runner, sequences: int, warm_up: int, repeats: int) -> Row:
        runner.bench.device.reset_peak()
        whole, update = runner.times(sequences, warm_up, repeats)
        seconds = statistics.median(whole)
        base = self.plain.setdefault(sequences, seconds) if runner.method is PLAIN else self.plain.get(sequences)
        length = TINY_LENGTH if self.bench.tiny else LENGTH
        return {
            "seconds": seconds,
            "seconds_all": whole,
            "update_seconds": statistics.median(update),
            "tokens_per_second": sequences * length / seconds,
            "ratio": None if base is None else seconds / base,
            **runner.bench.device.peak(),
            **runner.state(),
        }

    def _leakage(self, runner: Runner) -> Row:
        """Measure the trained change against directions computed anew from the weight that came in, in float64."""
        layers, plan = protected_layers(runner.model), plan_of(runner.model)
        assert plan is not None
        counts = {entry.name: entry.k for entry in plan.entries}
        rows: Row = {}
        for name in SAMPLED:
            layer = layers[name]
            before = layer.base.to(layer.core.device)
            k = counts[name]
            u, v = (side.to(before.device) for side in self._directions(name, before))
            master = leakage(layer.delta(), u[:, :k], v[:, :k])
            stored = leakage(layer.matrix.detach().double() - before.double(), u[:, :k], v[:, :k])
            rows[name.rsplit(".", 1)[1]] = {"master": max(master), "stored": max(stored)}
        return {"leakage": rows, "master_leakage": max(row["master"] for row in rows.values())}

    def _directions(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        if name not in self.directions:
            parts = split(weight, int(MOST_PROTECTED * min(weight.shape)))
            self.directions[name] = (parts.u_MK.cpu(), parts.v_NK.cpu())  # not among the bytes that are measured
        return self.directions[name]


def run(bench: Workbench, **settings: Any) -> None:
    """Measure one table."""
    Comparison(bench, Setup(**settings)).run()
