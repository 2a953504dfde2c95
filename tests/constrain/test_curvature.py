"""Source ``curvature`` from end to end, with directions recomputed from inputs and gradients by brute force."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import lorica
from lorica.config import build_config
from lorica.constrain.linear import matrix_of
from lorica.constrain.planning import measured_anew
from lorica.constrain.protect import protected_layers
from lorica.errors import LoricaError
from lorica.methods import METHODS
from lorica.methods.osft import OSFT
from lorica.subspace.factor import Factor, Factors
from lorica.subspace.plan import Plan
from lorica.update import train as update
from tests.builders import batch, same_bases, task_of, tiny, train, trainable
from tests.subspace.oracle import Masks, by_brute_force, planned
from tests.training.conftest import llama_folder, rows, t5_folder  # noqa: F401

FAMILIES = ["llama", "gpt2", "t5", "bert"]
Oracle = Mapping[str, tuple[Tensor, Tensor]]


def masks_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Masks:
    """Return which positions count of a batch without padding, every position labelled."""
    every = torch.ones_like(inputs["labels"], dtype=torch.bool)
    predicted = every.clone()
    if type(model).__name__.endswith(("CausalLM", "LMHeadModel")):
        predicted[:, -1] = False
    return {"main": every, "encoder": every, "predicted": predicted}


def oracle(model: nn.Module, batches: list[dict[str, Tensor]]) -> Oracle:
    """Return A and B of each planned layer of a plain model, which is left as it is."""
    twin = copy.deepcopy(model).requires_grad_(True)
    return by_brute_force(twin, planned(twin), batches, [masks_of(twin, inputs) for inputs in batches])


def top(moment_DD: Tensor, k: int) -> Tensor:
    return torch.linalg.eigh(moment_DD).eigenvectors.flip(1)[:, :k]


def dense(model: nn.Module) -> dict[str, Tensor]:
    """Return float64 copies of the weights that are planned by default, (out, in)."""
    return {name: matrix_of(layer).detach().double().clone() for name, layer in planned(model).items()}


def leaks(change: Tensor, u: Tensor, v: Tensor, constraint: str) -> list[float]:
    """Return the shares of a change that a constraint forbids."""
    assert change.norm() > 0, "the weight did not move"
    held = {"input": [change @ v], "output": [u.T @ change], "block": [u.T @ change @ v]}
    held["two-sided"] = held["input"] + held["output"]
    return [float(part.norm() / change.norm()) for part in held[constraint]]


def learn_by_hand(model: nn.Module, optimizer: Any = None) -> dict[str, Tensor]:
    """Take a few AdamW steps with decay and return what each weight was changed by, before rounding if protected."""
    before = {name: layer.base.double() for name, layer in protected_layers(model).items()}
    train(
        model, optimizer or AdamW(trainable(model), lr=5e-3, weight_decay=0.1), 5, lambda step: batch(model, 50 + step)
    )
    layers = protected_layers(model)
    assert layers.keys() == before.keys()
    return {name: layer.delta().double() for name, layer in layers.items()}


def calibration_of(model: nn.Module) -> list[dict[str, Tensor]]:
    """Return more positions than any layer is wide."""
    return [batch(model, seed, rows=6, length=16) for seed in (1, 2)]


@pytest.mark.parametrize("constraint", ["two-sided", "input", "output"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.reliability("R29")
def test_no_step_leaves_what_is_free(name: str, constraint: Any) -> None:
    model = tiny(name)
    calibration = calibration_of(model)
    factors = oracle(model, calibration)
    plan = lorica.plan(model, 0.5, source="curvature", constraint=constraint, calibration=calibration)
    assert {entry.constraint for entry in plan.entries} == {constraint}
    lorica.protect(model, plan)
    changes = learn_by_hand(model)
    assert changes.keys() == factors.keys()
    for entry in plan.entries:
        (a, b), (k_u, k_v) = factors[entry.name], entry.given
        u, v = top(b, k_u), top(a, k_v)
        assert max(leaks(changes[entry.name], u, v, constraint)) <= 1e-5, entry.name
        assert min(leaks(changes[entry.name], top(-b, k_u or 1), top(-a, k_v or 1), constraint)) > 1e-3, (
            "these are free"
        )


def test_the_default_is_two_sided_and_each_side_follows_its_own_measure() -> None:
    model = tiny("llama")
    calibration = calibration_of(model)
    plan = lorica.plan(model, 0.5, source="curvature", calibration=calibration)
    assert {entry.constraint for entry in plan.entries} == {"two-sided"}
    inputs = lorica.plan(model, 0.5, source="activation", calibration=calibration)
    lorica.protect(model, plan)
    for entry in plan.entries:
        ours, theirs = plan.factors(entry.name), inputs.factors(entry.name)
        assert ours is not None
        assert theirs is not None
        assert isinstance(ours.inputs, Factor)
        assert isinstance(theirs.inputs, Factor)
        k = len(ours.inputs.energies_R)
        torch.testing.assert_close(ours.inputs.energies_R, theirs.inputs.energies_R[:k], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.reliability("R29")
def test_block_is_held_by_the_optimizer(name: str) -> None:
    model = tiny(name)
    calibration, before = calibration_of(model), dense(model)
    factors = oracle(model, calibration)
    plan = lorica.plan(model, 0.5, source="curvature", constraint="block", calibration=calibration)
    inner = AdamW(trainable_of(model, plan), lr=5e-3, weight_decay=0.1)
    optimizer = lorica.ConstrainedOptimizer(inner, lorica.block_constraints(model, plan))
    learn_by_hand(model, optimizer)
    after = dense(model)
    for entry in plan.entries:
        a, b = factors[entry.name]
        change = after[entry.name] - before[entry.name]
        k_u, k_v = entry.given
        assert max(leaks(change, top(b, k_u), top(a, k_v), "block")) <= 1e-5


def test_weights_with_the_same_inputs_share_a_basis_however_few_outputs_they_have() -> None:
    """The keys and values of grouped heads have half as many outputs as the queries here."""
    model = tiny("llama")
    plan = lorica.plan(model, 0.25, source="curvature", calibration=calibration_of(model))
    block = {entry.name.split(".")[-1]: entry for entry in plan.entries[:7]}
    assert {name: entry.given for name, entry in block.items()} == {
        "q_proj": (24, 24), "k_proj": (12, 24), "v_proj": (12, 24), "o_proj": (24, 24),
        "gate_proj": (24, 24), "up_proj": (24, 24), "down_proj": (24, 24),
    }  # fmt: skip
    lorica.protect(model, plan)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.in_basis is attention.k_proj.in_basis is attention.v_proj.in_basis


def test_a_pattern_counts_each_side_as_a_share_does() -> None:
    model = tiny("llama")
    pattern = {"k_proj": 0.75, "v_proj": 5, "down_proj": 1.0}
    plan = lorica.plan(model, 0.5, source="curvature", calibration=calibration_of(model), rank_pattern=pattern)
    given = {entry.name.split(".")[-1]: entry.given for entry in plan.entries[:7]}
    assert given == {
        "q_proj": (16, 16), "k_proj": (12, 24), "v_proj": (5, 5), "o_proj": (16, 16),
        "gate_proj": (16, 16), "up_proj": (16, 16), "down_proj": (32, 32),
    }  # fmt: skip
    lorica.protect(model, plan)


def trainable_of(model: nn.Module, plan: Plan) -> list[nn.Parameter]:
    return [model.get_submodule(name).get_parameter("weight") for name in plan.names()]


@pytest.mark.parametrize(("constraint", "k_output"), [("two-sided", 5), ("two-sided", 0), ("output", 7), ("block", 3)])
def test_an_edited_plan_protects_another_number_of_outputs(constraint: Any, k_output: int) -> None:
    model = tiny("llama")
    calibration, before = calibration_of(model), dense(model)
    factors = oracle(model, calibration)
    plan = lorica.plan(model, 0.5, source="curvature", constraint=constraint, calibration=calibration)
    plan.entries = [entry.model_copy(update={"k_output": k_output}) for entry in plan.entries]
    assert "5+" in str(plan) or k_output != 5
    if constraint == "block":
        inner = AdamW(trainable_of(model, plan), lr=5e-3)
        learn_by_hand(model, lorica.ConstrainedOptimizer(inner, lorica.block_constraints(model, plan)))
        after = dense(model)
        changes = {name: after[name] - weight for name, weight in before.items()}
    else:
        lorica.protect(model, plan)
        assert sum(parameter.numel() for parameter in trainable(model)) == plan.free
        changes = learn_by_hand(model)
    for entry in plan.entries:
        (a, b), (m, n) = factors[entry.name], entry.shape
        k_v = min(n, 32) // 2  # 32 is the model's width
        by_hand = {
            "two-sided": (m - k_output) * (n - k_v),
            "output": (m - k_output) * n,
            "block": m * n - k_output * k_v,
        }
        assert entry.free == by_hand[constraint]
        assert max(leaks(changes[entry.name], top(b, k_output), top(a, k_v), constraint)) <= 1e-5


def test_an_edited_plan_cannot_protect_what_was_not_measured() -> None:
    """Beyond the measured directions none is better than another, and those taken would not be the principal ones."""
    model = tiny("llama")
    plan = lorica.plan(model, 0.5, source="curvature", calibration=calibration_of(model))
    plan.entries[0] = plan.entries[0].model_copy(update={"k_output": 20})
    with pytest.raises(LoricaError, match=r"q_proj: 20 directions of a side are to be protected, .* measured 16; make"):
        lorica.protect(model, plan)


def test_a_saved_plan_knows_no_directions(tmp_path: Path) -> None:
    model = tiny("llama")
    plan = lorica.plan(model, 0.5, source="curvature", calibration=calibration_of(model))
    plan.entries[0] = plan.entries[0].model_copy(update={"k_output": 3})
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.entries == plan.entries
    with pytest.raises(LoricaError, match=r"q_proj: source 'curvature' needs calibration inputs, which a saved plan"):
        lorica.protect(tiny("llama"), again)
    anew = measured_anew(tiny("llama"), again, calibration_of(model))
    assert anew.entries == plan.entries
    assert again.factors(plan.entries[0].name) is None, "what is given is left alone"
    assert same_bases(lorica.protect(tiny("llama"), anew), lorica.protect(tiny("llama"), plan))
    model.save_pretrained(tmp_path / "before")
    lorica.protect(model, plan)
    learn_by_hand(model)
    lorica.release(model).save_pretrained(tmp_path / "after")
    assert lorica.audit(tmp_path / "before", tmp_path / "after", plan).holds, "the plan of the run still knows them"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "source 'curvature' needs calibration inputs; give calibration"),
        ({"calibration": "random", "ranks": "energy"}, "with source 'curvature' use 'uniform'"),
        ({"calibration": "none"}, "calibration 'none' is unknown"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        lorica.plan(tiny("llama"), source="curvature", **options)


def test_what_finished_tasks_were_is_not_ignored_in_silence() -> None:
    earlier = {"q": Factors(inputs=Factor.of(torch.eye(32)))}
    with pytest.raises(LoricaError, match=r"earlier .* has no effect with source 'weight'"):
        lorica.plan(tiny("llama"), source="weight", earlier=earlier)


def test_k_output_fits_its_side_and_its_source() -> None:
    model = tiny("llama")
    (entry, *_) = lorica.plan(model, 0.5, source="curvature", calibration=[batch(model)]).entries
    data = entry.model_dump()
    for change, message in [
        ({"k_output": 33}, r"k_output = 33 is out of range for shape \(32, 32\): 0 to 32"),
        ({"k_output": 3, "source": "weight"}, "k_output is for source 'curvature'"),
        ({"k_output": 3, "constraint": "input"}, "not for constraint 'input'"),
    ]:
        with pytest.raises(ValueError, match=message):
            type(entry).model_validate(data | change)


# --- from task to task ----------------------------------------------------------------------------------------------


def osft(**options: Any) -> OSFT:
    given = {"source": "curvature", "unfreeze_rank_ratio": 0.5, "remember_tasks": True, "remember_size": 8.0}
    method = METHODS["osft"].build(given | options)
    assert isinstance(method, OSFT)
    return method


def learn(method: OSFT, model: nn.Module, index: int) -> dict[str, Tensor]:
    """Learn a task of a stream, not ended yet, and return the changes."""
    method.begin_task(model, task_of(model, index))
    return learn_by_hand(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_finished_tasks_count_in_what_the_next_protects(name: str) -> None:
    model = tiny(name)
    calibration = calibration_of(model)
    method = osft(calibration=calibration, remember_rows=12)
    past: dict[str, list[Tensor]] = {}
    for index in range(2):
        learn(method, model, index)
        method.end_task(model, task_of(model, index))
        for layer, pair in oracle(model, list(task_of(model, index).batches(12))).items():
            both = [moment / moment.trace() for moment in pair]
            past[layer] = [old + new for old, new in zip(past[layer], both, strict=True)] if layer in past else both
    kept = method.carried.tasks.factors
    assert kept.keys() == past.keys()
    for layer, pair in past.items():
        for side, moment in zip((kept[layer].inputs, kept[layer].outputs), pair, strict=True):
            assert side is not None
            assert side.trace == pytest.approx(2)
            torch.testing.assert_close(side.matrix(), moment, rtol=0, atol=2e-3 * float(moment.norm()))  # float16
    now = oracle(model, calibration)
    changes = learn(method, model, 2)
    assert method.plan is not None
    assert method.audit(model).holds
    moved = 0.0
    for entry in method.plan.entries:
        (a, b), held = now[entry.name], kept[entry.name]
        assert held.inputs is not None
        assert held.outputs is not None
        u = top(b / b.trace() + held.outputs.matrix(), entry.given[0])
        v = top(a / a.trace() + held.inputs.matrix(), entry.given[1])
        assert max(leaks(changes[entry.name], u, v, "two-sided")) <= 1e-5, entry.name
        moved = max(moved, *leaks(changes[entry.name], top(b, entry.given[0]), top(a, entry.given[1]), "two-sided"))
    assert moved > 1e-2, "the past changed nothing"


def test_what_is_remembered_keeps_to_its_size() -> None:
    model = tiny("llama")
    weights = sum(weight.numel() * 4 for weight in dense(model).values())
    sizes = []
    for share in (0.25, 0.5):
        method = osft(calibration="random", remember_size=share)
        for index in range(2):
            learn(method, model, index)
            method.end_task(model, task_of(model, index))
            sizes.append(sum(tensor.nbytes for key, tensor in method.state_dict().items() if not key.endswith("sides")))
            assert sizes[-1] <= share * weights
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3]
    assert sizes[2] > 0.25 * weights, "what is allowed is used; inputs that layers have in common are kept once"


def test_outputs_that_were_remembered_stay_where_a_task_looks_at_inputs_alone() -> None:
    model = tiny("llama")
    first = osft(calibration="random")
    learn(first, model, 0)
    first.end_task(model, task_of(model, 0))
    second = osft(calibration="random", source="activation")
    second.load_state_dict(first.state_dict())
    learn(second, model, 1)
    second.end_task(model, task_of(model, 1))
    for name, factors in second.carried.tasks.factors.items():
        assert factors.inputs is not None
        assert factors.outputs is not None
        assert factors.inputs.trace == pytest.approx(2)
        assert factors.outputs.same_as(first.carried.tasks.factors[name].outputs or pytest.fail(name))


def test_the_memory_of_another_model_is_refused() -> None:
    method, other = osft(calibration="random"), tiny("llama")
    model = tiny("qwen3")
    learn(method, model, 0)
    method.end_task(model, task_of(model, 0))
    method.carried.tasks._factors["model.layers.0.mlp.down_proj"] = method.carried.tasks.factors[
        "model.layers.0.mlp.up_proj"
    ]
    with pytest.raises(LoricaError, match=r"down_proj has a side of 48, .* has 32: it belongs to another model"):
        method.begin_task(other, task_of(other, 1))


# --- from files -----------------------------------------------------------------------------------------------------

AUTO = {"llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}
FAST = {"max_steps": 4, "learning_rate": 3e-3, "disable_tqdm": True, "seed": 1, "preset": "paper"}
FAST |= {"source": "curvature"}


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_updates_from_files(family: str, rows: Any, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    parent, calibration = request.getfixturevalue(f"{family}_folder"), rows("old")
    for name in ("one", "two"):
        out = tmp_path / name
        values = {"model_name_or_path": str(parent), "train_file": rows(name), "output_dir": str(out)}
        values |= {"unfreeze_rank_ratio": 0.5, "calibration_file": calibration, "remember_tasks": True}
        record = update(build_config(values | FAST), say=lambda _: None)
        assert {(entry["source"], entry["constraint"]) for entry in record["plan"]} == {("curvature", "two-sided")}
        assert max(max(row["master_leak_u"], row["master_leak_v"]) for row in record["leakage"]) <= 1e-5
        assert {entry.source for entry in Plan.load(out / "plan.json").entries} == {"curvature"}
        state = load_file(out / "memory" / "lorica-memory.safetensors")
        assert record["carried_bytes"] == sum(tensor.nbytes for tensor in state.values())
        parent = out
    for key in (key for key in state if key.endswith("energies")):
        *energies, floor = state[key].tolist()
        left_out = len(state[key.replace("energies", "vectors")]) - len(energies)
        assert sum(energies) + floor * left_out == pytest.approx(2), "two tasks"
    AUTO[family].from_pretrained(out)
