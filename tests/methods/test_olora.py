"""O-LoRA's penalty by hand, and what it does to training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from lorica.errors import LoricaError
from lorica.methods import METHODS
from lorica.methods.olora import OLoRA
from tests.builders import Stack, batch, task_of, tiny, trainable

EARLIER = {
    "layers.0.lora_A": torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 2.0]]),  # two tasks of rank 1
    "layers.1.lora_A": torch.tensor([[1.0, 1.0], [2.0, 0.0]]),
}
NEW = {"layers.0": [[3.0, -1.0, -1.0]], "layers.1": [[-1.0, 0.5]]}
B = {"layers.0": [[3.0], [4.0]], "layers.1": [[0.0], [0.0]]}
# |A_old A_new^T|: layer 0 |3 - 2| + |1 - 2| = 2, layer 1 |-1 + 0.5| + |-2| = 2.5
OVERLAP = 4.5
# ||A||: sqrt(9 + 1 + 1), sqrt(1 + 0.25); ||B||: 5, 0
NORMS = 11**0.5 + 1.25**0.5 + 5


def by_hand(**options: object) -> OLoRA:
    """Return the method in its third task on two layers, with hand-set adapters of rank 1."""
    model = Stack([(2, 3), (2, 2)])
    method = METHODS["olora"].build({"r": 1, **options})
    assert isinstance(method, OLoRA)
    method.load_state_dict(EARLIER)
    method.begin_task(model, task_of(model, 2))
    for name, (a, b) in method.adapters.factors().items():
        a.data.copy_(torch.tensor(NEW[name]))
        b.data.copy_(torch.tensor(B[name]))
    return method


def penalty(method: OLoRA) -> Tensor:
    value = method.penalty(nn.Module(), {}, torch.empty(0))
    assert value is not None
    return value


@pytest.mark.parametrize(("lambda1", "lambda2"), [(0.5, 0.0), (0.0, 0.1), (5.0, 0.3), (0.0, 0.0)])
def test_penalty_of_two_layers_and_two_earlier_tasks(lambda1: float, lambda2: float) -> None:
    value = penalty(by_hand(lambda1=lambda1, lambda2=lambda2))
    assert value.item() == pytest.approx(lambda1 * OVERLAP + lambda2 * NORMS, rel=1e-6)


def test_the_defaults_are_those_of_the_published_code() -> None:
    options = METHODS["olora"].build({}).options
    assert (options.r, options.alpha, options.dropout) == (8, 32, 0.1)
    assert (options.lambda1, options.lambda2) == (0.5, 0)


def test_gradient_is_the_signed_sum_of_earlier_directions() -> None:
    method = by_hand(lambda1=0.5)
    penalty(method).backward()
    (a0, b0), (a1, b1) = method.adapters.factors().values()
    # layer 0: +[1, 2, 0] - [0, -1, 2]; layer 1: -[1, 1] - [2, 0]; each halved by lambda1
    assert a0.grad.tolist() == [[0.5, 1.5, -1.0]]
    assert a1.grad.tolist() == [[-1.5, -0.5]]
    assert not b0.grad.any()
    assert not b1.grad.any()


def test_gradient_of_the_norms_is_the_unit_vector_and_zero_at_zero() -> None:
    method = by_hand(lambda1=0, lambda2=2)
    penalty(method).backward()
    (a0, b0), (_, b1) = method.adapters.factors().values()
    torch.testing.assert_close(b0.grad, torch.tensor([[1.2], [1.6]]))
    torch.testing.assert_close(a0.grad, 2 * torch.tensor([[3.0, -1.0, -1.0]]) / 11**0.5)
    assert b1.grad.tolist() == [[0], [0]]


def test_penalty_is_the_literal_sum_over_tasks_rows_and_layers() -> None:
    model = tiny("llama")
    method = METHODS["olora"].build({"r": 3, "lambda1": 0.7, "lambda2": 0.2, "target_modules": ["q_proj", "v_proj"]})
    finished: list[dict[str, Tensor]] = []
    for index in range(3):
        method.begin_task(model, task_of(model, index))
        factors = method.adapters.factors()
        for seed, (a, b) in enumerate(factors.values()):
            generator = torch.Generator().manual_seed(10 * index + seed)
            a.data.copy_(torch.randn(a.shape, generator=generator))
            b.data.copy_(torch.randn(b.shape, generator=generator))
        want = sum(0.2 * (a.square().sum().sqrt() + b.square().sum().sqrt()).item() for a, b in factors.values())
        for earlier in finished:
            for name, (a, _) in factors.items():
                want += sum(0.7 * abs(torch.dot(old, new).item()) for old in earlier[name] for new in a)
        assert penalty(method).item() == pytest.approx(want, rel=1e-5)
        finished.append({name: a.detach().clone() for name, (a, _) in factors.items()})
        method.end_task(model, task_of(model, index))
    state = method.state_dict()
    assert state.keys() == {f"{name}.lora_A" for name in finished[0]}
    for name in finished[0]:
        assert torch.equal(state[f"{name}.lora_A"], torch.cat([one[name] for one in finished]))


def trained(name: str, **options: object) -> tuple[nn.Module, float]:
    """Train two tasks and return the model and how far the second adapter's inputs overlap the first's."""
    model = tiny("llama")
    method = METHODS[name].build({"r": 3, "dropout": 0, **options})
    overlap = torch.tensor(0.0)
    first: dict[str, Tensor] = {}
    for index in range(2):
        method.begin_task(model, task_of(model, index))
        optimizer = AdamW(trainable(model), lr=3e-3)
        for step in range(15):
            inputs = batch(model, seed=100 * index + step)
            outputs = model(**inputs)
            extra = method.penalty(model, inputs, outputs.logits)
            (outputs.loss if extra is None else outputs.loss + extra).backward()
            optimizer.step()
            optimizer.zero_grad()
        a = {key: pair[0].detach().clone() for key, pair in method.adapters.factors().items()}
        overlap = sum(((first[key] @ a[key].T).abs().sum() for key in first), torch.tensor(0.0))
        first = a
        method.end_task(model, task_of(model, index))
    return model, overlap.item()


def test_without_penalties_it_is_inclora_bit_for_bit() -> None:
    ours, theirs = trained("olora", lambda1=0)[0].state_dict(), trained("inclora")[0].state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_penalty_turns_the_new_adapter_away_from_the_old() -> None:
    assert trained("olora", lambda1=0.5)[1] < 0.5 * trained("olora", lambda1=0)[1]


@pytest.mark.parametrize("change", ["target_modules", "model"])
def test_earlier_adapters_of_another_model_are_refused(change: str) -> None:
    model = Stack([(2, 3), (2, 2)]) if change == "target_modules" else Stack([(2, 3), (2, 5)])
    keys, before = list(model.state_dict()), model.layers[0].weight.clone()
    method = METHODS["olora"].build({"target_modules": ["layers.0"]} if change == "target_modules" else {})
    method.load_state_dict(EARLIER)
    with pytest.raises(LoricaError, match="do not fit this model"):
        method.begin_task(model, task_of(model, 2))
    assert list(model.state_dict()) == keys
    assert torch.equal(model.layers[0].weight, before)
