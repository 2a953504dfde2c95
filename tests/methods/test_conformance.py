"""One table for all methods: what each must do, whatever it is, on every kind of model.

A method that joins the registry is tested here as it is. Three tasks of random rows go through the real Trainer: AdamW
with weight decay, clipping and gradient accumulation.
"""

from __future__ import annotations

import inspect
import math
import random
import re
import tempfile
import typing
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import set_seed

import lorica
from lorica.errors import LoricaError
from lorica.memory import load_memory, save_memory, size_of
from lorica.methods import METHODS, Method, Targets, TaskData
from lorica.training.arguments import training_arguments
from lorica.training.trainer import fit
from tests.builders import BatchRows, task_of, tiny
from tests.methods.little_text import little_text  # noqa: F401

TASKS, STEPS = 3, 2
FAMILIES = ("llama", "gpt2", "t5", "bert-classifier")

SMALL: dict[str, dict[str, Any]] = {
    "ewc": {"fisher_rows": 4, "ewc_lambda": 1e4},
    "gpm": {"rows": 4, "energy": 0.6},
    "sgp": {"rows": 4, "energy": 0.6},
    "ogd": {"gradients_per_task": 4},
    "replay": {"ratio": 0.25},
    "osft": {"unfreeze_rank_ratio": 0.5},
    "osft-factored": {"unfreeze_rank_ratio": 0.5},
}
"""Options with which 12 rows and 2 steps are enough for a method's own part to show. All others run by default."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "osft-block": ("osft", {"unfreeze_rank_ratio": 0.5, "constraint": "block", "protect_learned": 0.25}),
    "osft-remembering": (
        "osft",
        {"unfreeze_rank_ratio": 0.5, "source": "activation", "calibration": "random", "protect_learned": 0.25,
         "remember_tasks": True, "remember_rows": 4},
    ),
    "osft-hybrid": (
        "osft",
        {"source": "hybrid", "constraint": "two-sided", "calibration": "random", "rank_schedule": [0.3, 0.5]},
    ),
    "osft-curvature": (
        "osft",
        {"unfreeze_rank_ratio": 0.5, "source": "curvature", "calibration": "random", "protect_learned": 0.25,
         "remember_tasks": True, "remember_rows": 4, "remember_size": 0.25},
    ),
    "osft-curvature-block": (
        "osft",
        {"unfreeze_rank_ratio": 0.5, "source": "curvature", "constraint": "block", "calibration": "random"},
    ),
    "osft-held": (
        "osft",
        {"unfreeze_rank_ratio": 0.5, "source": "curvature", "calibration": "random", "curvature_penalty": 50.0,
         "remember_tasks": True, "remember_rows": 4},
    ),
    "osft-rehearsing": ("osft", {"unfreeze_rank_ratio": 0.5, "rehearse": 1.0}),
    "osft-prompted": (
        "osft", {"unfreeze_rank_ratio": 0.5, "rehearse": 1.0, "source": "activation", "prompts": [[3, 9, 14], [21]]},
    ),
    "osft-gradient-flat": ("osft-gradient", {"form": "flat", "k": 2, "refresh": 1}),
    "osft-gradient-delta": ("osft-gradient", {"snapshot": "delta", "constraint": "two-sided", "k": 2}),
    "sgp-step": ("sgp", SMALL["sgp"] | {"scaled": "step"}),
    "ogd-logit": ("ogd", SMALL["ogd"] | {"gradient_of": "logit"}),
    "lwf-from-first": ("lwf", {"from_first_task": True}),
}  # fmt: skip
"""Options that change what a method does or carries; on one family."""

DRAWN_AND_SET = ("milora", "pissa")
"""Their adapters are drawn as every LoRA is, and then set to singular vectors."""

TRAINERS_OWN = {"_is_accelerate_prepared"}
"""What the Trainer, not a method, leaves on a model."""

CASES = {name: (name, SMALL.get(name, {})) for name in METHODS} | VARIANTS
ROWS = [(name, family) for name in METHODS for family in FAMILIES] + [(name, "llama") for name in VARIANTS]

every_row = pytest.mark.parametrize(("case", "family"), ROWS, ids=[" ".join(row) for row in ROWS])
every_case = pytest.mark.parametrize("case", CASES)
every_method = pytest.mark.parametrize("name", METHODS)


class Locked(Dataset[dict[str, list[int]]]):
    """Rows of an earlier task as they are to a method that says it does not need them."""

    def __len__(self) -> int:
        raise AssertionError("the method looked at old rows, and needs_old_data is False")

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [len(self)]}


@dataclass(frozen=True)
class WatchedTask(TaskData):
    """A task that knows whether anybody drew by its seed."""

    asked: set[str] = field(default_factory=set)

    def __getattribute__(self, name: str) -> Any:
        if name == "seed":
            object.__getattribute__(self, "asked").add(name)
        return object.__getattribute__(self, name)


@dataclass
class Learned:
    """What a method made of a model, task after task.

    Attributes:
        weights: by name, before the first task and after each.
        anatomies: of the model at the same moments.
        logs: the Trainer's, of each task.
        states: what was carried after each task.
        moved_random: random states of the process that a hook changed, and the hook.
        drew: whether the method asked for the task's seed.
    """

    weights: list[dict[str, Tensor]]
    anatomies: list[dict[str, Any]]
    logs: list[list[dict[str, float]]] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    moved_random: set[str] = field(default_factory=set)
    drew: bool = False

    @classmethod
    def before(cls, model: nn.Module) -> Learned:
        return cls([weights_of(model)], [anatomy(model)])


def build(case: str, family: str) -> Method:
    name, options = CASES[case]
    head = {"train_also": [r"^classifier\."]} if family == "bert-classifier" else {}
    return METHODS[name].build(options | head)


def new_model(family: str) -> Any:
    model = tiny(family)
    next(model.parameters()).requires_grad_(False)  # a flag of the user's own, which must come back
    return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Return everything about a model but the values of its weights."""
    state, shared = model.state_dict(), defaultdict(list)
    for key, tensor in state.items():
        shared[tensor.data_ptr()].append(key)
    modules = dict(model.named_modules())
    return {
        "modules": {name: type(module) for name, module in modules.items()},
        "attributes": {name: set(vars(module)) - TRAINERS_OWN for name, module in modules.items()},
        "hooks": {name: hooks_of(module) for name, module in modules.items()},
        "state": {key: (tensor.shape, tensor.stride(), tensor.dtype) for key, tensor in state.items()},
        "tied": sorted(keys for keys in shared.values() if len(keys) > 1),
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {name for name, parameter in model.named_parameters() if parameter.grad is not None},
    }


