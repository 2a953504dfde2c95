"""Of R processes that shard a model each holds 1 / R of it: weights, W0, bases, cores and the optimizer's states."""

from __future__ import annotations

import tempfile
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import lorica
from lorica.constrain.protect import protected_layers
from lorica.forecast.communication import blocks_of, sizes_of
from lorica.forecast.devices import state_sharded
from tests.builders import batch, trainable
from tests.distributed.ranks import on_ranks
from tests.distributed.trainings import in_fsdp, plan_of_shapes

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "vocab_size": 320,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOLERANCE = 0.15
KINDS = ("weights", "W0", "bases", "cores", "optimizer states")


def held(setup: str, folder: str, size: int) -> dict[str, int]:
    """Train a step and return the bytes of tensors that this process then holds, by kind."""
    sharded = DistributedConfig(fsdp_size=size) if setup == "loaded sharded" and size > 1 else None
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=sharded).train()
    lorica.protect(model, plan_of_shapes(model))
    if setup == "wrapped afterwards" and size > 1:
        in_fsdp(model)
    optimizer = AdamW(trainable(model), lr=1e-3)
    model(**batch(model)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    layers = protected_layers(model).values()
    states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    return {
        "weights": _nbytes([p for name, p in model.named_parameters() if not name.endswith(".core")]),
        "W0": _nbytes([layer.base for layer in layers]),
        "bases": _nbytes([part for layer in layers for basis in layer.exact_bases for part in basis.buffers()]),
        "cores": _nbytes([layer.core for layer in layers]),
        "optimizer states": _nbytes(states),
    }


def _nbytes(tensors: list[Tensor]) -> int:
    return sum((one.to_local() if isinstance(one, DTensor) else one).nbytes for one in tensors)


@cache
def measured(setup: str, size: int) -> list[dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        blank("cpu").save_pretrained(folder)
        return on_ranks(size, lambda rank: held(setup, folder, size))


def blank(device: str) -> Any:
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig.from_dict(SHAPE)).bfloat16()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("setup", ["loaded sharded", "wrapped afterwards"])
def test_each_process_holds_its_part(setup: str, size: int) -> None:
    (alone,) = measured(setup, 1)
    for process in measured(setup, size):
        for kind in KINDS:
            assert process[kind] == pytest.approx(alone[kind] / size, rel=TOLERANCE), kind


@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_forecast_says_so(size: int) -> None:
    model: nn.Module = blank("meta")
    lorica.protect(model, plan_of_shapes(model))
    forecast = state_sharded(sizes_of(model, blocks_of(model)), size)
    for process in measured("loaded sharded", size):
        assert Counter(process).total() == pytest.approx(sum(forecast[kind] for kind in KINDS), rel=TOLERANCE)
