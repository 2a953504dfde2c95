"""The factored method against its slow transcription, and how far each form of it leaks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import lorica
from lorica.constrain.factored import FactoredLinear
from lorica.errors import LoricaError
from lorica.methods.base import METHODS
from lorica.methods.osft_factored import OSFTFactored
from tests.builders import Stack, batch, leakage, task_of, tiny, train, trainable
from tests.methods.learning import adamw, begun, learn, parameters_of
from tests.reference.factored import FactoredLinear as Reference

SIZES = [(6, 20), (20, 6), (16, 16), (17, 13)]


def factored(**options: object) -> OSFTFactored:
    return METHODS["osft-factored"].build(options)  # type: ignore[return-value]


@pytest.mark.parametrize("retract", [False, True])
@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_it_is_the_literal_form_step_by_step(ratio: float, retract: bool) -> None:
    model = Stack(SIZES, dtype=torch.float64)
    method = factored(unfreeze_rank_ratio=ratio, retract=retract)
    method.begin_task(model, None)
    assert method.plan is not None
    counts = [entry.k for entry in method.plan.entries]
    plain = Stack(SIZES, dtype=torch.float64)
    slow = [Reference(layer.weight, k, layer.bias.detach()) for layer, k in zip(plain.layers, counts, strict=True)]
    optimizer = method.wrap_optimizer(SGD(trainable(model), lr=0.05, momentum=0.9), 0.0)
    by_hand = SGD([p for layer in slow for p in layer.parameters()], lr=0.05, momentum=0.9)
    for step in range(5):
        model(model_inputs(step)).backward()
        torch.stack(
            [layer(x).square().mean() for layer, x in zip(slow, model_inputs(step), strict=True)]
        ).sum().backward()
        for one in (optimizer, by_hand):
            one.step()
            one.zero_grad()
    for layer, reference in zip(model.layers, slow, strict=True):
        assert isinstance(layer, FactoredLinear)
        torch.testing.assert_close(layer.weight, reference.weight, atol=1e-7, rtol=1e-6)  # Stack's loss is float32


def model_inputs(seed: int) -> list[torch.Tensor]:
    return Stack(SIZES, dtype=torch.float64).inputs(seed)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "t5-gated"])
def test_adamw_stays_only_with_retraction_and_the_audit_tells(family: str) -> None:
    for retract in (True, False):
        model, method = tiny(family), factored(unfreeze_rank_ratio=0.5, retract=retract)
        before, task = parameters_of(model), task_of(model)
        optimizer = begun(method, model, task, adamw())
        train(model, optimizer, 4, lambda step, model=model: batch(model, step))
        report = method.audit(model)
        assert {row.verdict for row in report.rows} == {"holds" if retract else "LEAKS"}
        method.end_task(model, task)
        for row in report.rows:
            old, new = before[f"{row.name}.weight"], model.get_parameter(f"{row.name}.weight")
            if family == "gpt2":
                old, new = old.T, new.T
            leaks = leakage(old, new, row.k)
            assert leaks == pytest.approx((row.leak_u, row.leak_v), rel=0.05, abs=1e-6)
            assert max(leaks) < 1e-5 if retract else max(leaks) > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "t5-gated"])
def test_the_model_computes_what_it_did_and_is_what_it_was(family: str) -> None:
    model, method = tiny(family), factored()
    rows, before = batch(model), parameters_of(model)
    logits = model(**rows).logits.detach()
    method.begin_task(model, task_of(model))
    assert any(isinstance(module, FactoredLinear) for module in model.modules())
    torch.testing.assert_close(model(**rows).logits, logits, atol=1e-5, rtol=1e-5)
    opened = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert opened == {"u_low", "s_low", "v_low"}
    method.end_task(model, task_of(model))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], atol=1e-7, rtol=1e-6)


def test_with_everything_protected_nothing_moves() -> None:
    model = tiny("llama")
    before = parameters_of(model)
    learn(factored(unfreeze_rank_ratio=0.0), model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], atol=1e-7, rtol=1e-6)


def test_biases_and_norms_train_if_asked() -> None:
    model = tiny("gpt2")
    before = parameters_of(model)
    learn(factored(train_also=[r"c_fc\.bias", "ln_f"]), model)
    moved = {
        name for name, p in model.named_parameters() if not name.endswith("weight") and not torch.equal(p, before[name])
    }
    assert moved == {f"transformer.h.{i}.mlp.c_fc.bias" for i in range(2)} | {"transformer.ln_f.bias"}


def test_ranks_are_those_of_a_plan() -> None:
    model = tiny("llama")
    method = factored(effective_rank=0.5, rank_pattern={"up_proj": 3}, target_modules=["up_proj", "q_proj"])
    method.begin_task(model, task_of(model))
    expected = lorica.plan(tiny("llama"), 0.5, rank_pattern={"up_proj": 3}, target_modules=["up_proj", "q_proj"])
    assert [(entry.name, entry.k) for entry in method.plan.entries] == [(e.name, e.k) for e in expected.entries]
    layer = model.model.layers[0].mlp.up_proj
    assert "protected=3" in repr(layer)
    assert layer.u_low.shape == (48, 29)


def test_it_stores_nothing_and_a_plain_linear_comes_back_in_its_mode() -> None:
    model, method = tiny("llama"), factored()
    for index in range(2):
        learn(method, model, index)
    assert method.state_dict() == {}
    model.eval()
    method.begin_task(model, task_of(model))
    assert not any(module.training for module in model.modules())
    method.end_task(model, task_of(model))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_it_clips_after_the_projection() -> None:
    model, method = tiny("llama"), factored()
    optimizer = begun(method, model, task_of(model), lambda weights: AdamW(weights, lr=1e-3), max_grad_norm=1e-2)
    assert method.clips
    model(**batch(model)).loss.backward()
    optimizer.step()
    norm = torch.stack([p.grad.norm() for p in trainable(model)]).norm().item()
    assert norm == pytest.approx(1e-2, rel=1e-3)


def test_mistakes() -> None:
    with pytest.raises(LoricaError, match=r"unfreeze_rank_ratio = 2\.0 is out of range"):
        factored(unfreeze_rank_ratio=2.0).begin_task(tiny("llama"), task_of(tiny("llama")))
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(LoricaError, match=r"model\.layers\.1\.mlp\.up_proj: the 48 x 32 weight holds NaN"):
        factored().begin_task(model, task_of(model))
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(LoricaError, match="unknown option 'source'"):
        factored(source="weight")
