"""What must not bend the way that training takes: evaluation, accumulation, empty steps, hand-overs, exports."""

from __future__ import annotations

import copy
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, AdamW, Optimizer
from transformers import AutoTokenizer, Seq2SeqTrainingArguments

import lorica
from lorica.constrain.protect import protected_layers
from lorica.methods import METHODS, Targets
from lorica.methods.seqft import SeqFT
from lorica.subspace.plan_entry import PlanEntry
from lorica.training.output import save_model
from lorica.training.trainer import MethodTrainer, fit
from tests.builders import ARCHITECTURES, CONSTRAINTS, DENSE, batch, leakage, task_of, tiny, train, trainable
from tests.experiments.conftest import Write, write  # noqa: F401
from tests.experiments.conftest import run as run_stream
from tests.reliability.trainings import TOKENIZER, arguments, equal, written_rows
from tests.training.conftest import llama_folder, rows, t5_folder  # noqa: F401
from tests.training.test_penalty import uneven

STEPS = {"max_steps": 4, "learning_rate": 3e-3, "disable_tqdm": True, "preset": "paper"}


def update(folder: Path, out: Path, file: str, **options: Any) -> dict[str, Tensor]:
    """Run ``lorica train`` on a model with dropout and return the weights."""
    files = {"model_name_or_path": str(folder), "output_dir": str(out), "train_file": file}
    lorica.train(STEPS | files | options, say=lambda line: None)
    return load_file(out / "model.safetensors")


# --- evaluation in the middle of training --------------------------------------------------------------------------


@pytest.mark.reliability("R34", "R27")
@pytest.mark.parametrize("kind", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_scores_in_between_change_nothing(kind: str, request: pytest.FixtureRequest, rows: Any, tmp_path: Path) -> None:
    folder, file, seen = request.getfixturevalue(f"{kind}_folder"), rows("new"), rows("dev")
    plain = update(folder, tmp_path / "plain", file, seed=5)
    again = update(folder, tmp_path / "again", file, seed=5)
    other = update(folder, tmp_path / "other", file, seed=6)
    often = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "eval_file": seen}
    scored = update(folder, tmp_path / "scored", file, seed=5, **often)
    assert equal(plain, again)
    assert equal(plain, scored)
    assert not equal(plain, other), "or nothing was drawn"


def random_numbers() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


@pytest.mark.reliability("R34")
@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_leaves_no_trace(training: bool, tmp_path: Path) -> None:
    model, data = tiny("llama"), written_rows(tmp_path)
    model.resize_token_embeddings(len(TOKENIZER))
    task = task_of(model)
    trainer = MethodTrainer(
        method=SeqFT(Targets()), rows=data, collate=task.collate, model=model, eval_dataset=data,
        args=arguments(tmp_path / "out"), processing_class=TOKENIZER,
    )  # fmt: skip
    model.train(training)
    model(**batch(model)).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = random_numbers()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    assert trainer.evaluate()["eval_loss"] > 0
    assert random_numbers() == expected
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(parameter.grad, gradients[name]) for name, parameter in model.named_parameters())


