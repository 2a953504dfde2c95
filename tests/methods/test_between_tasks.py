"""What OSFT carries from task to task: learned directions, inputs, a rank schedule."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

import lorica
from lorica.constrain.audit_weight import audit_weight
from lorica.constrain.linear import matrix_of
from lorica.constrain.protect import plan_of, protected_layers
from lorica.errors import LoricaError
from lorica.methods import METHODS, Protection
from lorica.methods.osft import OSFT
from lorica.subspace.plan import Plan
from tests.builders import (
    CONSTRAINTS,
    batch,
    half,
    same_bases,
    task_of,
    tiny,
    top_directions,
    train,
    trainable,
    weights,
)

DTYPES = [torch.float32, torch.bfloat16]
HELD = [(c, d) for c in CONSTRAINTS for d in DTYPES] + [("block", torch.float32)]
held = pytest.mark.parametrize(("constraint", "dtype"), HELD, ids=str)


def osft(**options: Any) -> OSFT:
    method = METHODS["osft"].build(options)
    assert isinstance(method, OSFT)
    return method


def begin_and_train(method: OSFT, model: nn.Module, index: int) -> dict[str, Tensor]:
    """Train one task, not ended yet, and return the change of each planned weight, in float64 and before rounding."""
    names = list(lorica.plan(model).names())
    before = {name: matrix_of(model.get_submodule(name)).detach().double().clone() for name in names}
    method.begin_task(model, task_of(model, index))
    parameters = trainable(model)
    optimizer = method.wrap_optimizer(AdamW(parameters, lr=5e-3), max_grad_norm=0.0)
    train(model, optimizer, 3, lambda step: batch(model, 10 * index + step))
    layers = protected_layers(model)
    return {
        name: layers[name].delta().double()
        if name in layers
        else matrix_of(model.get_submodule(name)).detach().double() - before[name]
        for name in names
    }


def learn(method: OSFT, model: nn.Module, index: int) -> dict[str, Tensor]:
    """Learn one task and return the change of each planned weight."""
    changes = begin_and_train(method, model, index)
    method.end_task(model, task_of(model, index))
    return changes


def leaks(change: Tensor, u: Tensor, v: Tensor, constraint: str) -> list[float]:
    """Return the shares of a change along directions of the sides that a constraint holds."""
    inside = {"input": [change @ v], "output": [u.T @ change], "block": [u.T @ change @ v]}
    inside["two-sided"] = inside["input"] + inside["output"]
    return [float(part.norm() / change.norm()) for part in inside[constraint]]


def learned_directions(method: OSFT, name: str) -> tuple[Tensor, Tensor]:
    state = method.state_dict()
    u, v = (state[f"learned.{name}.{side}"].double() for side in "uv")
    return u / u.norm(dim=0), v / v.norm(dim=0)


@held
def test_what_a_task_learned_stays_in_the_next(constraint: Any, dtype: torch.dtype) -> None:
    model, control = tiny("llama", dtype), tiny("llama", dtype)
    method = osft(unfreeze_rank_ratio=0.5, constraint=constraint, protect_learned=0.25)
    plain = osft(unfreeze_rank_ratio=0.5, constraint=constraint)
    first, _ = learn(method, model, 0), learn(plain, control, 0)
    held = {name: learned_directions(method, name) for name in first}
    second, free = begin_and_train(method, model, 1), begin_and_train(plain, control, 1)
    for name, (u, v) in held.items():
        rank = min(first[name].shape) // 4
        for ours, theirs in zip((u, v), top_directions(first[name], rank), strict=True):
            torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, atol=1e-4, rtol=0)
        assert max(leaks(second[name], u, v, constraint)) <= 1e-5
        assert min(leaks(free[name], u, v, constraint)) > 1e-3, "this would have held without protect_learned too"
    report = method.audit(model)
    assert report.holds
    assert {row.verdict for row in report.rows} <= {"holds"}


@held
def test_the_plan_counts_what_is_protected_besides(constraint: Any, dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    method = osft(unfreeze_rank_ratio=0.5, constraint=constraint, protect_learned=0.25)
    learn(method, model, 0)
    assert method.plan is not None
    assert {entry.learned for entry in method.plan.entries} == {(0, 0)}
    tops = {name: top_directions(matrix_of(layer), half(*layer.weight.shape)) for name, layer in planned(model).items()}
    begin_and_train(method, model, 1)
    for entry in method.plan.entries:
        both = [
            torch.cat([*pair], 1) for pair in zip(tops[entry.name], learned_directions(method, entry.name), strict=True)
        ]
        ranks = [int(torch.linalg.matrix_rank(side, rtol=1e-5)) for side in both]
        expected = [rank - half(*entry.shape) for rank in ranks]
        if constraint in ("input", "output"):
            expected[constraint == "output"] = 0
        assert list(entry.learned) == expected
        assert max(expected) > 0
        (m, n), (a, b) = entry.shape, ranks
        by_hand = {"two-sided": (m - a) * (n - b), "input": m * (n - b), "output": (m - a) * n, "block": m * n - a * b}
        assert entry.free == by_hand[constraint]
        assert f"learned before: {entry.learned[0]} output, {entry.learned[1]} input directions" in entry.cells()[-1]
    if constraint != "block":
        assert method.plan.free == sum(parameter.numel() for parameter in trainable(model))
    assert Plan.from_records(method.plan.records()).entries == method.plan.entries


def planned(model: nn.Module) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in lorica.plan(model).names()}


def test_the_audit_sees_a_leak_into_what_was_learned() -> None:
    model, control = tiny("llama"), tiny("llama")
    method, plain = osft(unfreeze_rank_ratio=0.5, protect_learned=0.25), osft(unfreeze_rank_ratio=0.5)
    learn(method, model, 0)
    learn(plain, control, 0)
    begin_and_train(method, model, 1)
    before = {name: matrix_of(layer).detach().clone() for name, layer in planned(control).items()}
    learn(plain, control, 1)
    assert method.plan is not None
    for entry in method.plan.entries:
        after, learned = matrix_of(control.get_submodule(entry.name)), method.plan.learned(entry.name)
        bare = entry.model_copy(update={"learned": (0, 0)})
        assert audit_weight(before[entry.name], after, bare).verdict == "holds"
        assert audit_weight(before[entry.name], after, entry, None, learned).verdict == "LEAKS"


def test_without_it_two_tasks_are_two_protected_updates_bitwise() -> None:
    method, zero, by_hand = tiny("llama"), tiny("llama"), tiny("llama")
    none, nothing = osft(unfreeze_rank_ratio=0.5), osft(unfreeze_rank_ratio=0.5, protect_learned=0.0)
    for index in range(2):
        learn(none, method, index)
        learn(nothing, zero, index)
        lorica.protect(by_hand, lorica.plan(by_hand, 0.5))
        train(by_hand, AdamW(trainable(by_hand), lr=5e-3), 3, lambda step, i=index: batch(by_hand, 10 * i + step))
        lorica.release(by_hand)
    assert none.state_dict() == nothing.state_dict() == {}
    for key, value in weights(by_hand).items():
        assert torch.equal(value, weights(method)[key]), key
        assert torch.equal(value, weights(zero)[key]), key


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_of_a_full_rank_task_leaves_nothing_to_change(constraint: Any, dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    method = osft(rank_schedule=[0.0], constraint=constraint, protect_learned=1.0)
    first = learn(method, model, 0)
    before = weights(model)
    begin_and_train(method, model, 1)
    method.end_task(model, task_of(model, 1))
    for name, change in first.items():
        assert int(torch.linalg.matrix_rank(change)) == min(change.shape), "the first task moved every direction"
        m, n = change.shape
        if not (constraint == "input" and n > m) and not (constraint == "output" and m > n):
            assert torch.equal(before[f"{name}.weight"], weights(model)[f"{name}.weight"])


def test_the_memory_does_not_grow() -> None:
    model = tiny("llama")
    method = osft(unfreeze_rank_ratio=0.75, protect_learned=0.125)
    sizes = []
    for index in range(4):
        changes = learn(method, model, index)
        sizes.append(sum(tensor.nbytes for tensor in method.state_dict().values()))
    assert len(set(sizes[1:])) == 1
    assert sizes[-1] <= sum(4 * (min(d.shape) // 8) * (sum(d.shape) + 1) for d in changes.values())


@pytest.mark.parametrize(
    "options",
    [
        {"protect_learned": 0.25},
        {"protect_learned": 0.25, "constraint": "block"},
        {"protect_learned": 0.25, "remember_tasks": True, "source": "hybrid", "calibration": "random"},
    ],
    ids=str,
)
def test_a_new_object_goes_on_bit_for_bit(options: dict[str, Any]) -> None:
    model, resumed = tiny("llama"), tiny("llama")
    method, early = (osft(unfreeze_rank_ratio=0.5, **options) for _ in range(2))
    learn(method, model, 0)
    learn(early, resumed, 0)
    late = osft(unfreeze_rank_ratio=0.5, **options)
    late.load_state_dict(early.state_dict())
    for index in (1, 2):
        learn(method, model, index)
        learn(late, resumed, index)
    assert method.state_dict().keys() == late.state_dict().keys()
    for key, value in method.state_dict().items():
        assert torch.equal(value, late.state_dict()[key]), key
    for key, value in weights(model).items():
        assert torch.equal(value, weights(resumed)[key]), key


def seen_by(model: nn.Module, name: str, index: int, rows: int) -> Tensor:
    """Return the second moment, of trace 1, of what one layer sees of a task's rows."""
    moment = second_moment(model, name, task_of(model, index).batches(rows))
    return moment / moment.trace()