def hooks_of(module: nn.Module) -> int:
    return sum(len(value) for key, value in vars(module).items() if key.endswith("_hooks"))


def random_states() -> dict[str, Any]:
    _, numbers, position, *_ = np.random.get_state()  # the process's own is what is watched
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (numbers.tolist(), position),  # type: ignore[union-attr]
        "python": random.getstate(),
    }


def tasks_for(method: Method, model: Any, seed: int) -> list[WatchedTask]:
    tasks = []
    for index in range(TASKS):
        plain = task_of(model, index, TASKS)
        earlier = tuple(
            BatchRows(model, seed=1000 + old, rows=12) if method.needs_old_data else Locked() for old in range(index)
        )
        tasks.append(WatchedTask(plain.name, index, TASKS, plain.rows, plain.collate, seed, earlier))
    return tasks


def learn(method: Method, model: Any, task: WatchedTask, told: Learned) -> None:
    """Learn one task as ``lorica run`` does, and note what happened."""
    log: list[dict[str, float]] = []
    set_seed(0)
    if method.learns(task):
        with watching(told, "begin_task"):
            method.begin_task(model, task)
        with tempfile.TemporaryDirectory() as folder:
            log = fit(
                model, method, method.training_data(task), None, task.collate, arguments(model, folder), quiet=True
            )
        with watching(told, "audit"):
            method.audit(model)
        with watching(told, "end_task"):
            method.end_task(model, task)
    told.logs.append(log)
    told.weights.append(weights_of(model))
    told.anatomies.append(anatomy(model))
    told.states.append({name: tensor.clone() for name, tensor in method.state_dict().items()})
    told.drew |= "seed" in task.asked


