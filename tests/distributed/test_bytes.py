"""The bytes that a process receives in a step: what the forecast computes from shapes is what the collectives move.

The model has the proportions of Llama-3.2-1B, 1/16 as wide and 1/4 as deep with as large a part of embeddings and head,
which is not tied; in bfloat16. Plain fine-tuning trains embeddings and head as well.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from statistics import mean
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import lorica
from lorica.forecast.communication import (
    BACKWARD,
    CORES,
    FORWARD,
    GRADIENTS,
    LENT,
    RETURNED,
    WEIGHTS,
    Layout,
    blocks_of,
    received_replicated,
    received_sharded,
    sizes_of,
    units_of,
)
from tests.builders import trainable
from tests.distributed.bytes import Received, from_sockets
from tests.distributed.ranks import on_ranks
from tests.distributed.trainings import in_ddp, in_fsdp, plan_of_shapes

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "vocab_size": 2004,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
TOLERANCE = 0.05

PLAIN, LOADED, WRAPPED = "plain", "loaded sharded", "wrapped afterwards"
DDP = "DDP"
REPLICATED = ("plain DDP", DDP)
SETUPS = (PLAIN, LOADED, WRAPPED, *REPLICATED)
SIZES = [2, pytest.param(4, marks=pytest.mark.slow)]
LINUX = sys.platform == "linux"
on_linux = pytest.mark.skipif(not LINUX, reason="the kernel's count of received bytes is Linux's")


def built(setup: str, device: str = "cpu") -> LlamaForCausalLM:
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig.from_dict(SHAPE)).bfloat16().train()
    return _protected(setup, model)


def _protected(setup: str, model: Any) -> Any:
    return model if setup.startswith(PLAIN) else lorica.protect(model, plan_of_shapes(model))


def prepared(setup: str, folder: str, layout: Layout) -> tuple[nn.Module, nn.Module]:
    """Return a model and what is called in its place."""
    spread = DistributedConfig(fsdp_size=layout.shards, dp_replicate_size=layout.replicas)
    sharded = spread if setup in (PLAIN, LOADED) else None
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=sharded).train()
    model = _protected(setup, model)
    wraps = dict.fromkeys(REPLICATED, in_ddp) | {WRAPPED: in_fsdp}
    return model, wraps.get(setup, lambda same: same)(model)


def step(model: nn.Module, called: nn.Module, optimizer: AdamW, micro_batches: int) -> Counter[str]:
    """Take a step and return the bytes that this process received, by pass and collective, and from sockets in all."""
    counted, before = Received(), from_sockets() if LINUX else 0
    ids = torch.arange(16).view(2, 8)
    for _ in range(micro_batches):
        with counted.during("forward"):
            loss = called(input_ids=ids, labels=ids).loss
        with counted.during("backward"):
            loss.backward()
    with counted.during("step"):
        nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
    optimizer.zero_grad()
    return counted.total + Counter(sockets=_more_than(before) if LINUX else 0)


def _more_than(before: int) -> int:
    """Return what the sockets have received since, when all processes are done; none may close any until then."""
    dist.barrier()
    received = from_sockets() - before
    dist.barrier()
    return received


def second_step(setup: str, folder: str, layout: Layout, micro_batches: int) -> dict[str, int]:
    model, called = prepared(setup, folder, layout)
    optimizer = AdamW(trainable(model), lr=1e-3)
    return dict([step(model, called, optimizer, micro_batches) for _ in range(2)][1])


@cache
def measured(setup: str, layout: Layout, micro_batches: int = 1) -> Counter[str]:
    """Return the mean over the processes of what each received in a step."""
    with tempfile.TemporaryDirectory() as folder:
        built(PLAIN).save_pretrained(folder)
        told = on_ranks(layout.devices, lambda rank: second_step(setup, folder, layout, micro_batches))
    return Counter({kind: round(mean(one.get(kind, 0) for one in told)) for kind in set().union(*told)})


def of_collectives(counts: Counter[str]) -> int:
    return sum(nbytes for kind, nbytes in counts.items() if kind != "sockets")


def computed(setup: str, layout: Layout, micro_batches: int = 1) -> Counter[str]:
    model = built(setup, "meta")
    if setup in REPLICATED:
        return received_replicated(sizes_of(model, []), layout.devices)
    units = blocks_of(model) if setup == WRAPPED else units_of(model)
    return received_sharded(sizes_of(model, units), layout, micro_batches, wrapped=setup == WRAPPED)


def check(setup: str, layout: Layout, micro_batches: int = 1) -> None:
    counts, forecast = measured(setup, layout, micro_batches), computed(setup, layout, micro_batches)
    by_kind = {
        FORWARD: counts["forward, gather"],
        BACKWARD: counts["backward, gather"],
        LENT: counts["backward, broadcast"],
        GRADIENTS: sum(counts[f"backward, {kind}"] for kind in ("reduce", "reduce-scatter", "all-reduce")),
        RETURNED: counts["backward, all-to-all"],
    }
    for kind, nbytes in by_kind.items():
        assert nbytes == pytest.approx(forecast[kind], rel=TOLERANCE), kind
    assert counts["step, all-to-all"] == pytest.approx(forecast[CORES] + forecast[WEIGHTS], rel=TOLERANCE)
    assert of_collectives(counts) == pytest.approx(forecast.total(), rel=TOLERANCE)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("setup", SETUPS)
def test_computed_from_shapes_and_counted(setup: str, size: int) -> None:
    check(setup, Layout(size))


@pytest.mark.slow
@pytest.mark.parametrize("setup", [PLAIN, LOADED, WRAPPED])
def test_two_micro_batches(setup: str) -> None:
    check(setup, Layout(2), micro_batches=2)


@pytest.mark.slow
@pytest.mark.parametrize("setup", [PLAIN, LOADED])
def test_two_replicas_of_two_shards(setup: str) -> None:
    check(setup, Layout(2, 2))


@on_linux
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("setup", SETUPS)
def test_the_kernel_counts_the_same(setup: str, size: int) -> None:
    counts = measured(setup, Layout(size))
    more = counts["backward, reduce-scatter"] + counts["backward, reduce"] / size  # as gloo makes them
    assert counts["sockets"] == pytest.approx(of_collectives(counts) + more, rel=TOLERANCE)


@pytest.mark.parametrize("size", SIZES)
def test_less_than_plain_fine_tuning(size: int) -> None:
    assert of_collectives(measured(LOADED, Layout(size))) < of_collectives(measured(PLAIN, Layout(size)))


COLLECTIVES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "gather": lambda whole, part: dist.all_gather_into_tensor(whole, part),
    "reduce-scatter": lambda whole, part: dist.reduce_scatter_tensor(part, whole),
    "all-reduce": lambda whole, part: dist.all_reduce(whole),
    "reduce": lambda whole, part: dist.reduce(whole, dst=1),
    "broadcast": lambda whole, part: dist.broadcast(whole, src=1),
    "all-to-all": lambda whole, part: dist.all_to_all_single(torch.empty_like(whole), whole),
}


@on_linux
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor:FutureWarning")
def test_each_rule_of_counting_is_the_kernels(size: int) -> None:
    def work(rank: int) -> dict[str, list[int]]:
        whole, part = torch.ones(2**20), torch.ones(2**20 // size)
        return {kind: _both(partial(call, whole, part)) for kind, call in COLLECTIVES.items()}

    told = on_ranks(size, work)
    for kind, factor in {**dict.fromkeys(COLLECTIVES, 1.0), "reduce-scatter": 2.0, "reduce": 1 + 1 / size}.items():
        pairs = [one[kind] for one in told]
        if kind == "reduce":  # its rule is of the mean
            pairs = [[round(mean(numbers)) for numbers in zip(*pairs, strict=True)]]
        for counted, from_kernel in pairs:
            assert from_kernel == pytest.approx(factor * counted, rel=0.01, abs=5000), kind


def _both(call: Callable[[], Any]) -> list[int]:
    """Return the bytes that a collective brings, by the rules and by the kernel."""
    call()  # the first one connects
    dist.barrier()
    counted, before = Received(), from_sockets()
    with counted.during("test"):
        call()
    return [counted.total.total(), _more_than(before)]
