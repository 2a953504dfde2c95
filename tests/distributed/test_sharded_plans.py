"""Plans of a model that is sharded: the same in all processes, and the same as one process makes of the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import lorica
from lorica.errors import LoricaError
from lorica.subspace.plan import Plan
from tests.builders import batch, tiny
from tests.distributed.ranks import on_ranks
from tests.distributed.trainings import Course, difference, load_sharded, plan_of_shapes, save, weights_of

POLICIES = [
    {"ranks": "energy", "unfreeze_rank_ratio": 0.3},
    {"ranks": "effective-rank"},
    {"ranks": "importance", "calibration": "random"},
]


def told(plan: Plan) -> list[Any]:
    records: list[Any] = json.loads(json.dumps(plan.records()))
    return records


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_plans_that_look_at_weights_and_rows(name: str, size: int, tmp_path: Path) -> None:
    folder = save(name, tmp_path)
    policies = POLICIES if name == "llama" else POLICIES[:2]  # importance is undefined for such a small GPT-2

    def work(rank: int) -> list[Any]:
        model = load_sharded(folder, size)
        return [told(lorica.plan(model, **options)) for options in policies]

    model = tiny(name)
    alone = [told(lorica.plan(model, **options)) for options in policies]
    assert len({entry["k"] for entry in alone[0]}) > 1
    assert on_ranks(size, work) == [alone] * size


def test_rows_of_all_processes_count(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    batches = [batch(tiny("llama"), seed=seed) for seed in range(4)]

    def work(rank: int) -> list[Any]:
        return told(lorica.plan(load_sharded(folder, 2), ranks="importance", calibration=batches[rank::2]))

    alone, half = (
        told(lorica.plan(tiny("llama"), ranks="importance", calibration=part)) for part in (batches, batches[::2])
    )
    assert alone != half
    assert on_ranks(2, work) == [alone] * 2


def test_training_by_such_a_plan(tmp_path: Path) -> None:
    folder, course = save("llama", tmp_path), Course(steps=3)

    def trained(model: nn.Module, rank: int, size: int) -> dict[str, Any]:
        lorica.protect(model, lorica.plan(model, ranks="energy", unfreeze_rank_ratio=0.3))
        course.train(model, model, rank, size)
        return weights_of(model)

    alone = trained(tiny("llama"), 0, 1)
    for mine in on_ranks(2, lambda rank: trained(load_sharded(folder, 2), rank, 2)):
        assert difference(mine, alone) <= 1e-6


SOURCES = [
    {"source": "activation", "unfreeze_rank_ratio": 0.5},
    {"source": "curvature", "unfreeze_rank_ratio": 0.6},
    {"source": "hybrid", "unfreeze_rank_ratio": 0.5, "constraint": "two-sided"},
]
NOTHING_HERE = {"rank_pattern": {"layers.0.mlp.up_proj": 0}}


@pytest.mark.parametrize(
    "options", [SOURCES[1], *(pytest.param(one, marks=pytest.mark.slow) for one in (SOURCES[0], SOURCES[2]))]
)
def test_sources_that_are_measured(options: dict[str, Any], tmp_path: Path) -> None:
    """In float64: AdamW makes much of the little that rounding leaves of gradients in directions that hardly matter."""
    folder, course = save("llama", tmp_path, torch.float64), Course(steps=4)

    def trained(model: nn.Module, rank: int, size: int) -> list[Any]:
        plan = lorica.plan(model, calibration="random", **options, **NOTHING_HERE)
        lorica.protect(model, plan)
        course.train(model, model, rank, size)
        return [weights_of(model), [name for name in plan.names() if plan.factors(name) is not None], told(plan)]

    weights, measured, records = trained(tiny("llama", torch.float64), 0, 1)
    ranks = on_ranks(2, lambda rank: trained(load_sharded(folder, 2).double(), rank, 2))
    for mine, _, plan in ranks:
        assert plan == records
        assert difference(mine, weights) <= 1e-6
    assert sorted(name for _, own, _ in ranks for name in own) == sorted(measured)  # each layer's at its owner alone


def test_what_each_process_measured_counts(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    batches = [batch(tiny("llama"), seed=seed) for seed in range(4)]
    name = "model.layers.0.mlp.down_proj"

    def energies(model: nn.Module, own: list[Any]) -> list[float]:
        factors = lorica.plan(model, source="activation", calibration=own).factors(name)
        return [] if factors is None else factors.inputs.energies_R.tolist()

    half, expected = (energies(tiny("llama"), own) for own in (batches[::2], batches))
    ranks = on_ranks(2, lambda rank: energies(load_sharded(folder, 2), batches[rank::2]))
    (found,) = [one for one in ranks if one]
    assert found == pytest.approx(expected, rel=1e-9)
    assert found != pytest.approx(half, rel=1e-3)


@pytest.mark.parametrize("options", POLICIES, ids=lambda options: options["ranks"])
def test_a_weight_of_no_numbers_stops_all_processes(options: dict[str, Any], tmp_path: Path) -> None:
    folder, name = save("llama", tmp_path), "model.layers.1.mlp.up_proj"

    def work(rank: int) -> str:
        model = load_sharded(folder, 2)
        if rank == 1:  # of two parts of the weight one
            with torch.no_grad():
                model.get_submodule(name).weight.to_local().fill_(float("nan"))
        with pytest.raises(LoricaError) as error:
            lorica.plan(model, **options)
        return str(error.value)

    words = on_ranks(2, work)
    assert sum(name in text for text in words) == 1
    assert sum("its share of the weights; see its message" in text for text in words) == 1


def test_an_evaluation_before_protect_changes_nothing(tmp_path: Path) -> None:
    """FSDP2 leaves its root unit gathered after a forward pass."""
    folder = save("llama", tmp_path)

    def work(rank: int) -> list[str]:
        model = load_sharded(folder, 2)
        with torch.no_grad():
            model(**batch(model))
        lorica.protect(model, plan_of_shapes(model))
        model(**batch(model)).loss.backward()
        return [name for name, parameter in model.named_parameters() if parameter.grad is not None]

    for trained in on_ranks(2, work):
        assert len(trained) == 14
        assert all(name.endswith(".core") for name in trained)


def test_a_model_of_one_unit() -> None:
    """Its weights are all gathered when the passes over the calibration rows are through."""
    options = [SOURCES[0] | {"calibration": "random"}, POLICIES[2]]

    def work(rank: int) -> list[Any]:
        model = tiny("llama")
        fully_shard(model)
        plans = [lorica.plan(model, **one) for one in options]
        lorica.protect(model, plans[0])
        return [told(plan) for plan in plans]

    assert on_ranks(2, work) == [[told(lorica.plan(tiny("llama"), **one)) for one in options]] * 2


def test_counts_that_compare_all_layers_are_refused(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)

    def work(rank: int) -> None:
        model = load_sharded(folder, 2)
        with pytest.raises(LoricaError, match=r"ranks 'marginal' .* needs whole weights"):
            lorica.plan(model, ranks="marginal", source="curvature", calibration="random")

    on_ranks(2, work)


def test_text_of_the_models_own_is_refused(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)

    def work(rank: int) -> None:
        model = load_sharded(folder, 2)
        with pytest.raises(LoricaError, match="calibration 'self': processes that share a model may write"):
            lorica.plan(model, ranks="importance", calibration="self")

    on_ranks(2, work)
