from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica.errors import LoricaError
from lorica.subspace.calibration import observe, random_tokens
from lorica.subspace.plan import PlanEntry
from lorica.subspace.sources import protected_directions
from tests.builders import batch, matrix, tiny


class Masked(nn.Module):
    """A linear layer that takes what a calibration batch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False, dtype=torch.float64)
        self.unused = nn.Linear(4, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(x)


def test_moments_and_cosines_are_those_of_the_rows_that_count() -> None:
    model = Masked()
    x = matrix(6, 4, 1, torch.float64).reshape(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batches = [{"x": x[:1], "attention_mask": mask[:1]}, {"x": x[1:], "attention_mask": mask[1:]}]
    seen = observe(model, {"layer": model.layer}, batches, moments=True)["layer"]
    rows = x[mask.bool()]
    assert seen.rows == 3
    torch.testing.assert_close(seen.moment_NN, sum(torch.outer(row, row) for row in rows))
    expected = [torch.cosine_similarity(row[:3], model.layer.weight @ row, dim=0).item() for row in rows]
    assert seen.similarity == pytest.approx(sum(expected) / 3)


def test_observing_leaves_no_trace() -> None:
    model = tiny("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layers = {"q": model.model.layers[0].self_attn.q_proj}
    observe(model, layers, [batch(model)], moments=False)
    assert model.training
    assert not layers["q"]._forward_hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_layer_without_inputs_is_named() -> None:
    model = Masked()
    batches = [{"x": torch.ones(1, 2, 4, dtype=torch.float64), "attention_mask": torch.ones(1, 2)}]
    with pytest.raises(LoricaError, match="never reached unused"):
        observe(model, {"unused": model.unused}, batches, moments=False)
    with pytest.raises(LoricaError, match="never reached layer"):
        observe(model, {"layer": model.layer}, [], moments=False)


def test_random_tokens_are_the_same_every_time_and_in_range() -> None:
    first, second = (
        random_tokens(11, sequences=5, length=4, batch_size=2),
        random_tokens(11, sequences=5, length=4, batch_size=2),
    )
    assert [len(part["input_ids"]) for part in first] == [2, 2, 1]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, second, strict=True))
    assert max(int(part["input_ids"].max()) for part in first) < 11


def test_activation_protects_the_principal_inputs() -> None:
    moment = torch.diag(torch.tensor([1.0, 9.0, 4.0, 0.0]))
    entry = PlanEntry(name="w", shape=(3, 4), k=2, source="activation", constraint="input")
    u, v = protected_directions(matrix(3, 4), entry, moment)
    assert u.shape == (3, 0)
    torch.testing.assert_close(v @ v.T, torch.diag(torch.tensor([0.0, 1, 1, 0], dtype=torch.float64)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_old_outputs_stay_when_all_their_inputs_are_protected(name: str) -> None:
    model = tiny(name).eval()
    old = batch(model, rows=1, length=5)
    plan = lorica.plan(model, source="activation", calibration=[old], effective_rank=12)
    lorica.protect(model, plan)
    before = model(**old).logits.detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    new = batch(model, seed=1)
    for _ in range(5):
        model(**new).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(model(**new).logits, tiny(name).eval()(**new).logits, atol=1e-2)
    torch.testing.assert_close(model(**old).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_random_tokens_calibrate_any_family(name: str) -> None:
    model = tiny(name)
    plan = lorica.plan(model, source="activation", calibration="random", unfreeze_rank_ratio=0.5)
    assert {entry.constraint for entry in plan.entries} == {"input"}
    lorica.protect(model, plan)