def second_moment(model: nn.Module, name: str, batches: Iterable[Any]) -> Tensor:
    caught: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, inputs, __: caught.append(inputs[0]))
    with torch.no_grad():
        for inputs in batches:
            model(**inputs)
    handle.remove()
    x = torch.cat([one.reshape(-1, one.shape[-1]) for one in caught]).double()
    return x.T @ x


def top_eigenvectors(symmetric: Tensor, k: int) -> Tensor:
    return torch.linalg.eigh(symmetric).eigenvectors.flip(1)[:, :k]


@pytest.mark.parametrize("source", ["activation", "hybrid"])
def test_the_inputs_of_finished_tasks_count_in_the_next(source: Any) -> None:
    model, name = tiny("llama"), "model.layers.1.mlp.down_proj"
    calibration = [batch(model, 77)]
    method = osft(
        source=source, unfreeze_rank_ratio=0.5, calibration=calibration, remember_tasks=True, remember_rows=5,
        remember_size=4.0,
    )  # fmt: skip
    past = torch.zeros(48, 48, dtype=torch.float64)
    for index in range(2):
        learn(method, model, index)
        past += seen_by(model, name, index, rows=5)
        kept = method.carried.tasks.factors[name].inputs
        assert kept is not None
        assert kept.trace == pytest.approx(index + 1)
        torch.testing.assert_close(kept.matrix(), past, atol=2e-3 * float(past.norm()), rtol=0)  # kept as float16
    measured = second_moment(model, name, calibration)
    change = begin_and_train(method, model, 2)[name]
    k = 24 if source == "activation" else 12
    v = top_eigenvectors(measured / measured.trace() + kept.matrix(), k)
    assert (change @ v).norm() <= 1e-5 * change.norm()
    without = top_eigenvectors(measured, k)
    assert (change @ without).norm() > 1e-2 * change.norm(), "the past changed nothing"
    assert method.audit(model).holds