@pytest.mark.reliability("R34")
def test_what_a_run_scores_changes_nothing_of_what_it_learns(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    ends = {}
    for name, changes in (("scored", {}), ("bare", {"held_out": []})):
        options = {"seeds": 3, "methods": ["half"], "max_steps": 3, "save_models": True}
        (record,), _ = run_stream(write(**changes), llama_folder, tmp_path / name, **options)
        ends[name] = load_file(tmp_path / name / "half" / "model" / "model.safetensors")
        assert bool(record["retention"]) == (name == "scored")
    assert equal(ends["scored"], ends["bare"])


# --- accumulation --------------------------------------------------------------------------------------------------


def first_step(name: str, rows_at_a_time: int, folder: Path, smoothing: float) -> tuple[dict[str, Tensor], float]:
    """Return the gradient of eight rows, by SGD at rate 1, and their loss."""
    model = tiny(name)
    classifies = name == "bert-classifier"
    task = task_of(model, rows=8) if classifies else uneven(model)
    method = SeqFT(Targets())
    method.begin_task(model, task)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    chosen = Seq2SeqTrainingArguments(
        output_dir=str(folder), max_steps=1, learning_rate=1.0, optim="sgd", lr_scheduler_type="constant",
        max_grad_norm=0.0, per_device_train_batch_size=rows_at_a_time, use_cpu=True, logging_steps=1,
        gradient_accumulation_steps=8 // rows_at_a_time, save_strategy="no", report_to="none", disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False, label_smoothing_factor=smoothing,
    )  # fmt: skip
    log = fit(model, method, task.rows, None, task.collate, chosen, quiet=True)
    return {key: before[key] - value for key, value in model.state_dict().items()}, log[0]["loss"]


@pytest.mark.reliability("R28")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert-classifier"])
def test_eight_times_one_row_is_once_eight(name: str, smoothing: float, tmp_path: Path) -> None:
    if name == "bert-classifier" and smoothing:
        pytest.skip("the Trainer's label smoothing is for tokens")
    whole, loss = first_step(name, 8, tmp_path, smoothing)
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    assert largest > 0
    for rows_at_a_time in (1, 2):
        parts, same_loss = first_step(name, rows_at_a_time, tmp_path, smoothing)
        assert same_loss == pytest.approx(loss, abs=1e-6)
        apart = max(float((whole[key] - parts[key]).abs().max()) for key in whole)
        assert apart <= 1e-6
        assert apart <= 1e-3 * largest


# --- every target, with all that a training has --------------------------------------------------------------------


@pytest.mark.reliability("R29")
@pytest.mark.parametrize("memory", ["fast", pytest.param("lean", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", DENSE)
def test_adamw_decay_and_clipping_leave_every_target_s_directions_alone(name: str, memory: str) -> None:
    constraint = CONSTRAINTS[DENSE.index(name) % len(CONSTRAINTS)]
    model = tiny(name)
    plan = lorica.plan(model, 0.5, constraint=constraint)
    before = {e.name: model.get_submodule(e.name).weight.detach().clone() for e in plan.entries}
    lorica.protect(model, plan, memory=memory)
    optimizer = AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    for step in range(8):
        model(**batch(model, step)).loss.backward()
        nn.utils.clip_grad_norm_(trainable(model), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    layers = protected_layers(model)
    for entry in plan.entries:
        layer, old = layers[entry.name], before[entry.name]
        old = old.T if layer.transposed else old
        leak_u, leak_v = leakage(old, layer.matrix, entry.k)
        assert constraint == "input" or leak_u <= 1e-5
        assert constraint == "output" or leak_v <= 1e-5


# --- steps that are none -------------------------------------------------------------------------------------------


def engine(kind: str) -> tuple[nn.Module, Any]:
    """Return a model under one of the engines, and a maker of its optimizers."""
    model = tiny("llama")
    plan = lorica.plan(model, 0.5, constraint="block" if kind == "block" else "two-sided")
    if kind == "block":
        constraints = lorica.block_constraints(model, plan)
        return model, lambda: lorica.ConstrainedOptimizer(inner(model), constraints, max_grad_norm=1.0)
    lorica.protect(model, plan, memory=kind)
    return model, lambda: inner(model)


def inner(model: nn.Module) -> Optimizer:
    return AdamW(trainable(model), lr=1e-2, weight_decay=0.1)


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all weights, cores and bases, and of W0."""
    held = {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return held | {f"{name}.W0": layer.base.clone() for name, layer in protected_layers(model).items()}


ENGINES = pytest.mark.parametrize("kind", ["fast", "lean", "block"])


@pytest.mark.reliability("R31")
@ENGINES
def test_the_hidden_step_of_a_distributed_checkpoint_changes_nothing(kind: str) -> None:
    """Torch's state dictionaries step a fresh optimizer once, with gradients and learning rates of 0."""
    model, make = engine(kind)
    trained = make()
    train(model, trained, 3, partial(batch, model))
    before = everything(model)
    fresh = make()
    state = get_optimizer_state_dict(model, fresh)
    assert state["state"], "there was a step"
    assert equal(everything(model), before)
    assert {group["lr"] for group in fresh.param_groups} == {1e-2}
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.reliability("R31")
@ENGINES
def test_training_goes_on_after_it_as_without_it(kind: str) -> None:
    model, make = engine(kind)
    optimizer = make()
    train(model, optimizer, 3, partial(batch, model))
    held = copy.deepcopy(get_model_state_dict(model)), copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    train(model, optimizer, 3, lambda step: batch(model, 10 + step))
    other, make = engine(kind)
    other.load_state_dict(held[0])
    resumed = make()
    set_optimizer_state_dict(other, resumed, held[1])
    train(other, resumed, 3, lambda step: batch(other, 10 + step))
    assert equal(everything(other), everything(model))


@pytest.mark.reliability("R31")
@ENGINES
@pytest.mark.parametrize("optimizer", [partial(SGD, lr=0.1), partial(AdamW, lr=0.1, weight_decay=0.0)])
def test_a_step_with_no_gradient_at_all_changes_nothing(kind: str, optimizer: Any) -> None:
    model, make = engine(kind)
    train(model, make(), 3, partial(batch, model))
    stepper = optimizer(trainable(model))
    if kind == "block":
        held = lorica.block_constraints(model, lorica.plan(tiny("llama"), 0.5, constraint="block"))
        stepper = lorica.ConstrainedOptimizer(stepper, held)
    before = everything(model)
    for gradients in (torch.zeros_like, lambda _: None):
        for parameter in trainable(model):
            parameter.grad = gradients(parameter)
        stepper.step()
        assert equal(everything(model), before)


def test_weights_that_did_move_are_put_back() -> None:
    """A change that leaves the sum of all bits as it was is seen by the norm."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(1.0, 1.9, 16).reshape(4, 4))
    plan = lorica.Plan(entries=[PlanEntry(name="0", shape=(4, 4), k=3, constraint="block")])
    constraints = lorica.block_constraints(model, plan)
    before = model[0].weight.detach().clone()
    optimizer = lorica.ConstrainedOptimizer(SGD(model.parameters(), lr=1.0), constraints)
    sign = torch.tensor([1.0, -1.0]).repeat(8).reshape(4, 4)

    @torch.no_grad()
    def step(*_: Any) -> None:
        """Move without a gradient, as momentum does."""
        model[0].weight.add_(sign * 2.0**-10)

    optimizer.inner.register_step_pre_hook(step)
    model[0].weight.grad = torch.zeros(4, 4)
    optimizer.step()
    (block,) = constraints.values()
    kept = block.u.T @ (model[0].weight.detach() - before) @ block.v
    assert not torch.equal(model[0].weight, before)
    assert kept.abs().max() <= 1e-6


# --- between tasks, and out of the house ---------------------------------------------------------------------------

SMALL: dict[str, dict[str, Any]] = {
    "ewc": {"fisher_rows": 4}, "gpm": {"rows": 4}, "sgp": {"rows": 4}, "ogd": {"gradients_per_task": 2},
    "osft": {"unfreeze_rank_ratio": 0.5, "protect_learned": 0.25}, "osft-factored": {"unfreeze_rank_ratio": 0.5},
}  # fmt: skip


def logits(model: nn.Module) -> Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**batch(model, 99)).logits
    model.train(training)
    return found


@pytest.mark.reliability("R32")
@pytest.mark.parametrize("name", METHODS)
def test_what_was_learned_is_handed_over(name: str) -> None:
    model, method = tiny("llama"), METHODS[name].build(SMALL.get(name, {}))
    for index in range(3):
        task = task_of(model, index, 3)
        start = logits(model)
        if not method.learns(task):
            continue
        method.begin_task(model, task)
        torch.testing.assert_close(logits(model), start, rtol=0, atol=1e-6)
        optimizer = method.wrap_optimizer(AdamW(trainable(model), lr=5e-3), 1.0)
        train(model, optimizer, 3, lambda step, index=index: batch(model, 10 * index + step))
        learned = logits(model)
        assert (learned - start).abs().max() > 1e-3
        method.end_task(model, task)
        torch.testing.assert_close(logits(model), learned, rtol=0, atol=1e-6)


@pytest.mark.reliability("R32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_released_and_protected_again_the_weights_are_the_learned_ones_bitwise(memory: str, dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    for task in range(3):
        lorica.protect(model, lorica.plan(model, 0.5), memory=memory)
        train(model, AdamW(trainable(model), lr=1e-2), 3, lambda step, task=task: batch(model, 10 * task + step))
        learned = {name: layer.matrix.detach().clone() for name, layer in protected_layers(model).items()}
        found = logits(model)
        lorica.release(model)
        for name, weight in learned.items():
            assert torch.equal(model.get_submodule(name).weight, weight)
        assert torch.equal(logits(model), found)


@pytest.mark.reliability("R33")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "t5", "t5-gated", "opt"])
def test_what_is_saved_is_what_was_trained(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny(name, dtype).save_pretrained(tmp_path / "before")
    model = type(tiny(name)).from_pretrained(tmp_path / "before").train()
    stored = {key: (tensor.shape, tensor.dtype) for key, tensor in model.state_dict().items()}
    lorica.protect(model, lorica.plan(model, 0.5))
    train(model, AdamW(trainable(model), lr=1e-2), 3, partial(batch, model))
    trained = logits(model)
    lorica.release(model)
    save_model(model, TOKENIZER, tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert type(again).__name__ == ARCHITECTURES[name][1]
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in again.state_dict().items()} == stored
    assert dtype in {tensor.dtype for tensor in again.parameters()}
    embedded, head = again.get_input_embeddings(), again.get_output_embeddings()
    assert (embedded.weight is head.weight) == (model.get_input_embeddings().weight is model.lm_head.weight)
    assert torch.equal(logits(again), trained)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(TOKENIZER)
