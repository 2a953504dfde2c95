"""Elastic weight consolidation: the Fisher information and the springs, by hand and against plain autograd."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from lorica.errors import LoricaError
from lorica.methods.ewc import EWC
from lorica.methods.task import TaskData
from tests.builders import batch, task_of, tiny, trainable

IGNORED = -100


class Coin(nn.Module):
    """Two classes with the logits w x, two weights and one input: a model whose Fisher information is known."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=False)
        self.device = torch.device("cpu")
        self.layer = nn.Linear(1, 2, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return SimpleNamespace(logits=self.layer(x))


def coin_task(index: int, xs: Iterable[float], label: int = 0) -> TaskData:
    def collate(rows: Any) -> dict[str, Tensor]:
        labels = torch.tensor([row["labels"] for row in rows])
        return {"x": torch.tensor([[row["x"]] for row in rows]), "labels": labels}

    rows: Any = [{"x": x, "labels": label} for x in xs]
    return TaskData(name=str(index), index=index, count=3, rows=rows, collate=collate)


def with_prompts(task: TaskData) -> TaskData:
    """Return a task whose rows are not trained on their first tokens, each on another number of them."""
    rows: Any = [task.rows[i] for i in range(len(task.rows))]  # type: ignore[arg-type]
    for i, row in enumerate(rows):
        row["labels"] = [IGNORED] * (i % 4) + row["labels"][i % 4 :]
    return TaskData(task.name, task.index, task.count, rows, task.collate)


def learn(method: EWC, model: nn.Module, task: TaskData, steps: int = 3, lr: float = 5e-3) -> None:
    """Learn a task in a plain loop."""
    method.begin_task(model, task)
    optimizer = AdamW(trainable(model), lr=lr)
    for step in range(steps):
        inputs = batch(model, seed=100 * task.index + step)
        outputs = model(**inputs)
        penalty = method.penalty(model, inputs, outputs.logits)
        loss = outputs.loss if penalty is None else outputs.loss + penalty
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    method.end_task(model, task)


def test_two_weights_by_hand() -> None:
    """At w = 0 both classes have p = 1/2, so (d log p / d w)^2 = x^2 / 4, and F = mean(x^2) / 4 = 1.25."""
    model, method = Coin(), EWC.build({"ewc_lambda": 2.0})
    method.begin_task(model, coin_task(0, [1.0, 3.0]))
    assert method.penalty(model, {}, torch.zeros(1)) is None, "nothing was learned before the first task"
    method.end_task(model, coin_task(0, [1.0, 3.0]))
    fisher = method.state_dict()["fisher.layer.weight"]
    torch.testing.assert_close(fisher, torch.tensor([[1.25], [1.25]]))

    method.begin_task(model, coin_task(1, [1.0]))
    assert method.penalty(model, {}, torch.zeros(1)) == 0
    with torch.no_grad():
        model.layer.weight.copy_(torch.tensor([[0.2], [-0.4]]))
    penalty = method.penalty(model, {}, torch.zeros(1))
    assert penalty is not None
    torch.testing.assert_close(penalty.detach(), torch.tensor(1.25 * (0.04 + 0.16)))  # lambda / 2 = 1

    # A new loss a/2 |w - b|^2 pulls away from 0: the balance is at a b / (a + lambda F).
    a, b = 3.0, torch.tensor([[1.0], [-2.0]])
    optimizer = SGD(trainable(model), lr=0.1)
    for _ in range(200):
        pull = method.penalty(model, {}, torch.zeros(1))
        assert pull is not None
        loss = a / 2 * (model.layer.weight - b).square().sum() + pull
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(model.layer.weight.detach(), a * b / (a + 2.0 * 1.25))


def test_rows_do_not_cancel() -> None:
    """Two rows of opposite labels have opposite gradients: their batch has none, but the Fisher information does."""
    one, other = coin_task(0, [2.0]), coin_task(0, [2.0], label=1)
    both = TaskData("both", 0, 1, [one.rows[0], other.rows[0]], one.collate)  # type: ignore[arg-type]
    method, model = EWC.build({}), Coin()
    method.begin_task(model, both)
    method.end_task(model, both)
    torch.testing.assert_close(method.state_dict()["fisher.layer.weight"], torch.ones(2, 1))


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_fisher_accumulates_and_the_anchor_moves(gamma: float) -> None:
    model, method = Coin(), EWC.build({"gamma": gamma, "ewc_lambda": 1.0})
    method.begin_task(model, coin_task(0, [2.0]))
    method.end_task(model, coin_task(0, [2.0]))  # F = 1
    method.begin_task(model, coin_task(1, [4.0]))
    with torch.no_grad():
        model.layer.weight.copy_(torch.tensor([[0.3], [0.3]]))  # equal logits: p is 1/2 still
    method.end_task(model, coin_task(1, [4.0]))  # F_t = 4
    expected = gamma * 1.0 + 4.0
    torch.testing.assert_close(method.state_dict()["fisher.layer.weight"], torch.full((2, 1), expected))

    method.begin_task(model, coin_task(2, [1.0]))
    assert method.penalty(model, {}, torch.zeros(1)) == 0, "the springs rest at the end of the last task"
    with torch.no_grad():
        model.layer.weight += 1.0
    penalty = method.penalty(model, {}, torch.zeros(1))
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.5 * expected * 2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_fisher_is_the_mean_of_the_squared_gradients_of_the_rows(name: str) -> None:
    model = tiny(name)
    task = with_prompts(task_of(model, rows=7))
    method = EWC.build({"fisher_rows": 5})
    method.begin_task(model, task)
    assert model.training
    method.end_task(model, task)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())

    expected: dict[str, Tensor] = {}
    for index in task.sample(5):
        inputs = {key: torch.tensor([value]) for key, value in task.rows[index].items()}
        counted = inputs["labels"] if name == "t5" else inputs["labels"][:, 1:]
        model.zero_grad()
        (model(**inputs).loss * (counted != IGNORED).sum()).backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None
            expected[key] = expected.get(key, torch.tensor(0.0)) + parameter.grad.square() / 5
    found = {key.removeprefix("fisher."): value for key, value in method.state_dict().items()}
    assert set(found) < set(expected), "only what trains has one"
    for key, fisher in found.items():
        assert fisher.max() > 0
        torch.testing.assert_close(fisher, expected[key], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_narrow_weights_have_springs_under_their_plain_names(name: str) -> None:
    """In bfloat16 a core trains instead of the weight; the Fisher information is in the weight's own layout."""
    narrow, wide = tiny(name, torch.bfloat16), tiny(name, torch.bfloat16).float()
    states = []
    for model in (narrow, wide):
        method = EWC.build({})
        method.begin_task(model, task_of(model))
        method.end_task(model, task_of(model))
        states.append(method.state_dict())
    assert list(states[0]) == list(states[1])
    for key, fisher in states[0].items():
        assert fisher.dtype == torch.float32
        assert fisher.is_contiguous(), "safetensors takes no views"
        pair = torch.stack([fisher.flatten(), states[1][key].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.98

    key = next(key for key, fisher in states[0].items() if fisher.shape[0] != fisher.shape[1])
    method = EWC.build({"ewc_lambda": 2.0})
    method.load_state_dict({key: states[0][key]})
    method.begin_task(narrow, task_of(narrow, index=1))
    (core,) = [p for n, p in narrow.named_parameters() if n == key[len("fisher.") : -len("weight")] + "core"]
    with torch.no_grad():
        core.copy_(torch.arange(core.numel()).reshape(core.shape) / core.numel())
    penalty = method.penalty(narrow, {}, torch.zeros(1))
    assert penalty is not None
    drift = core.detach().T if name == "gpt2" else core.detach()  # GPT-2 stores its weights (in, out)
    assert penalty.item() == pytest.approx((states[0][key] * drift**2).sum().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_the_springs(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    method = EWC.build({"ewc_lambda": 10.0, "train_also": ["norm"]})
    learn(method, model, task_of(model))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    method.begin_task(model, task_of(model, index=1))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("norm" in name for name in trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.01
    penalty = method.penalty(model, {}, torch.zeros(1))
    assert penalty is not None
    gradients = torch.autograd.grad(penalty, list(trained.values()))
    for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
        plain = name.removesuffix("core") + "weight" if name.endswith(".core") else name
        fisher = method.state_dict()[f"fisher.{plain}"]
        drift = parameter.detach().float() - (0.0 if name.endswith(".core") else start[plain].float())
        torch.testing.assert_close(gradient, (10.0 * fisher * drift).to(gradient.dtype))


def test_stiff_springs_hold_what_mattered() -> None:
    moved = {}
    for stiffness in (0.0, 1e4):
        model = tiny("llama")
        method = EWC.build({"ewc_lambda": stiffness})
        learn(method, model, task_of(model))
        fisher = {key.removeprefix("fisher."): value for key, value in method.state_dict().items()}
        start = {name: model.get_parameter(name).detach().clone() for name in fisher}
        learn(method, model, task_of(model, index=1), steps=10)
        drifts = {name: (model.get_parameter(name).detach() - start[name]).square() for name in fisher}
        moved[stiffness] = sum((fisher[name] * drift).sum().item() for name, drift in drifts.items())
    assert 0 < moved[1e4] < 0.2 * moved[0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stream_goes_on_bit_for_bit_from_its_state(dtype: torch.dtype, tmp_path: Path) -> None:
    model, method = tiny("llama", dtype), EWC.build({"gamma": 0.9})
    learn(method, model, task_of(model))
    save_file(method.state_dict(), tmp_path / "method.safetensors")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    learn(method, model, task_of(model, index=1))

    again = tiny("llama", dtype)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    other = EWC.build({"gamma": 0.9})
    other.load_state_dict(load_file(tmp_path / "method.safetensors"))
    torch.manual_seed(99)
    learn(other, again, task_of(again, index=1))
    for pair in (model, again), (method, other):
        one, two = (thing.state_dict() for thing in pair)
        assert set(one) == set(two)
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_memory_does_not_grow() -> None:
    model, method = Coin(), EWC.build({})
    sizes = []
    for index in range(3):
        method.begin_task(model, coin_task(index, [1.0]))
        method.end_task(model, coin_task(index, [1.0]))
        sizes.append(sum(tensor.numel() for tensor in method.state_dict().values()))
    assert sizes == [2, 2, 2]


def test_the_state_of_another_model_is_refused() -> None:
    method = EWC.build({})
    method.load_state_dict({"fisher.layer.weight": torch.zeros(2, 7)})
    with pytest.raises(LoricaError, match=r"layer.weight as \(2, 7\), the model as \(2, 1\)"):
        method.begin_task(Coin(), coin_task(1, [1.0]))


@pytest.mark.parametrize(
    ("option", "value"),
    [("ewc_lambda", -1.0), ("ewc_lambda", math.nan), ("ewc_lambda", math.inf), ("gamma", 1.1), ("fisher_rows", 0)],
)
def test_values_out_of_range(option: str, value: float) -> None:
    with pytest.raises(LoricaError, match=f"{option} = .*out of range"):
        EWC.build({option: value})


def test_neither_dropout_nor_the_random_state_has_a_say() -> None:
    states = []
    for seed in (1, 2):
        model = tiny("t5")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        torch.manual_seed(seed)
        method = EWC.build({"fisher_rows": 3})
        method.begin_task(model, task_of(model))
        method.end_task(model, task_of(model))
        states.append(method.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