class watching:
    """Note a hook that leaves another random state than it found."""

    def __init__(self, told: Learned, hook: str) -> None:
        self.told, self.hook = told, hook

    def __enter__(self) -> None:
        self.before = random_states()

    def __exit__(self, *_: object) -> None:
        now = random_states()
        self.told.moved_random |= {f"{kind} in {self.hook}" for kind in now if now[kind] != self.before[kind]}


def arguments(model: Any, folder: str) -> Any:
    given = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 5e-3,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.1, "max_grad_norm": 0.5,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 0,
    }  # fmt: skip
    return training_arguments(given, folder, hidden_size=None, seq2seq=model.config.is_encoder_decoder)


def with_weights(family: str, weights: Mapping[str, Tensor]) -> Any:
    model = new_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model


def stream(case: str, family: str, *, tasks: int = TASKS, seed: int = 0) -> Learned:
    """Learn the first tasks of the stream without a stop."""
    method, model = build(case, family), new_model(family)
    told = Learned.before(model)
    for task in tasks_for(method, model, seed)[:tasks]:
        if method.restarts and task.index:
            model = new_model(family)
        learn(method, model, task, told)
    return told


learned = cache(stream)
"""The same for all tests that look at one run."""


def planned(family: str) -> set[str]:
    return {f"{name}.weight" for name in lorica.plan(tiny(family)).names()}


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {name for name, weight in before.items() if not torch.equal(weight, after[name])}


@every_row
def test_losses_and_weights_stay_finite(case: str, family: str) -> None:
    told = learned(case, family)
    for log in filter(None, told.logs):
        losses = [step["loss"] for step in log if "loss" in step]
        assert len(losses) == STEPS
        assert all(map(math.isfinite, losses)), losses
        assert all(math.isfinite(step["grad_norm"]) for step in log if "grad_norm" in step)
    assert told.logs[-1], "whatever waits learns at the last task"
    for weights in told.weights:
        assert [name for name, weight in weights.items() if not weight.isfinite().all()] == []


@every_row
def test_between_tasks_the_model_is_plain(case: str, family: str) -> None:
    first, *others = learned(case, family).anatomies
    for index, after in enumerate(others):
        for part in first:
            assert after[part] == first[part], f"{part} after task {index}"


@every_row
def test_each_task_moves_the_planned_weights_and_nothing_else(case: str, family: str) -> None:
    told = learned(case, family)
    open_names = planned(family)
    assert not [name for name in open_names if re.search("embed|norm|wte|wpe|ln_|lm_head|shared|classifier", name)]
    if family == "bert-classifier":
        open_names |= {"classifier.weight", "classifier.bias"}
    for before, after, log in zip(told.weights, told.weights[1:], told.logs, strict=False):
        changed = moved(told.weights[0] if METHODS[CASES[case][0]].restarts else before, after)
        assert changed == (open_names if log else set())


@every_row
def test_what_is_carried_is_all_that_a_later_task_needs(case: str, family: str, tmp_path: Path) -> None:
    told = learned(case, family)
    assert all(isinstance(tensor, Tensor) for state in told.states for tensor in state.values())
    save_memory(told.states[-2], tmp_path / "memory.safetensors")
    method = build(case, family)
    method.load_state_dict(load_memory(tmp_path / "memory.safetensors"))
    resaved = method.state_dict()
    assert resaved.keys() == told.states[-2].keys()
    assert all(torch.equal(tensor, told.states[-2][name]) for name, tensor in resaved.items())
    if not resaved and family != FAMILIES[0]:
        return  # whether anything is missing does not depend on the family
    model = new_model(family) if method.restarts else with_weights(family, told.weights[-2])
    gone_on = Learned.before(model)
    learn(method, model, tasks_for(method, model, 0)[-1], gone_on)
    assert moved(told.weights[-1], gone_on.weights[-1]) == set()
    assert all(torch.equal(gone_on.states[-1][name], tensor) for name, tensor in told.states[-1].items())


