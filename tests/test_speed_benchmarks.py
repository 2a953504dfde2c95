"""The scripts of benchmarks/ count what they say: by hand, formulas against the peers, meta against real tensors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.arithmetic import lorica_bytes, mini_trainer_bytes, on_meta, peft_bytes
from benchmarks.contestants import CONTESTANTS, PLAIN, adamw, batches, llama, llama_config
from benchmarks.measures import quartiles, state_of
from benchmarks.step_time import Configuration, Lineup, measure
from torch import nn
from torch.optim import AdamW

import lorica

WIDTH, LAYERS, LENGTH = 64, 2, 32


def matrices(model: nn.Module) -> list[tuple[int, int]]:
    return [tuple(w.shape) for name, w in model.named_parameters() if name.endswith("_proj.weight")]


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def state_after_a_step(name: str, model: Any) -> dict[str, int]:
    runner = CONTESTANTS[name].build(copy.deepcopy(model))
    runner.step(next(batches(1, LENGTH, LENGTH)))
    return state_of(runner.model, runner.optimizer)


def test_state_counts_each_storage_once_and_gradients_and_moments() -> None:
    layer = nn.Linear(3, 5, bias=False)  # 60 bytes
    layer.tied = layer.weight.T  # type: ignore[assignment]
    layer.register_buffer("mean", torch.zeros(7))  # 28
    layer.cache = (torch.zeros(2), {"kept": torch.zeros(1)})  # type: ignore[assignment]  # 8 + 4
    optimizer = AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()  # + 60
    optimizer.step()  # + 2 x 60 and a float32 step
    assert state_of(layer, optimizer)["state_bytes"] == 60 + 28 + 12 + 60 + 120 + 4


def test_a_memory_map_is_counted_apart(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(4096))
    layer = nn.Linear(2, 2, bias=False)
    layer.aside = torch.from_file(str(tmp_path / "weights"), shared=True, size=1024)  # type: ignore[assignment]
    count = state_of(layer, AdamW(layer.parameters()))
    assert (count["state_bytes"], count["mapped_bytes"], count["host_bytes"]) == (16, 4096, 0)


def test_quartiles_lie_between_the_values() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert quartiles([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_plain_state_is_four_times_what_trains() -> None:
    model = llama(WIDTH, LAYERS, LENGTH)
    trained = sum(m * n for m, n in matrices(model))
    rest = size(model) - trained
    found = state_after_a_step(PLAIN, model)["state_bytes"]
    buffers, steps = sum(b.nbytes for b in model.buffers()), 4 * len(matrices(model))
    assert found == 16 * trained + 4 * rest + buffers + steps


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_the_formula_of_mini_trainer_is_what_it_holds(share: float) -> None:
    pytest.importorskip("mini_trainer")
    model = llama(WIDTH, LAYERS, LENGTH)
    shapes, total = matrices(model), size(model)
    elsewhere = total - sum(m * n for m, n in shapes)
    counted = mini_trainer_bytes(shapes, total, share) - 12 * elsewhere  # frozen here
    assert state_after_a_step(f"mini_trainer {share:g}", model)["state_bytes"] == pytest.approx(counted, rel=0.002)


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_the_formula_of_peft_is_what_it_holds(share: float) -> None:
    pytest.importorskip("peft")
    model = llama(WIDTH, LAYERS, LENGTH)
    counted = peft_bytes(matrices(model), size(model), share) + 2 * size(model)  # the model is float32 here
    assert state_after_a_step(f"peft osf {share:g}", model)["state_bytes"] == pytest.approx(counted, rel=0.002)


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_protected_model_on_the_meta_device_counts_as_a_real_one(memory: str) -> None:
    config = llama_config(WIDTH, LAYERS, LENGTH).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings")  # fmt: skip
    counted = lorica_bytes(on_meta({name: config[name] for name in names}), 0.75, memory)
    real = llama(WIDTH, LAYERS, LENGTH).to(torch.bfloat16)
    lorica.protect(real, lorica.plan(real, effective_rank=0.75), memory=memory)
    optimizer, ids = adamw(real), next(batches(1, LENGTH, LENGTH))
    real(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    measured = state_of(real, optimizer)
    assert counted["state_bytes"] + counted["aside_bytes"] == measured["state_bytes"] + measured["mapped_bytes"]
    assert (counted["aside_bytes"] > 0) == (memory == "lean")


def test_a_race_gives_every_method_its_row_and_finds_the_leak() -> None:
    names = [PLAIN, "lorica fast 0.75", "lorica lean 0.75"]
    lineup = Lineup(WIDTH, 1, LENGTH, [CONTESTANTS[name] for name in names])
    rows = measure(lineup, Configuration(WIDTH, 1, 2 * LENGTH, LENGTH, (0.75,)), budget=0.0)
    assert [row["method"] for row in rows] == names
    assert all(len(row["seconds"]) == 3 for row in rows)
    assert rows[0]["leakage"] is None
    assert all(0 < row["leakage"] < 1e-5 for row in rows[1:])
    weight = next(iter(lineup.given))
    lineup.changes[names[1]] = lambda name: torch.ones(lineup.given[name].shape, dtype=torch.float64)
    assert lineup.leakage(names[1]) > 0.1, weight
