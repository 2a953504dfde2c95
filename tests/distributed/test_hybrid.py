"""Hybrid shard and offload: replicas of a sharded model, 2 x 2 processes, train as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

import lorica
from lorica.training.sharding import rest_on_host
from tests.builders import tiny
from tests.distributed.ranks import on_ranks
from tests.distributed.trainings import (
    Course,
    Weights,
    difference,
    load_sharded,
    plan_of_shapes,
    save,
    worst_leakage,
)


def loaded(folder: Path) -> nn.Module:
    spread = DistributedConfig(fsdp_size=2, dp_replicate_size=2)
    return LlamaForCausalLM.from_pretrained(folder, distributed_config=spread).train()


def wrapped(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=mesh)
    return model


def test_replicas_of_a_model_that_was_loaded_sharded(tmp_path: Path) -> None:
    folder, course = save("llama", tmp_path), Course()
    (alone,) = course.run(tiny("llama"))
    for (after,) in on_ranks(4, lambda rank: course.run(loaded(folder), rank, 4)):
        assert difference(after, alone) <= 1e-6
        assert worst_leakage(tiny("llama"), after) <= 1e-5


@pytest.mark.slow
def test_replicas_of_a_model_that_is_wrapped_after_protect() -> None:
    course = Course()
    (alone,) = course.run(tiny("llama"))
    for (after,) in on_ranks(4, lambda rank: course.run(tiny("llama"), rank, 4, wrapped)):
        assert difference(after, alone) <= 1e-6
        assert worst_leakage(tiny("llama"), after) <= 1e-5


def offloaded(model: nn.Module) -> nn.Module:
    for unit in (*model.model.layers, model):
        fully_shard(unit, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return model


@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_offload_before_protect_or_after_it(when: str) -> None:
    course = Course(tasks=2 if when == "before" else 1)
    alone = course.run(tiny("llama"))

    def work(rank: int) -> list[Weights]:
        if when == "before":
            return course.run(offloaded(tiny("llama")), rank, 2)
        return course.run(tiny("llama"), rank, 2, offloaded)

    for after in on_ranks(2, work):
        assert max(map(difference, after, alone)) <= 1e-6
        assert worst_leakage(tiny("llama"), after[0]) <= 1e-5


def test_what_is_loaded_onto_the_device_is_put_to_rest_on_the_host(tmp_path: Path) -> None:
    """Parameters are the same objects, with the same numbers; buffers stay where they are."""
    folder = save("llama", tmp_path)

    def work(rank: int) -> None:
        model = load_sharded(folder, 2)
        parameters, buffers = list(model.parameters()), list(model.buffers())
        before = [parameter.to_local().clone() for parameter in parameters]
        rest_on_host(model)
        assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
        assert all(one is other for one, other in zip(buffers, model.buffers(), strict=True))
        assert all(map(torch.equal, before, (parameter.to_local() for parameter in parameters)))
        assert parameters[0].device.type == "cpu"

    on_ranks(2, work)


def test_replicas_hold_the_same_to_the_last_bit(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)

    def work(rank: int) -> list[float]:
        model = loaded(folder)
        lorica.protect(model, plan_of_shapes(model))
        Course(steps=2).train(model, model, rank, 4)
        part: list[float] = model.model.layers[1].mlp.up_proj.weight.to_local().tolist()
        return part

    told = on_ranks(4, work)
    assert told[0] == told[2] != told[1] == told[3]
