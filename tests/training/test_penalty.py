"""What a method adds to the loss enters each optimizer step once, however the step is split into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainingArguments

from lorica.methods.base import Method, Targets
from lorica.methods.ewc import EWC
from lorica.methods.lwf import LwF
from lorica.methods.seqft import SeqFT
from lorica.methods.task import TaskData
from lorica.training.trainer import fit
from tests.builders import task_of, tiny, trainable

LR = 0.1
ROWS = 8


class Pull(SeqFT):
    """Adds what depends on the weights alone."""

    def penalty(self, model: nn.Module, inputs: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        return 0.5 * torch.stack([weight.square().sum() for weight in trainable(model)]).sum()


class Flatten(SeqFT):
    """Adds a mean over the trained tokens of the batch."""

    def penalty(self, model: Any, inputs: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        energy, labels = logits.square().sum(-1), inputs["labels"]
        if not model.config.is_encoder_decoder:
            energy, labels = energy[:, :-1], labels[:, 1:]
        return energy[labels != -100].mean()


def uneven(model: nn.Module, index: int = 0) -> TaskData:
    """Return a task whose rows have from one to six trained tokens, so that no two micro-batches weigh the same."""
    task = task_of(model, index=index, rows=ROWS)
    rows: Any = [task.rows[i] for i in range(ROWS)]
    for i, row in enumerate(rows):
        prompt = 6 - i % 6
        row["labels"] = [-100] * prompt + row["labels"][prompt:]
    return TaskData(task.name, task.index, task.count, rows, task.collate)


def trained(
    name: str, method: Method, folder: Path, *, steps: int = 1, accumulation: int = 1, index: int = 0
) -> dict[str, Tensor]:
    """Train by the Trainer, every step on all rows, and return the weights."""
    model = tiny(name)
    task = uneven(model, index)
    method.begin_task(model, task)
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder), max_steps=steps, learning_rate=LR, optim="sgd", lr_scheduler_type="constant",
        max_grad_norm=0.0, per_device_train_batch_size=ROWS // accumulation, use_cpu=True, seed=3,
        gradient_accumulation_steps=accumulation, save_strategy="no", report_to="none", disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    fit(model, method, method.training_data(task), None, task.collate, arguments, quiet=True)
    method.end_task(model, task)
    return model.state_dict()


def by_hand(name: str, method: Method, *, steps: int = 1) -> dict[str, Tensor]:
    """Train by a plain loop on whole batches and return the weights."""
    model = tiny(name)
    task = uneven(model)
    method.begin_task(model, task)
    inputs = task.collate([task.rows[i] for i in range(ROWS)])
    for _ in range(steps):
        outputs = model(**inputs)
        loss = outputs.loss  # the mean over the trained tokens
        extra = method.penalty(model, inputs, outputs.logits)
        if extra is not None:
            loss = loss + extra
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for weight in trainable(model):
                assert weight.grad is not None
                weight -= LR * weight.grad
    method.end_task(model, task)
    return model.state_dict()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("kind", [SeqFT, Pull, Flatten])
@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.reliability("R28")
def test_the_trainer_is_the_plain_loop(name: str, kind: type[SeqFT], accumulation: int, tmp_path: Path) -> None:
    found = trained(name, kind(Targets()), tmp_path, steps=2, accumulation=accumulation)
    same(found, by_hand(name, kind(Targets()), steps=2))


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_penalty_enters_a_step_once(name: str, accumulation: int, tmp_path: Path) -> None:
    """With SGD the steps with and without the penalty differ by its gradient, and that of |w|^2 / 2 is w."""
    without = trained(name, SeqFT(Targets()), tmp_path, accumulation=accumulation)
    found = trained(name, Pull(Targets()), tmp_path, accumulation=accumulation)
    model = tiny(name)
    SeqFT(Targets()).begin_task(model, uneven(model))
    for key, weight in model.named_parameters():
        expected = -LR * weight.detach() if weight.requires_grad else torch.zeros_like(weight)
        torch.testing.assert_close(found[key] - without[key], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [EWC, LwF])
def test_a_penalty_of_no_weight_is_sequential_fine_tuning_bitwise(kind: type[SeqFT], tmp_path: Path) -> None:
    off = {EWC: {"ewc_lambda": 0.0}, LwF: {"lwf_lambda": 0.0}}[kind]
    on = {EWC: {"ewc_lambda": 1.0}, LwF: {"lwf_lambda": 1.0}}[kind]
    model = tiny("llama")
    learned = EWC.build({})
    learned.begin_task(model, uneven(model))
    learned.end_task(model, uneven(model))
    results = []
    for method in (SeqFT.build({}), kind.build(off), kind.build(on)):
        if kind is EWC:
            method.load_state_dict(learned.state_dict())
        results.append(trained("llama", method, tmp_path, steps=3, accumulation=2, index=1))
    plain, without, with_penalty = results
    assert all(torch.equal(plain[key], without[key]) for key in plain)
    assert any(not torch.equal(plain[key], with_penalty[key]) for key in plain)
