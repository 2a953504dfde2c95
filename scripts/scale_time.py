"""The step time of several GPUs, computed: arithmetic and traffic from shapes, over rates that are assumed here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from lorica.constrain.exchange import cheapest_exchange, exchanges
from lorica.constrain.reduced import cheapest, order_flops
from lorica.forecast.communication import (
    BACKWARD,
    CORES,
    FORWARD,
    GRADIENTS,
    LENT,
    RETURNED,
    WEIGHTS,
    Layout,
    Matrix,
    Sizes,
    received_sharded,
)
from lorica.subspace.basis import Basis, Everything
from lorica.subspace.free_basis import free_basis


class Model(NamedTuple):
    """A Llama: its widths, the width of keys and values, its blocks and its vocabulary."""

    hidden: int
    intermediate: int
    keys: int
    blocks: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """All numbers, but those of the norms."""
        return self.blocks * sum(matrix.m * matrix.n for matrix in self.block(0)) + 2 * self.hidden * self.vocabulary

    def block(self, share: float) -> list[Matrix]:
        """Return the weights of one block, a share of whose directions is protected."""
        h, i, k = self.hidden, self.intermediate, self.keys
        shapes = [(h, h), (k, h), (k, h), (h, h), (i, h), (i, h), (h, i)]
        return [Matrix(m, n, *2 * [int(share * min(m, n))], derived=True) for m, n in shapes]


MODELS = {
    "8 B": Model(4096, 14336, 1024, 32, 128256),
    "70 B": Model(8192, 28672, 1024, 80, 128256),
    "405 B": Model(16384, 53248, 1024, 126, 128256),
}


@dataclass(frozen=True)
class Assumed:
    """All that is assumed of hardware and training."""

    memory: float = 80e9
    flops: float = 989e12
    utilisation: float = 0.4
    exact_flops: float = 67e12
    exact_utilisation: float = 0.6
    node: int = 8
    inside: float = 360e9
    port: float = 45e9
    latency: float = 20e-6
    overlap: float = 0.8
    tokens: int = 16384
    length: int = 4096

    def told(self) -> dict[str, str]:
        """Return each in words."""
        return {
            "memory of a GPU": f"{self.memory / 1e9:.0f} GB",
            "products in bfloat16": f"{self.flops / 1e12:.0f} TFLOP/s at {self.utilisation:.0%} utilisation",
            "products in float32 (the fold)": f"{self.exact_flops / 1e12:.0f} TFLOP/s at {self.exact_utilisation:.0%}",
            "GPUs in a node": f"{self.node}",
            "received by a GPU inside its node (NVLink)": f"{self.inside / 1e9:.0f} GB/s",
            "received by a GPU from other nodes (a port of InfiniBand each)": f"{self.port / 1e9:.0f} GB/s",
            "gathers, reductions and broadcasts between nodes": f"the ports of a node together, "
            f"{self.node * self.port / 1e9:.0f} GB/s, and no more than inside",
            "all-to-alls between nodes": "each GPU's own port for what comes from other nodes",
            "start of a collective": f"{self.latency * 1e6:.0f} us, times log2 of the GPUs",
            "gathers and the reduction of gradients": f"{self.overlap:.0%} of their time hidden behind arithmetic",
            "bases, gradients from owners, fold": "not hidden at all, as the engine waits for each",
            "a step": f"{self.tokens} tokens on each GPU in one micro-batch, rows of {self.length}, activations "
            "checkpointed",
            "left out": "the optimizer's own arithmetic, data, the slowest of many GPUs",
        }


ASSUMED = Assumed()


@cache
def sizes(model: Model, share: float) -> Sizes:
    """Return the bytes of a model in bfloat16, whose head is FSDP2's root unit; share 0 is plain fine-tuning."""
    matrices = model.block(share)
    ends = model.hidden * model.vocabulary
    return Sizes.of(matrices, model.blocks, outside=2 * ends, kept=ends, weight=2, gradient=2)


