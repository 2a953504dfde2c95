"""Bytes and memory of several devices: by hand, by what has to hold for any shapes, and as `check` tells them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import lorica
from lorica.cli import app
from lorica.constrain.exchange import Exchange
from lorica.errors import LoricaError
from lorica.forecast.communication import (
    BACKWARD,
    CORES,
    FORWARD,
    GRADIENTS,
    LENT,
    RETURNED,
    WEIGHTS,
    Layer,
    Layout,
    Matrix,
    Sizes,
    blocks_of,
    received_replicated,
    received_sharded,
    sizes_of,
    units_of,
)
from lorica.forecast.devices import GATHERED, SPREAD, gathered, on_their_way, shares, state_sharded
from lorica.forecast.needs import Phase
from lorica.forecast.rates import Machine
from lorica.forecast.result import Forecast
from lorica.forecast.story import forecast
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import PlanEntry
from tests.builders import tiny
from tests.forecast.conftest import Folder

GPU = Machine("cuda", "a GPU", 8 * 10**9, process=10**8, flops=1e14, narrow_flops=2e14, bandwidth=1e12)
WAYS = (
    Exchange(True, True, lent=30, reduced=20, returned=0),
    Exchange(False, True, lent=12, reduced=24, returned=20),
    Exchange(True, False, lent=18, reduced=28, returned=20),
)
OURS = Sizes(
    parameters=1000, kept=200, unit=100, gradients=0, folded=600, cores=80, bases=120, layers=(Layer(2, WAYS),)
)
PLAIN = Sizes(parameters=1000, kept=200, unit=100, gradients=1000)


def test_plain_fine_tuning_by_hand() -> None:
    assert received_sharded(PLAIN, Layout(4), 3) == {
        FORWARD: 3 * 750,
        BACKWARD: 3 * 600,
        GRADIENTS: 3 * 750,
    }


def test_cores_by_hand() -> None:
    passes, fold = {FORWARD: 2 * 750, BACKWARD: 2 * 600}, {CORES: 15, WEIGHTS: 112}
    halfway = {LENT: 2 * 18, GRADIENTS: 2 * 36, RETURNED: 15}  # of 24, 48 and 40 bytes
    assert received_sharded(OURS, Layout(4), 2) == passes | halfway | fold
    wrapped = received_sharded(OURS, Layout(4), 2, wrapped=True)
    assert wrapped == {FORWARD: 2 * 810, BACKWARD: 2 * 660, LENT: 2 * 45, GRADIENTS: 2 * 60} | fold


def test_replicas_exchange_their_parts_of_the_gradients_besides() -> None:
    one, three = (received_sharded(OURS, Layout(4, replicas)) for replicas in (1, 3))
    assert three - one == {GRADIENTS: round(2 * 2 / 3 * 40 / 4)}  # in the dtype of the weight


def test_ddp_by_hand() -> None:
    assert received_replicated(PLAIN, 4) == {GRADIENTS: 1500}
    assert received_replicated(OURS, 4) == {GRADIENTS: 120}


def test_one_device_receives_nothing() -> None:
    assert not received_sharded(OURS, Layout(1))
    assert not received_replicated(OURS, 1)


@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 4))
def test_more_processes_receive_more_of_all_but_the_fold(shards: int, replicas: int, accumulation: int) -> None:
    counts = {name: 10**6 * value for name, value in vars(OURS).items() if isinstance(value, int)}
    big = replace(OURS, **counts, layers=tuple(layer._replace(width=10**6 * layer.width) for layer in OURS.layers))
    one, more = (received_sharded(big, Layout(r, replicas), accumulation) for r in (shards, shards + 1))
    for kind in (FORWARD, BACKWARD, LENT):
        assert one[kind] < more[kind] < accumulation * big.parameters
    fold = big.cores + big.folded
    assert more[CORES] + more[WEIGHTS] == pytest.approx(fold * shards / (shards + 1) ** 2, abs=2)


def test_an_offload_by_hand() -> None:
    sizes = replace(OURS, layers=(Layer(2, WAYS, size=50), Layer(2, WAYS, size=70)))
    alone = [
        Phase("load", {"weights": 1000}, {"process": 7, "weights": 1000}),
        Phase("train", {"process": 5, "weights": 1000, "W0": 600, "cores": 80, "activations": 300}, {"process": 7}),
    ]
    _, kept = shares(alone, sizes, Layout(4), 1)
    _, moved = shares(alone, sizes, Layout(4, offload=True), 1)
    assert on_their_way(sizes, 4) == 2 * 100 // 4 + 2 * 70 + 4 * 30
    assert kept.phases[1].device == {"process": 5, "weights": 250, "W0": 150, "cores": 20} | {
        "activations": 300,
        GATHERED: gathered(sizes, 4),
    }
    assert moved.phases[1].device == {"process": 5, "activations": 300, GATHERED: gathered(sizes, 4) + 50 + 260}
    assert moved.phases[1].host == {"process": 7, "weights": 250, "W0": 150, "cores": 20}
    assert moved.phases[0] == kept.phases[0]
    assert moved.host_bytes == 7 + 420
    assert moved.received == kept.received
    assert moved.layout == "sharded over 4, offloaded"


@given(m=st.integers(2, 40), n=st.integers(2, 40), data=st.data(), narrow=st.booleans())
def test_a_matrix_has_the_bases_that_protect_makes(m: int, n: int, data: st.DataObject, narrow: bool) -> None:
    k = data.draw(st.integers(0, min(m, n) - 1))
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(n, m, bias=False)).to(torch.bfloat16 if narrow else torch.float32)
    lorica.protect(model, Plan(entries=[PlanEntry(name="0", shape=(m, n), k=k)]))
    told, matrix = sizes_of(model, [model[0]]), Matrix(m, n, k, k, narrow)
    if k or narrow:
        assert (told.bases, told.cores, told.folded) == (
            4 * matrix.bases,
            4 * matrix.core,
            m * n * (2 if narrow else 4),
        )
    else:
        assert (told.gradients, told.cores) == (told.parameters, 0)
    assert (told.parameters, told.unit, told.kept) == (m * n * (2 if narrow else 4),) * 2 + (0,)


def test_sizes_from_shapes_are_those_of_the_model() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 200, "vocab_size": 1000, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict(sizes | heads)).bfloat16()
    shapes = [(64, 64), (64, 64), (32, 64), (32, 64), (200, 64), (200, 64), (64, 200)]
    for share in (0.0, 0.5, 0.75):
        if share:
            lorica.protect(model, lorica.plan(model, 1 - share))
        matrices = [Matrix(m, n, *2 * [int(share * min(m, n))], derived=True) for m, n in shapes]
        formula = Sizes.of(matrices, 3, outside=2 * 64000, kept=64000, weight=2, gradient=2)
        counted = sizes_of(model, units_of(model))
        norms = 2 * 7 * 64
        assert counted.parameters == formula.parameters + norms
        assert counted.kept == formula.kept + 2 * 64
        assert counted.unit == formula.unit == 2 * 64000  # the embeddings; the blocks are smaller
        assert sizes_of(model, blocks_of(model)).unit == 2 * (sum(m * n for m, n in shapes) + 2 * 64)
        for name in ("folded", "cores", "bases"):
            assert getattr(counted, name) == getattr(formula, name), name
        assert Counter(counted.layers) == Counter(formula.layers)  # in another order
        lorica.release(model)


def test_units_of_tied_embeddings_and_of_two_stacks() -> None:
    assert len(units_of(tiny("llama"))) == 2 + 1
    assert len(units_of(tiny("llama-tied"))) == 2
    assert len(blocks_of(tiny("t5"))) == 2 + 2  # and not the lists of layers inside them


def test_the_state_is_shared_out() -> None:
    assert state_sharded(OURS, 4) == {
        "weights": 250,
        "W0": 150,
        "bases": 30,
        "cores": 20,
        "gradients": 20,
        "optimizer states": 40,
    }
    assert state_sharded(PLAIN, 4) == {"weights": 250, "gradients": 250, "optimizer states": 500}
    assert gathered(OURS, 4) == 200 + 200 + 24 + 48
    assert gathered(PLAIN, 4) == 200 + 200 + 100


def told(folder: str, **options: Any) -> Forecast:
    return forecast(
        {"model_name_or_path": folder, "max_length": 16, "use_cpu": True, "preset": "paper", **options}, machine=GPU
    )


def test_one_device_changes_nothing(config_folder: Folder) -> None:
    folder = config_folder("llama")
    without, one = told(folder), told(folder, devices=1, replicas=1)
    assert one.table() == without.table()
    assert one.to_json() == without.to_json()
    assert "devices" not in json.dumps(one.to_json())


def test_devices_beside_the_one(config_folder: Folder) -> None:
    folder = config_folder("llama")
    result = told(folder, devices=8, replicas=2, gradient_accumulation_steps=3, unfreeze_rank_ratio=0.5)
    assert result.ways[0].phases == told(folder, unfreeze_rank_ratio=0.5, gradient_accumulation_steps=3).ways[0].phases
    for way in result.ways:
        ddp, sharded = way.shares
        alone, one = (next(p.device for p in x.phases if p.name == "train") for x in (way, sharded))
        assert ddp.device_bytes > way.device_bytes
        assert one["weights"] == -(-alone["weights"] // 4)
        assert one["activations"] == alone["activations"]
        assert one["gathered while in use"] > 0
    model = lorica.protect(tiny("llama"), lorica.plan(tiny("llama"), 0.5))
    expected = received_sharded(sizes_of(model, units_of(model)), Layout(4, 2), 3)
    assert result.ways[0].shares[1].received == expected
    assert "sharded over 4, 2 replicas: memory of each" in result.table()


def test_as_many_replicas_as_devices_are_ddp(config_folder: Folder) -> None:
    (only,) = told(config_folder("llama"), devices=4, replicas=4).ways[0].shares
    assert only.layout == "DDP on 4"


def test_it_fits_if_one_layout_does(config_folder: Folder) -> None:
    result = told(config_folder("llama"), devices=4)
    ddp, sharded = (share.device_bytes for share in result.ways[0].shares)
    assert sharded < ddp
    assert result.fits(sharded)
    assert not result.fits(sharded - 1)


def test_an_offload_takes_from_the_device_and_gives_to_the_host(config_folder: Folder) -> None:
    folder = config_folder("llama")
    kept, moved = (told(folder, devices=4, fsdp=fsdp) for fsdp in ("full_shard", "full_shard offload"))
    for one, other in zip(kept.ways, moved.ways, strict=True):
        before, after = (way.shares[1].peak for way in (one, other))
        gone = {kind: nbytes for kind, nbytes in before.device.items() if kind in SPREAD}
        assert gone.keys() >= {"weights", "optimizer states"}
        assert not after.device.keys() & set(SPREAD)
        assert sum(after.host.values()) == sum(before.host.values()) + sum(gone.values())
        assert other.shares[1].device_bytes < one.shares[1].device_bytes
        assert other.shares[0] == one.shares[0]  # DDP
    assert "sharded over 4, offloaded: memory of each" in moved.table()
    assert "  on the host  " in moved.table()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"devices": 8, "replicas": 3}, "--replicas 3 does not divide --devices 8"),
        ({"devices": 0}, "--devices"),
        ({"replicas": 2}, "--replicas 2 does not divide --devices 1"),
        ({"devices": "many"}, "--devices"),
    ],
)
def test_mistakes_are_named(config_folder: Folder, options: dict[str, Any], said: str) -> None:
    with pytest.raises(LoricaError, match=said):
        told(config_folder("llama"), **options)


def test_the_command_takes_devices(config_folder: Folder, tmp_path: Path) -> None:
    file = tmp_path / "forecast.json"
    words = ["check", "--model_name_or_path", config_folder("llama"), "--max_length", "16", "--device", "cuda"]
    words += ["--device_memory", "8GB", "--devices", "4", "--json", str(file)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "osft, fast, sharded over 4" in done.output
    ways = json.loads(file.read_text())["ways"]
    assert [[one["layout"] for one in way["devices"]] for way in ways] == [["DDP on 4", "sharded over 4"]] * 2
