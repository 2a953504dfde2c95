"""SGP: importances by hand, their sum over tasks, and its limit GPM."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD

from lorica.constrain.optimizer import ConstrainedOptimizer
from lorica.errors import LoricaError
from lorica.methods.base import METHODS
from lorica.methods.sgp import SGP, importances
from tests.builders import batch, task_of, tiny
from tests.methods.learning import adamw, assert_same_weights, begun, learn, parameters_of

WIDE = torch.float64


def sgp(**options: object) -> SGP:
    return METHODS["sgp"].build(options)  # type: ignore[return-value]


def test_importances_by_hand() -> None:
    sigma = torch.tensor([4.0, 2.0, 1.0, 0.0])
    torch.testing.assert_close(importances(sigma, 10.0), torch.tensor([1.0, 22 / 24, 11 / 14, 0.0]))
    torch.testing.assert_close(importances(sigma, 0.0), torch.tensor([1.0, 0.5, 0.25, 0.0]))
    assert importances(torch.zeros(2), 10.0).tolist() == [0.0, 0.0]
    assert importances(torch.zeros(0), 10.0).tolist() == []


def test_two_tasks_by_hand() -> None:
    method = sgp(scale=1.0)
    method.extend("w", torch.diag(torch.tensor([16.0, 1.0, 0.0], dtype=WIDE)), 1.0)
    torch.testing.assert_close(method.bases["w"].abs(), torch.eye(3)[:, :2])
    # s = 4, 1: (1 + 1) 4 / (4 + 4) = 1 and (1 + 1) 1 / (1 + 4) = 0.4
    torch.testing.assert_close(method.importance["w"], torch.tensor([1.0, 0.4]))
    # Along the old ones 0 and 1, outside 9: s = 0, 1, 3, of which the importances are 0, 2/4 and 1.
    method.extend("w", torch.diag(torch.tensor([0.0, 1.0, 9.0], dtype=WIDE)), 0.95)
    torch.testing.assert_close(method.importance["w"], torch.tensor([1.0, 0.9, 1.0]))
    # The basis holds everything; 2 = max: importances 1, 2/3, 2/3 are added, to 1 at most.
    method.extend("w", torch.diag(torch.tensor([4.0, 1.0, 1.0], dtype=WIDE)), 0.95)
    torch.testing.assert_close(method.importance["w"], torch.tensor([1.0, 1.0, 1.0]))
    assert method.bases["w"].shape == (3, 3)


def test_a_layer_that_saw_only_zeros_keeps_its_importances() -> None:
    method = sgp()
    method.extend("w", torch.eye(3, dtype=WIDE), 0.97)
    method.extend("w", torch.zeros(3, 3, dtype=WIDE), 0.97)
    assert method.importance["w"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_of_sgd_is_the_scaled_gradient(family: str) -> None:
    model, method = tiny(family), sgp(rows=3, scale=2.0)
    learn(method, model)
    optimizer = begun(method, model, task_of(model, 1), lambda weights: SGD(weights, lr=0.1))
    before = parameters_of(model)
    model(**batch(model, 5)).loss.backward()
    raw = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    optimizer.step()
    assert method.bases
    for name, basis in method.bases.items():
        key = f"{name}.weight"
        scaling = torch.eye(len(basis)) - basis @ torch.diag(method.importance[name]) @ basis.T
        expected = scaling @ raw[key] if family == "gpt2" else raw[key] @ scaling
        change = model.get_parameter(key).detach() - before[key]
        torch.testing.assert_close(change, -0.1 * expected, atol=1e-7, rtol=1e-3)


def test_with_a_large_scale_the_importances_are_those_of_gpm() -> None:
    ours, theirs = tiny("llama"), tiny("llama")
    soft, hard = sgp(scale=1e12, rows=3), METHODS["gpm"].build({"rows": 3})
    for method, model in ((soft, ours), (hard, theirs)):
        learn(method, model)
        learn(method, model, 1, make=lambda weights: SGD(weights, lr=0.1))
    for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4, msg=name)


def leak(scaled: str) -> float:
    """Return the largest share of a weight change along stored inputs, all of which are held fully."""
    model, method = tiny("llama"), sgp(scale=1e12, rows=2, scaled=scaled)
    learn(method, model)
    bases, before = dict(method.bases), parameters_of(model)
    learn(method, model, 1)
    shares = []
    for name, basis in bases.items():
        change = model.get_parameter(f"{name}.weight").detach() - before[f"{name}.weight"]
        shares.append(((change @ basis).norm() / change.norm()).item())
    return max(shares)


def test_under_adamw_only_the_scaled_step_holds() -> None:
    assert leak("gradient") > 1e-2
    assert leak("step") < 1e-4


def test_nothing_stored_is_seqft_bitwise() -> None:
    ours, plain = tiny("llama"), tiny("llama")
    learn(sgp(), ours)
    learn(METHODS["seqft"].build({}), plain)
    assert_same_weights(ours, plain)


def test_it_constrains_from_the_second_task_on_and_claims_no_proof() -> None:
    model, method = tiny("llama"), sgp()
    learn(method, model)
    assert isinstance(begun(method, model, task_of(model, 1), adamw()), ConstrainedOptimizer)
    assert method.clips
    assert method.audit(model) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scale": -1.0}, "scale = -1.0 is out of range"),
        ({"scaled": "weights"}, "scaled"),
        ({"energy": 0.0}, "energy = 0.0 is out of range"),
    ],
)
def test_options_out_of_range(given: dict[str, object], said: str) -> None:
    with pytest.raises(LoricaError, match=said):
        sgp(**given)
