"""Weights that FSDP2 sharded before ``protect`` or after it: several processes train as one does."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.optim import AdamW

import lorica
from lorica.constrain.protect import bases_of, protected_layers, protected_of
from lorica.errors import LoricaError
from tests.builders import batch, tiny, trainable
from tests.distributed.ranks import on_ranks
from tests.distributed.trainings import (
    Course,
    Weights,
    difference,
    in_ddp,
    in_fsdp,
    load_sharded,
    plan_of_shapes,
    save,
    weights_of,
    whole,
    worst_leakage,
)

TWO_TASKS = Course(tasks=2)


@cache
def alone(course: Course, name: str = "llama", dtype: torch.dtype = torch.float32) -> list[Weights]:
    return course.run(tiny(name, dtype))


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.reliability("R30")
def test_two_tasks_on_a_model_that_was_loaded_sharded(size: int, tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    for after in on_ranks(size, lambda rank: TWO_TASKS.run(load_sharded(folder, size), rank, size)):
        for mine, theirs in zip(after, alone(TWO_TASKS), strict=True):
            assert difference(mine, theirs) <= 1e-6
        assert worst_leakage(tiny("llama"), after[0]) <= 1e-5


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("wrap", [in_fsdp, in_ddp])
@pytest.mark.reliability("R30")
def test_a_model_that_is_wrapped_after_protect(wrap: Any, size: int) -> None:
    course = Course()
    for (after,) in on_ranks(size, lambda rank: course.run(tiny("llama"), rank, size, wrap)):
        assert difference(after, alone(course)[0]) <= 1e-6
        assert worst_leakage(tiny("llama"), after) <= 1e-5


def test_what_fsdp_holds_is_not_released() -> None:
    def work(rank: int) -> None:
        model = tiny("llama")
        lorica.protect(model, plan_of_shapes(model))
        in_fsdp(model)
        for _ in range(2):  # also once it has trained
            with pytest.raises(LoricaError, match=r"FSDP2 was applied to the model after lorica\.protect"):
                lorica.release(model)
            Course(steps=1, parts=2).train(model, model, rank, 2)

    on_ranks(2, work)


@pytest.mark.parametrize(("sharded", "message"), [(True, "not tensor parallel ones"), (False, "but not by FSDP2")])
def test_tensor_parallel_weights_are_refused(sharded: bool, message: str) -> None:
    def work(rank: int) -> None:
        model = tiny("llama")
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("fsdp", "tp"))
        parallelize_module(model.model.layers[0].mlp, mesh["tp"], {"up_proj": ColwiseParallel()})
        if sharded:
            fully_shard(model, mesh=mesh["fsdp"])
        with pytest.raises(LoricaError, match=message):
            lorica.protect(model, plan_of_shapes(model))

    on_ranks(2, work)


FAMILIES = ("gpt2", "t5", "llama-tied", "qwen3", "bert", "opt")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "gpt2" else pytest.mark.slow) for name in FAMILIES]
)
def test_uneven_parts_of_every_family(name: str, tmp_path: Path) -> None:
    """Dimensions are no multiples of three. In float64, though transformers takes the loss of float32 logits."""
    course = Course(steps=4, tasks=2, parts=3)
    folder = save(name, tmp_path, torch.float64)
    for after in on_ranks(3, lambda rank: course.run(load_sharded(folder, 3).double(), rank, 3)):
        for mine, theirs in zip(after, alone(course, name, torch.float64), strict=True):
            assert difference(mine, theirs) <= 1e-6


def test_w0_and_the_bases_lie_at_one_process_each(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)

    def work(rank: int) -> list[Any]:
        model = load_sharded(folder, 2)
        lorica.protect(model, plan_of_shapes(model))
        layers = protected_layers(model)
        return [
            sum(layer.held for layer in layers.values()),
            sum(core.to_local().numel() for core in trainable(model)),
            [layer.shards.owner for layer in layers.values()],
            sum(buffer.numel() for layer in layers.values() for buffer in layer.buffers()),
        ]

    model = tiny("llama")
    lorica.protect(model, plan_of_shapes(model))
    layers = protected_layers(model)
    told = on_ranks(2, work)
    assert sum(held for held, *_ in told) == sum(layer.held for layer in layers.values())
    assert sum(cores for _, cores, *_ in told) == sum(core.numel() for core in trainable(model))
    assert max(held for held, *_ in told) <= 1.1 * min(held for held, *_ in told)
    assert told[0][2] == told[1][2]
    assert {buffers for *_, buffers in told} == {0}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_w0_and_the_bases_may_lie_aside(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path, torch.bfloat16)  # of which the exact bases are set aside, too
    course = Course(steps=3, parts=2)

    def work(rank: int) -> list[Weights]:
        found = []
        for memory in ("fast", "lean"):
            model = load_sharded(folder, 2)
            lorica.protect(model, plan_of_shapes(model), memory=memory)
            course.train(model, model, rank, 2)
            found.append(weights_of(model))
        return found

    for fast, lean in on_ranks(2, work):
        assert difference(fast, lean) == 0  # what is sent is narrow in both
        assert difference(fast, weights_of(tiny(name, torch.bfloat16))) > 0


def test_a_state_that_is_loaded_is_folded(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    course = Course(steps=2)

    def work(rank: int) -> list[Any]:
        model, other = load_sharded(folder, 2), load_sharded(folder, 2)
        for each in (model, other):
            lorica.protect(each, plan_of_shapes(each))
        course.train(model, model, rank, 2)
        state = get_model_state_dict(model)
        set_model_state_dict(other, {name: tensor.clone() for name, tensor in state.items()})
        both = difference(weights_of(model), weights_of(other))
        with torch.no_grad():
            for layer in protected_layers(other).values():
                layer.weight.to_local().zero_()  # the weights are to come from the cores
        cores = {name: tensor for name, tensor in state.items() if name.endswith("core")}
        set_model_state_dict(other, cores, options=StateDictOptions(strict=False))
        return [both, difference(weights_of(model), weights_of(other))]

    assert on_ranks(2, work) == [[0.0, 0.0], [0.0, 0.0]]


def test_a_core_written_by_hand_counts_when_the_model_is_released(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)

    def work(rank: int) -> list[float]:
        model = load_sharded(folder, 2)
        before = weights_of(model)
        lorica.protect(model, plan_of_shapes(model))
        unchanged = difference(before, weights_of(model))
        with torch.no_grad():
            for core in trainable(model):
                core.add_(0.1)
        lorica.release(model)
        return [unchanged, difference(before, weights_of(model))]

    for unchanged, moved in on_ranks(2, work):
        assert unchanged == 0
        assert moved > 0.01


def test_weights_of_two_dtypes() -> None:
    def work(rank: int) -> list[str]:
        torch.manual_seed(0)
        narrow, wide = nn.Linear(6, 8, dtype=torch.bfloat16), nn.Linear(8, 6)
        model = nn.Sequential(nn.Sequential(narrow), nn.Sequential(wide))
        for unit in (*model, model):
            fully_shard(unit)
        lorica.protect(model, lorica.plan(model, 0.5, target_modules=r"\d\.0"))
        optimizer = AdamW(trainable(model), lr=1e-2)
        for _ in range(2):
            model[1](model[0](torch.ones(3, 6, dtype=torch.bfloat16)).float()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [str(layer.weight.dtype) for (layer,) in model]

    assert on_ranks(2, work) == [["torch.bfloat16", "torch.float32"]] * 2


def test_no_process_keeps_a_whole_weight_of_a_model_that_was_sharded_afterwards() -> None:
    def work(rank: int) -> list[int]:
        model = tiny("llama")
        lorica.protect(model, plan_of_shapes(model))
        weights = [weakref.ref(layer.weight) for layer in protected_layers(model).values()]
        in_fsdp(model)
        Course(steps=1, parts=2).train(model, model, rank, 2)
        gc.collect()
        return [sum(weight() is not None for weight in weights), len(weights)]

    assert on_ranks(2, work) == [[0, 14], [0, 14]]


def test_the_hidden_step_of_loading_an_optimizer_changes_nothing(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)

    def work(rank: int) -> float:
        model = load_sharded(folder, 2)
        lorica.protect(model, plan_of_shapes(model))
        optimizer = AdamW(trainable(model), lr=1e-2)
        model(**batch(model, seed=rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        before = weights_of(model)
        fresh = AdamW(trainable(model), lr=1e-2)
        set_optimizer_state_dict(model, fresh, get_optimizer_state_dict(model, optimizer))
        return difference(before, weights_of(model))

    assert on_ranks(2, work) == [0.0, 0.0]


def test_a_weight_that_cannot_be_split_stops_all_processes(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    name = "model.layers.1.mlp.up_proj"

    def work(rank: int) -> str:
        model = load_sharded(folder, 2)
        with torch.no_grad():
            model.get_submodule(name).weight.to_local().fill_(float("nan"))
        with pytest.raises(LoricaError) as error:
            lorica.protect(model, plan_of_shapes(model))
        assert not protected_layers(model)
        return str(error.value)

    told = on_ranks(2, work)
    assert sum(name in text for text in told) == 1
    assert sum("could not protect its share of the weights; see its message" in text for text in told) == 1


def test_what_only_an_owner_can_tell(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)

    def work(rank: int) -> int:
        model = load_sharded(folder, 2)
        lorica.protect(model, plan_of_shapes(model))
        layers = list(protected_layers(model).values())
        own = [layer for layer in layers if layer.shards.mine]
        for layer in layers:
            with pytest.raises(LoricaError, match="the core of this layer is sharded over processes"):
                layer.delta()
            with pytest.raises(LoricaError, match="cannot be copied or pickled; save its state"):
                copy.deepcopy(layer)
            if layer in own:
                assert protected_of(layer).u_MA.shape[1] == int(0.75 * min(layer.weight.shape))
            else:
                with pytest.raises(LoricaError, match=f"lie at another process, number {1 - rank}"):
                    protected_of(layer)
        assert {name.rpartition("_proj")[0] for name in bases_of(model)} == {
            name.rpartition("_proj")[0] for name, layer in protected_layers(model).items() if layer in own
        }
        return len(own)

    assert sum(on_ranks(2, work)) == 14


def test_a_layer_that_is_a_unit_by_itself_is_refused() -> None:
    def work(rank: int) -> None:
        model = nn.Sequential(nn.Linear(4, 4))
        fully_shard(model[0])
        with pytest.raises(LoricaError, match="0 was given to fully_shard by itself; give it the block"):
            lorica.plan(model, 0.5, target_modules="0")

    on_ranks(2, work)


def test_one_protected_layer_in_a_model_of_one_unit() -> None:
    """A model that is one unit of FSDP2: the layer's parameters are gathered before its own hooks would see them."""

    def work(rank: int) -> float:
        model, whole_model = nn.Sequential(nn.Linear(7, 5)), nn.Sequential(nn.Linear(7, 5))
        whole_model.load_state_dict(model.state_dict())
        for each in (model, whole_model):
            lorica.protect(each, lorica.plan(each, 0.5, target_modules="0"))
        fully_shard(model)
        x = torch.ones(3, 7)
        for each in (model, whole_model):
            optimizer = AdamW(trainable(each), lr=1e-2)
            for _ in range(3):
                each(x).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return float((whole(model[0].weight) - whole_model[0].weight).abs().max())

    torch.manual_seed(0)
    assert max(on_ranks(2, work)) <= 1e-6
