"""Learning without Forgetting: the distillation by hand, and what becomes of the teacher."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lorica.errors import LoricaError
from lorica.methods.lwf import LwF, distillation
from tests.builders import batch, task_of, tiny, trainable


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(x / temperature) for x in logits]
    return [power / sum(powers) for power in powers]


def begun(model: nn.Module, index: int = 1, **options: Any) -> LwF:
    method = LwF.build(options)
    method.begin_task(model, task_of(model, index=index))
    return method


def moved(model: nn.Module, by: float = 0.3) -> nn.Module:
    """Change what trains, each weight differently."""
    with torch.no_grad():
        for parameter in trainable(model):
            parameter += by * torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape)
    return model


def test_distillation_by_hand() -> None:
    """Temperature 2 and logits 2 ln 3, 0 make p = (3/4, 1/4); the student's 0, 0 make q = (1/2, 1/2)."""
    old = torch.tensor([[2 * math.log(3), 0.0], [1.0, 1.0]])
    new = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2  # T^2, and the mean with a token of no change
    assert distillation(old, new, 2.0).item() == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(4 * kl([0.5, 0.5], [0.75, 0.25]) / 2, rel=0.05), "KL is not symmetric"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_distillation_for_any_logits(temperature: float) -> None:
    old, new = [[0.3, -1.0, 2.0], [0.0, 0.5, 0.1]], [[1.0, 1.0, -0.5], [0.2, 0.2, 0.2]]
    rows = [kl(softmax(a, temperature), softmax(b, temperature)) for a, b in zip(old, new, strict=True)]
    found = distillation(torch.tensor(old), torch.tensor(new), temperature)
    assert found.item() == pytest.approx(temperature**2 * sum(rows) / 2, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5", "bert-classifier"])
def test_penalty_is_the_mean_over_the_trained_tokens(name: str) -> None:
    before, model = tiny(name), tiny(name)
    also = ["classifier"] if name == "bert-classifier" else []
    method = begun(model, lwf_lambda=3.0, temperature=2.0, train_also=also)
    inputs = batch(moved(model))
    if name != "bert-classifier":
        inputs["labels"][0, :4] = -100
        inputs["labels"][1, :2] = -100
    logits = model(**inputs).logits
    penalty = method.penalty(model, inputs, logits)
    assert penalty is not None

    old = before(**inputs).logits
    total, count = 0.0, 0
    for row, labels in enumerate(inputs["labels"].tolist()):
        for position, label in enumerate(labels if isinstance(labels, list) else [labels]):
            if label == -100 or (name == "llama" and position == 0):
                continue
            where: Any = row if name == "bert-classifier" else (row, position - (name == "llama"))
            total += kl(softmax(old[where].tolist(), 2.0), softmax(logits[where].tolist(), 2.0))
            count += 1
    assert count == {"llama": 14, "t5": 15, "bert-classifier": 3}[name]
    assert penalty.item() == pytest.approx(3.0 * 4 * total / count, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_while_the_student_is_the_teacher(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    method = begun(model)
    inputs = batch(model)
    penalty = method.penalty(model, inputs, model(**inputs).logits)
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.0, abs=1e-7)
    (gradient,) = torch.autograd.grad(penalty, trainable(model)[:1])
    assert gradient.abs().max() < 1e-6
    penalty = method.penalty(model, inputs, moved(model)(**inputs).logits)
    assert penalty is not None
    assert penalty > 1e-4


def test_following_the_penalty_alone_leads_back_to_the_teacher() -> None:
    model = tiny("llama")
    method = begun(model)
    inputs = batch(moved(model, by=0.05))
    optimizer = AdamW(trainable(model), lr=0.01)
    found = []
    for _ in range(30):
        penalty = method.penalty(model, inputs, model(**inputs).logits)
        assert penalty is not None
        found.append(penalty.item())
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    assert found[-1] < 0.2 * found[0]


def test_the_teacher_is_a_frozen_copy_that_is_freed() -> None:
    model = tiny("llama")
    task = task_of(model, index=1)
    method = LwF.build({})
    method.begin_task(model, task)
    teacher = method._teacher
    assert teacher is not None
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not any(module is teacher for module in model.modules()), "what is in the model would be saved with it"

    kept = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    inputs = batch(moved(model))
    penalty = method.penalty(model, inputs, model(**inputs).logits)
    assert penalty is not None
    penalty.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(parameter, kept[name]) for name, parameter in teacher.named_parameters())

    reference = weakref.ref(teacher)
    del teacher, penalty
    method.end_task(model, task)
    gc.collect()
    assert reference() is None
    assert method.state_dict() == {}


def test_dropout_does_not_reach_the_teacher() -> None:
    model = tiny("t5")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    method = begun(model)
    inputs = batch(model)
    logits: Tensor = model.eval()(**inputs).logits
    model.train()
    penalty = method.penalty(model, inputs, logits)
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.0, abs=1e-6)


def test_the_first_task_has_a_teacher_only_if_asked_for() -> None:
    model = tiny("llama")
    inputs = batch(model)
    assert begun(model, index=0).penalty(model, inputs, model(**inputs).logits) is None
    other = tiny("llama")
    method = begun(other, index=0, from_first_task=True)
    assert method.penalty(other, inputs, moved(other)(**inputs).logits) is not None


@pytest.mark.parametrize(
    ("option", "value"), [("lwf_lambda", -0.1), ("temperature", 0.0), ("temperature", math.inf), ("temperature", -2.0)]
)
def test_values_out_of_range(option: str, value: float) -> None:
    with pytest.raises(LoricaError, match=f"{option} = .*out of range"):
        LwF.build({option: value})