@cache
def _sides(matrix: Matrix) -> tuple[Basis, Basis]:
    weight = torch.empty(matrix.m, matrix.n, device="meta")
    out = free_basis(weight.new_empty(matrix.m, matrix.out), torch.float32, weight if matrix.derived else None)
    return out, free_basis(weight.new_empty(matrix.n, matrix.inp), torch.float32, weight.T if matrix.derived else None)


def arithmetic(model: Model, share: float, tokens: int, length: int, gpus: int) -> float:
    """Return the operations of one micro-batch: forward twice (checkpointed), dX, and the gradients of what trains."""
    dense = 2 * tokens * sum(matrix.m * matrix.n for matrix in model.block(share))
    head = 2 * tokens * model.hidden * model.vocabulary
    attention = 2 * tokens * length * model.hidden  # two products, half of which is masked
    gradients = sum(gradient_arithmetic(matrix, tokens, gpus) for matrix in model.block(share)) if share else dense
    return model.blocks * (3 * dense + gradients + 4 * attention) + head * (2 if share else 3)


def gradient_arithmetic(matrix: Matrix, tokens: int, gpus: int) -> int:
    """Return the operations of a core's gradient: a GPU's own, and what all wait for its owner to do."""
    out, inp = _sides(matrix)
    way = cheapest_exchange(exchanges(out, inp), gpus)
    lent_out, lent_inp = (out, inp) if gpus == 1 else (
        out if way.lends_out else Everything(out.dim), inp if way.lends_inp else Everything(inp.dim)
    )  # fmt: skip
    own = order_flops(tokens, lent_out, lent_inp)
    left_out = inp.free * (out.flops() - lent_out.flops())
    left_inp = out.free * (inp.flops() - lent_inp.flops())
    return own[cheapest(own)] + left_out + left_inp


def fold_arithmetic(model: Model, share: float) -> float:
    """Return the operations of folding all weights, ``W0 + Q_U M Q_V^T``."""
    total = 0.0
    for out, inp in map(_sides, model.block(share)) if share else ():
        first = out.free * inp.flops() + inp.dim * out.flops()
        total += min(first, inp.free * out.flops() + out.dim * inp.flops())
    return model.blocks * total


def seconds(model: Model, share: float, gpus: int, given: Assumed = ASSUMED) -> float:
    """Return the seconds of a step of a model that is sharded over some GPUs; share 0 is plain fine-tuning."""
    work = arithmetic(model, share, given.tokens, given.length, gpus) / (given.flops * given.utilisation)
    fold = fold_arithmetic(model, share) / (given.exact_flops * given.exact_utilisation) / gpus
    if gpus == 1:
        return work + fold
    counts = received_sharded(sizes(model, share), Layout(gpus))
    weights = 7 * model.blocks
    reductions = weights if share else model.blocks + 2
    hideable = [(FORWARD, model.blocks + 2), (BACKWARD, model.blocks + 1), (GRADIENTS, reductions)]
    hidden_at_most = given.overlap * sum(_together(counts[kind], calls, gpus, given) for kind, calls in hideable)
    exposed = hidden_at_most / given.overlap - min(hidden_at_most, work)
    if not share:
        return work + exposed
    exposed += _together(counts[LENT], weights, gpus, given)
    exposed += _pairwise(gpus * counts[RETURNED], weights, gpus, given)  # one at a time is an owner
    turns = math.ceil(weights / gpus)
    return work + fold + exposed + _pairwise(counts[CORES] + counts[WEIGHTS], 2 * turns, gpus, given)


def _together(nbytes: int, calls: int, gpus: int, given: Assumed) -> float:
    rate = given.inside if gpus <= given.node else min(given.inside, given.node * given.port)
    return nbytes / rate + calls * given.latency * math.log2(gpus)


def _pairwise(nbytes: int, calls: int, gpus: int, given: Assumed) -> float:
    away = max(0, gpus - given.node) / (gpus - 1)
    return nbytes * ((1 - away) / given.inside + away / given.port) + calls * given.latency * math.log2(gpus)
