"""OGD: two parameters by hand, and a joint constraint over a whole model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lorica.errors import LoricaError
from lorica.methods.base import METHODS
from lorica.methods.ogd import OGD, mean_logit
from lorica.methods.task import TaskData
from tests.builders import batch, task_of, tiny, trainable
from tests.methods.learning import adamw, assert_same_weights, begun, learn, parameters_of


def ogd(**options: object) -> OGD:
    return METHODS["ogd"].build(options)  # type: ignore[return-value]


class Line(nn.Module):
    """y = w x with two weights and the squared error: the gradient of a row is along its x."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        y = self.linear(x.float()).squeeze(-1)
        return SimpleNamespace(loss=(y - labels).square().mean(), logits=y)


def line_task(index: int, *rows: tuple[list[int], int]) -> TaskData:
    def collate(some: object) -> dict[str, Tensor]:
        return {key: torch.tensor([row[key] for row in some]) for key in ("x", "labels")}  # type: ignore[attr-defined]

    data = [{"x": x, "labels": y} for x, y in rows]
    return TaskData(name="line", index=index, count=3, rows=data, collate=collate)  # type: ignore[arg-type]


def fit(method: OGD, model: Line, task: TaskData, steps: int) -> None:
    method.begin_task(model, task)
    optimizer = method.wrap_optimizer(AdamW(trainable(model), lr=0.05, weight_decay=0.0), 0.0)
    for _ in range(steps):
        (rows,) = task.batches(9)
        model(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    method.end_task(model, task)


def test_two_parameters_by_hand() -> None:
    model, method = Line(), ogd()
    fit(method, model, line_task(0, ([3, 4], 5)), 5)
    basis = method.state_dict()["linear.weight"]
    torch.testing.assert_close(basis.abs(), torch.tensor([[0.6, 0.8]]))
    assert basis[0, 0] * basis[0, 1] > 0
    before = model.linear.weight.detach().clone()
    old = model(torch.tensor([[3, 4]]), torch.tensor([5])).logits.item()
    fit(method, model, line_task(1, ([1, 0], 7)), 5)
    change = (model.linear.weight.detach() - before)[0]
    assert change.norm() > 0.1  # along the one free direction, (0.8, -0.6)
    torch.testing.assert_close(change / change.norm(), torch.tensor([0.8, -0.6]), atol=1e-5, rtol=0)
    assert model(torch.tensor([[3, 4]]), torch.tensor([5])).logits.item() == pytest.approx(old, abs=1e-5)
    # The second task's row adds what is left; now everything is stored and nothing moves.
    torch.testing.assert_close(method.state_dict()["linear.weight"][1].abs(), torch.tensor([0.8, 0.6]))
    before = model.linear.weight.detach().clone()
    fit(method, model, line_task(2, ([1, 1], -9)), 5)
    torch.testing.assert_close(model.linear.weight, before, atol=1e-6, rtol=0)
    assert len(method.basis) == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("gradient_of", ["loss", "logit"])
def test_stored_gradients_are_orthogonal_to_the_change_of_all_weights(family: str, gradient_of: str) -> None:
    model, method = tiny(family), ogd(gradients_per_task=3, gradient_of=gradient_of)
    learn(method, model, steps=2)
    # The old rows' gradients, anew, at the weights that the task left.
    vectors = []
    for row in task_of(model).batches(3, batch_size=1):
        output = model(**row)
        value = output.loss if gradient_of == "loss" else mean_logit(model, output.logits, row["labels"])
        names = list(method.state_dict())
        parts = torch.autograd.grad(value, [model.get_parameter(name) for name in names])
        vectors.append(torch.cat([part.flatten() for part in parts]).double())
    before = parameters_of(model)
    learn(method, model, 1)
    change = torch.cat([(model.get_parameter(name).detach() - before[name]).flatten() for name in names]).double()
    assert change.norm() > 0.1
    for vector in vectors:
        assert abs(float(vector @ change)) < 1e-5 * float(vector.norm() * change.norm())
    assert len(method.basis) == 6
    assert {part.shape[0] for part in method.state_dict().values()} == {6}


def test_the_mean_logit_of_a_causal_row_is_of_the_next_tokens_that_count() -> None:
    model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False))
    logits = torch.arange(12.0).view(1, 4, 3)
    labels = torch.tensor([[-100, 2, -100, 1]])
    assert mean_logit(model, logits, labels).item() == (2 + 7) / 2
    model.config.is_encoder_decoder = True
    assert mean_logit(model, logits, labels).item() == (5 + 10) / 2


def test_train_also_is_constrained_too() -> None:
    model, method = tiny("llama"), ogd(gradients_per_task=1, train_also=["norm"])
    learn(method, model, steps=1)
    assert "model.norm.weight" in method.state_dict()


@pytest.mark.parametrize("options", [{}, {"gradients_per_task": 0}])
def test_nothing_stored_is_seqft_bitwise(options: dict[str, int]) -> None:
    ours, plain = tiny("llama"), tiny("llama")
    method, seqft = ogd(**options), METHODS["seqft"].build({})
    for index in range(2 if options else 1):
        learn(method, ours, index)
        learn(seqft, plain, index)
    assert_same_weights(ours, plain)


def test_it_clips_what_it_keeps() -> None:
    model, method = tiny("llama"), ogd(gradients_per_task=2)
    learn(method, model, steps=1)
    optimizer = begun(method, model, task_of(model, 1), adamw(), max_grad_norm=1e-2)
    assert method.clips
    model(**batch(model, 5)).loss.backward()
    optimizer.step()
    norm = torch.stack([parameter.grad.norm() for parameter in trainable(model)]).norm()
    assert norm.item() == pytest.approx(1e-2, rel=1e-3)
    kept = sum(float((method.basis.parts[n] @ model.get_parameter(n).grad.flatten())[0]) for n in method.basis.parts)
    assert abs(kept) < 1e-7


def test_too_many_gradients_are_refused_with_the_number() -> None:
    model = tiny("llama")
    numbers = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    needed = 4 * 2 * 5 * numbers
    method = ogd(gradients_per_task=5, max_bytes=needed - 1)
    with pytest.raises(LoricaError, match=rf"ogd would store 10 vectors of {numbers:,} numbers, .* raise max_bytes"):
        method.begin_task(model, task_of(model))
    assert all(parameter.requires_grad for parameter in model.parameters())
    learn(ogd(gradients_per_task=5, max_bytes=needed), model, steps=0)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"gradients_per_task": -1}, "gradients_per_task = -1 is out of range"), ({"gradient_of": "x"}, "gradient_of")],
)
def test_options_out_of_range(given: dict[str, object], said: str) -> None:
    with pytest.raises(LoricaError, match=said):
        ogd(**given)
