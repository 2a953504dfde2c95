"""What the methods do to a model before and after training, and what they prove."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import lorica
from lorica.constrain.audit_weight import audit_weight
from lorica.constrain.protect import protected_layers
from lorica.errors import LoricaError
from lorica.methods import METHODS, Method, Protection
from lorica.subspace.free_basis import free_basis
from tests.builders import batch, matrix, task_of, tiny, train, trainable


def learnt(name: str, model: nn.Module, lr: float = 5e-3, **protection: object) -> Method:
    """Return a method that has begun a task and trained it."""
    method = METHODS[name].build(protection)
    method.begin_task(model, task_of(model))
    optimizer = method.wrap_optimizer(AdamW(trainable(model), lr=lr), max_grad_norm=0.0)
    train(model, optimizer, 3, partial(batch, model))
    return method


def test_an_emptied_plan_does_not_train_the_default_one() -> None:
    model = tiny("llama")
    plan = lorica.plan(model)
    plan.entries.clear()
    with pytest.raises(LoricaError, match="the plan has no entries"):
        METHODS["osft"](Protection(plan=plan)).begin_task(model, task_of(model))
    assert not protected_layers(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lr", [1e-5, 5e-3])
def test_osft_proves_the_master_too(dtype: torch.dtype, lr: float) -> None:
    model = tiny("llama", dtype)
    report = learnt("osft", model, lr, unfreeze_rank_ratio=0.5).audit(model)
    assert report is not None
    for row in report.rows:
        assert row.master_leak_u is not None
        assert row.master_leak_v is not None
        assert 0 < row.master_worst <= 1e-5
        assert row.holds
    if dtype == torch.float32:
        assert {row.verdict for row in report.rows} == {"holds"}
    assert "before rounding" in report.verdict()
    assert all(record["master_leak_u"] <= 1e-5 for record in report.to_records())


def test_osft_is_caught_when_the_master_leaks_below_what_rounding_hides() -> None:
    model = tiny("llama", torch.bfloat16)
    method = learnt("osft", model, 1e-6, unfreeze_rank_ratio=0.5)
    name = "model.layers.0.mlp.up_proj"
    layer = protected_layers(model)[name]
    other = torch.linalg.qr(matrix(layer.in_basis.dim, 16, 7, torch.float64)).Q
    layer.in_basis = free_basis(other, torch.float32)  # as if the split had gone wrong
    layer.fold()
    assert method.plan is not None
    (entry,) = (entry for entry in method.plan.entries if entry.name == name)
    assert audit_weight(layer.base, layer.matrix, entry).holds, "the stored weight cannot tell"
    report = method.audit(model)
    assert report is not None
    assert [row.name for row in report.rows if row.verdict == "LEAKS"] == [name]


def test_osft_audits_block_by_the_weights_themselves() -> None:
    model = tiny("llama")
    method = learnt("osft", model, unfreeze_rank_ratio=0.5, constraint="block", rank_pattern={"up_proj": 0})
    report = method.audit(model)
    assert report is not None
    assert report.holds
    assert {row.master_worst for row in report.rows} == {None}
    assert [row.name for row in report.rows if row.verdict == "nothing is protected"] == [
        f"model.layers.{i}.mlp.up_proj" for i in range(2)
    ]
    assert sum(row.verdict == "holds" for row in report.rows) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_osft_that_protects_nothing_says_so(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    report = learnt("osft", model, unfreeze_rank_ratio=1.0).audit(model)
    assert report is not None
    assert report.holds
    assert report.verdict().startswith("nothing is protected")
    assert "worst leakage" not in report.verdict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_seqft_trains_what_osft_trains_in_float32(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    method = learnt("seqft", model)
    assert {parameter.dtype for parameter in trainable(model)} == {torch.float32}
    assert method.audit(model) is None
    method.end_task(model, task_of(model))
    planned = {f"{name}.weight" for name in lorica.plan(model).names()}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, before[name]) == (name not in planned)


def test_the_audit_hands_on_the_spectrum_that_it_split() -> None:
    model = tiny("llama")
    before = {
        name: module.weight.detach().clone() for name, module in model.named_modules() if hasattr(module, "weight")
    }
    report = learnt("osft", model, unfreeze_rank_ratio=0.5).audit(model)
    assert report is not None
    for row in report.rows:
        assert row.spectrum is not None
        sigma = torch.linalg.svdvals(before[row.name].double())
        shown = torch.tensor([sigma[index] for index in row.spectrum["index"]])
        torch.testing.assert_close(torch.tensor(row.spectrum["sigma"], dtype=torch.float64), shown, rtol=1e-5, atol=0)
    other = learnt("osft", tiny("llama"), source="activation", calibration="random").audit(model)
    assert other is not None
    assert {row.spectrum is None for row in other.rows} == {True}, "nothing was split"
