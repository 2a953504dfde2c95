"""Hybrid shard and offload: replicas of a sharded model, 2 x 2 processes, train as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

import lorica
from lorica.errors import LoricaError
from tests.builders import tiny
from tests.distributed.ranks import on_ranks
from tests.distributed.trainings import (
    Course,
    difference,
    in_fsdp,
    load_sharded,
    plan_of_shapes,
    save,
    worst_leakage,
)

MOVED = "keeps a protected weight on the CPU and computes on cuda; leave the offload out"


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


def test_offload_to_the_device_itself() -> None:
    """Where the processes compute on the CPU an offload moves nothing, and is none to refuse."""
    course = Course(steps=3)
    (alone,) = course.run(tiny("llama"))

    def work(rank: int) -> float:
        model = tiny("llama")
        for unit in (*model.model.layers, model):
            fully_shard(unit, offload_policy=CPUOffloadPolicy(pin_memory=False))
        return difference(course.run(model, rank, 2)[0], alone)

    assert max(on_ranks(2, work)) <= 1e-6


def as_on_gpus(model: nn.Module) -> nn.Module:
    """Return a model that looks as if it computed on GPUs, of which there are none here."""
    model.model.layers[0].self_attn.q_proj.weight.device_mesh._device_type = "cuda"
    return model


def test_offload_from_another_device_is_refused(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)

    def work(rank: int) -> None:
        model = as_on_gpus(load_sharded(folder, 2))
        with pytest.raises(LoricaError, match=MOVED):
            lorica.protect(model, plan_of_shapes(model))

    on_ranks(2, work)


def test_offload_that_comes_after_protect_is_refused_in_the_first_step() -> None:
    def work(rank: int) -> None:
        model = as_on_gpus(in_fsdp(lorica.protect(tiny("llama"), plan_of_shapes(tiny("llama")))))
        with pytest.raises(LoricaError, match=MOVED):
            Course(steps=1, parts=2).train(model, model, rank, 2)

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