@pytest.mark.parametrize("constraint", ["input", "two-sided"])
def test_hybrid_keeps_the_outputs_of_its_principal_inputs(constraint: Any) -> None:
    model = tiny("llama")
    method = osft(source="hybrid", constraint=constraint, effective_rank=12, calibration="random")
    before = {name: matrix_of(layer).detach().clone() for name, layer in planned(model).items()}
    options: dict[str, Any] = {"source": "hybrid", "constraint": constraint, "effective_rank": 12}
    plan = lorica.plan(model, **options, calibration="random")
    changes = begin_and_train(method, model, 0)
    for name, change in changes.items():
        factors = plan.factors(name)
        assert factors is not None
        assert factors.inputs is not None
        v = factors.inputs.vectors_DR[:, :6]
        u, w = top_directions(before[name], 6)
        assert max(leaks(change, u, torch.cat([v, w], 1), constraint)) <= 1e-5
    assert method.audit(model).holds


@pytest.mark.parametrize(("name", "choice"), [("llama", "self"), ("t5", "random"), ("bert", "random")])
def test_osft_calibrates_by_itself(name: str, choice: str) -> None:
    model = tiny(name)
    model.config.max_position_embeddings = 8  # for speed
    method = osft(source="activation", unfreeze_rank_ratio=0.5)
    method.begin_task(model, task_of(model))
    alike = tiny(name)
    alike.config.max_position_embeddings = 8
    lorica.protect(alike, lorica.plan(alike, 0.5, source="activation", calibration=choice))
    assert same_bases(model, alike)