@every_case
@pytest.mark.reliability("R27")
def test_the_same_seed_gives_the_same_weights_and_another_one_not(case: str) -> None:
    told, again = learned(case, "llama"), stream(case, "llama", tasks=2)
    assert moved(told.weights[2], again.weights[2]) == set()
    if told.drew:  # else nobody has looked at the seed
        other = stream(case, "llama", tasks=2, seed=1)
        differs = bool(moved(told.weights[2], other.weights[2])) or states_differ(told.states[1], other.states[1])
        assert differs == (case not in DRAWN_AND_SET)


def states_differ(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() != two.keys() or not all(torch.equal(one[name], two[name]) for name in one)


@every_row
def test_no_hook_touches_the_random_state_of_the_process(case: str, family: str) -> None:
    assert learned(case, family).moved_random == set()


@every_row
def test_what_is_carried_grows_only_where_it_says_so(case: str, family: str) -> None:
    told, kind = learned(case, family), METHODS[CASES[case][0]]
    first, second, third = (size_of(state) for state in told.states)
    if "grows with the tasks" in kind.stores:
        assert 0 < first < second < third
    else:
        assert first == second == third
    if case in METHODS and kind.stores.startswith("nothing"):
        assert third == 0


@every_method
def test_a_row_of_facts(name: str) -> None:
    kind = METHODS[name]
    assert {"summary", "reproduction"} <= vars(kind).keys(), "not what another method says of itself"
    for text in (kind.summary, kind.stores, kind.reproduction):
        assert text.strip() == text != ""
        assert len(text) <= 160
        assert "\n" not in text
        assert not text.endswith(".")
    assert kind.__doc__
    assert kind.learning_rate_scale > 0
    assert [f.name for f in fields(kind.options_type)][:3] == [f.name for f in fields(Targets)]


@every_method
def test_every_option_is_named_where_it_is_described(name: str) -> None:
    kind = METHODS[name].options_type
    described = (*kind.__mro__, lorica.plan)
    text = "\n".join(inspect.getdoc(one) or "" for one in described)
    for option in fields(kind):
        assert re.search(rf"\b{option.name}\b", text), f"{kind.__name__} says nothing of {option.name}"


@every_method
def test_an_unknown_option_is_one_error_with_the_nearest_name(name: str) -> None:
    for option in fields(METHODS[name].options_type):
        with pytest.raises(LoricaError, match=rf"unknown option '{option.name}x'.*Did you mean '"):
            METHODS[name].build({f"{option.name}x": 1})


@every_method
def test_a_value_of_the_wrong_type_is_one_error_that_names_the_option(name: str) -> None:
    for option in fields(METHODS[name].options_type):
        with pytest.raises(LoricaError, match=rf"option '{option.name}': .*nonsense") as caught:
            METHODS[name].build({option.name: {"nonsense": ["nonsense"]}})
        assert "\n" not in str(caught.value)


@every_method
@pytest.mark.parametrize("number", [math.nan, math.inf, -1.0])
def test_no_option_takes_a_number_that_makes_no_sense(name: str, number: float) -> None:
    kind, model = METHODS[name].options_type, tiny("llama")
    task = task_of(model, TASKS - 1, TASKS)
    for option, hint in typing.get_type_hints(kind).items():
        if {hint, *typing.get_args(hint)} & {int, float}:
            with pytest.raises(LoricaError, match=rf"\b{option}\b"):
                METHODS[name].build({option: number}).begin_task(model, task)


@every_method
def test_narrow_weights_are_learned_or_refused_with_the_model_as_it_was(name: str) -> None:
    model = tiny("llama", torch.bfloat16)
    before, told, method = anatomy(model), Learned.before(model), build(name, "llama")
    task = tasks_for(method, model, 0)[-1]
    refused = ""
    try:
        learn(method, model, task, told)
    except LoricaError as error:
        refused = str(error)
    assert not refused or refused.endswith("load the model as float32")
    assert bool(moved(told.weights[0], weights_of(model))) == (not refused)
    assert anatomy(model) == before