@pytest.mark.parametrize("constraint", ["two-sided", "block"])
def test_what_was_measured_is_not_held_beside_the_bases_that_are_made_of_it(constraint: Any) -> None:
    model = tiny("llama")
    method = osft(source="curvature", constraint=constraint, calibration="random")
    begin_and_train(method, model, 0)
    plans = [method.plan] if constraint == "block" else [method.plan, plan_of(model)]
    for plan in plans:
        assert plan is not None
        assert [plan.factors(name) for name in plan.names()] == [None] * len(plan)
    assert method.audit(model).holds


def test_the_protected_share_follows_the_schedule() -> None:
    model = tiny("llama")
    method = osft(rank_schedule=[0.25, 0.75, 0.5])
    expected = [8, 24, 16, 16]  # of 32; the last share holds on
    for index, k in enumerate(expected):
        method.begin_task(model, task_of(model, index))
        assert method.plan is not None
        assert [entry.k for entry in method.plan.entries if min(entry.shape) == 32] == [k] * 10
        method.end_task(model, task_of(model, index))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protect_learned": 1.5}, "protect_learned = 1.5 is out of range"),
        ({"protect_learned": float("nan")}, "protect_learned = nan is out of range"),
        ({"remember_tasks": True}, "remember_tasks has no effect with source 'weight'"),
        ({"remember_rows": 3}, "remember_rows has no effect without remember_tasks"),
        ({"remember_rows": 0}, "remember_rows = 0 is out of range"),
        ({"rank_schedule": []}, "rank_schedule holds nothing"),
        ({"rank_schedule": [0.5, 1.1]}, r"rank_schedule holds 1\.1"),
        ({"rank_schedule": [0.5], "unfreeze_rank_ratio": 0.5}, "^unfreeze_rank_ratio and rank_schedule both say"),
        ({"rank_schedule": [0.5], "osft_unfreeze_rank_ratio": 0.5}, "osft_unfreeze_rank_ratio and rank_schedule"),
        ({"rank_schedule": [0.5], "effective_rank": 0.5}, "effective_rank and rank_schedule both say"),
        ({"rank_schedule": [0.5], "ranks": "energy"}, "rank_schedule is for ranks 'uniform', not 'energy'"),
        ({"source": "hybrid", "constraint": "block"}, "source 'hybrid' is for constraint 'input' or 'two-sided'"),
        ({"source": "hybrid", "ranks": "energy"}, "with source 'hybrid' use 'uniform'"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    with pytest.raises(LoricaError, match=message):
        osft(**options).begin_task(model, task_of(model))
    assert not protected_layers(model)


def test_what_was_remembered_is_not_dropped_in_silence() -> None:
    model = tiny("llama")
    method = osft(source="activation", calibration="random", protect_learned=0.25, remember_tasks=True)
    learn(method, model, 0)
    state = method.state_dict()
    measured = {"source": "activation", "calibration": "random"}
    with pytest.raises(LoricaError, match="set protect_learned, or 0 to give it up"):
        osft(**measured, remember_tasks=True).load_state_dict(state)
    with pytest.raises(LoricaError, match="set remember_tasks"):
        osft(**measured, protect_learned=0.25).load_state_dict(state)
    given_up = osft(**measured, remember_tasks=True, protect_learned=0)
    given_up.load_state_dict(state)
    assert {key.split(".")[0] for key in given_up.state_dict()} == {"tasks", "longest"}


def test_a_given_plan_is_used_in_every_task_and_left_alone() -> None:
    model = tiny("llama")
    plan = lorica.plan(model, 0.5, constraint="input")
    original = plan.model_copy(deep=True)
    method = OSFT(Protection(plan=plan, protect_learned=0.25))
    learn(method, model, 0)
    held = {name: learned_directions(method, name) for name in plan.names()}
    for name, change in begin_and_train(method, model, 1).items():
        assert max(leaks(change, *held[name], "input")) <= 1e-5
    assert method.plan is not None
    assert all(entry.learned[1] for entry in method.plan.entries)
    assert plan == original
    with pytest.raises(LoricaError, match="remember_tasks has no effect beside a plan"):
        OSFT(Protection(plan=plan, remember_tasks=True))


def test_the_saved_plan_of_an_update_can_be_given_back(tmp_path: Path) -> None:
    """Edited too: what is measured is then measured anew, with what finished tasks left behind and all that holds."""
    options: dict[str, Any] = {"remember_tasks": True, "curvature_penalty": 10.0, "calibration": "random"}
    first = tiny("llama")
    method = osft(source="curvature", unfreeze_rank_ratio=0.5, **options)
    learn(method, first, 0)
    second = copy.deepcopy(first)
    assert method.plan is not None
    method.plan.save(tmp_path / "plan.json")
    given = osft(plan=Plan.load(tmp_path / "plan.json"), **options)
    given.load_state_dict(method.state_dict())
    learn(method, first, 1)
    learn(given, second, 1)
    assert all(torch.equal(weight, weights(second)[name]) for name, weight in weights(first).items())
    ours, theirs = method.state_dict(), given.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(kept, theirs[name]) for name, kept in ours.items()), "gradients are remembered as well"
    with pytest.raises(LoricaError, match="source has no effect beside a plan"):
        osft(plan=Plan.load(tmp_path / "plan.json"), source="curvature")
    with pytest.raises(LoricaError, match="calibration has no effect beside a plan"):
        osft(plan=lorica.plan(tiny("llama"), 0.5), calibration="random")
    edited = Plan.load(tmp_path / "plan.json")
    edited.entries[0] = edited.entries[0].model_copy(update={"constraint": "input", "k_output": None})
    with pytest.raises(LoricaError, match="curvature_penalty needs both sides"):
        osft(plan=edited, curvature_penalty=1.0)


def test_folders_alone_do_not_hold_what_was_learned(tmp_path: Path) -> None:
    model = tiny("llama")
    method = osft(unfreeze_rank_ratio=0.5, protect_learned=0.25)
    learn(method, model, 0)
    model.save_pretrained(tmp_path / "before")
    learn(method, model, 1)
    model.save_pretrained(tmp_path / "after")
    assert method.plan is not None
    method.plan.save(tmp_path / "plan.json")
    folders = partial(lorica.audit, tmp_path / "before", tmp_path / "after")
    assert folders(method.plan).holds, "the plan of the run still knows them"
    by_rank = folders(Plan.load(tmp_path / "plan.json"))
    assert by_rank.holds
    assert "directions of finished tasks are not in the weights" in by_rank.verdict()
    with pytest.raises(LoricaError, match="set its 'learned' to"):
        osft(plan=Plan.load(tmp_path / "plan.json")).begin_task(model, task_of(model))
