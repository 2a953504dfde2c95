"""PiSSA and MiLoRA start at the right singular triplets: against ``torch.linalg.svd`` and PEFT's own PiSSA."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, LoraModel
from torch import Tensor, nn
from torch.optim import AdamW

import lorica
from lorica.constrain.linear import matrix_of
from lorica.errors import LoricaError
from lorica.methods import METHODS, Method
from lorica.methods.adapters import singular_factors
from tests.builders import Stack, batch, matrix, task_of, tiny, train, trainable

R = 3
ENDS = {"pissa": slice(0, R), "milora": slice(-R, None)}
both = pytest.mark.parametrize("name", ENDS)


def begun(name: str, model: nn.Module, index: int = 0) -> Method:
    method = METHODS[name].build({"r": R})
    method.begin_task(model, task_of(model, index))
    return method


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the targeted weights as (out, in), by module name."""
    return {n: matrix_of(model.get_submodule(n)).detach().clone() for n in lorica.plan(model).names()}


def check_triplets(name: str, method: Method, before: dict[str, Tensor]) -> None:
    """Compare each adapter and frozen rest with the float64 SVD of the weight that came in."""
    assert method.adapters.layers.keys() == before.keys()
    for key, (a, b) in method.adapters.factors().items():
        u, s, vh = torch.linalg.svd(before[key].double(), full_matrices=False)
        keep = ENDS[name]
        u, part, vh = u[:, keep], s[keep], vh[keep]
        a, b, tolerance = a.detach().double(), b.detach().double(), 1e-6 * float(s[0])
        torch.testing.assert_close(b @ a, u * part @ vh, atol=tolerance, rtol=0)
        torch.testing.assert_close(a @ a.T, part.diag(), atol=tolerance, rtol=0)
        torch.testing.assert_close(b.T @ b, part.diag(), atol=tolerance, rtol=0)
        rest = matrix_of(method.adapters.layers[key].base_layer).detach().double()
        torch.testing.assert_close(rest + b @ a, before[key].double(), atol=tolerance, rtol=0)
        assert (u.T @ rest).abs().max() < tolerance, "nothing of the triplets stays in the frozen part"


@both
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_the_adapter_is_that_end_of_the_spectrum(name: str, kind: str) -> None:
    model = tiny(kind)
    before = weights(model)
    check_triplets(name, begun(name, model), before)


@both
def test_each_task_splits_the_weights_anew(name: str) -> None:
    model = tiny("llama")
    method = begun(name, model)
    train(model, AdamW(trainable(model), lr=1e-2), 5, lambda step: batch(model, step))
    method.end_task(model, task_of(model))
    assert method.state_dict() == {}
    after = weights(model)
    first = weights(tiny("llama"))
    assert all((after[key] - first[key]).norm() > 0.05 * first[key].norm() for key in first)
    check_triplets(name, begun(name, model, 1), after)


def test_pissa_is_peft_s_in_float32() -> None:
    model, reference = tiny("gpt2"), tiny("gpt2")
    method = begun("pissa", model)
    names = [key.rpartition(".")[2] for key in method.adapters.layers]
    config = LoraConfig(r=R, lora_alpha=R, target_modules=names, init_lora_weights="pissa", fan_in_fan_out=True)
    LoraModel(reference, config, "default")
    for key, layer in method.adapters.layers.items():
        theirs = reference.get_submodule(key)
        (a, b), (pa, pb) = ((x.lora_A["default"].weight, x.lora_B["default"].weight) for x in (layer, theirs))
        signs = (a * pa).sum(1).sign()
        torch.testing.assert_close(a, signs[:, None] * pa, atol=1e-5, rtol=0)
        torch.testing.assert_close(b, signs * pb, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.base_layer.weight, theirs.base_layer.weight, atol=5e-6, rtol=0)


@both
def test_in_bfloat16_the_start_differs_by_the_rounding_of_the_frozen_part_only(name: str) -> None:
    model = tiny("llama", torch.bfloat16)
    before = weights(model)
    for key, (a, b) in begun(name, model).adapters.factors().items():
        rest = model.get_submodule(key).base_layer.weight.double()
        error = (rest + b.double() @ a.double() - before[key].double()).abs()
        assert bool((error <= torch.finfo(torch.bfloat16).eps / 2 * rest.abs() * 1.01 + 1e-7).all())


@both
def test_nothing_but_the_factors_trains(name: str) -> None:
    model = tiny("llama")
    method = begun(name, model)
    factors = {id(p) for pair in method.adapters.factors().values() for p in pair}
    assert {id(p) for p in trainable(model)} == factors
    # q 32 -> 32, k and v 32 -> 16, o 32 -> 32, gate and up 32 -> 48, down 48 -> 32, in each of two blocks
    assert sum(p.numel() for p in trainable(model)) == 2 * R * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    frozen = {key: layer.base_layer.weight.clone() for key, layer in method.adapters.layers.items()}
    train(model, AdamW(trainable(model), lr=1e-2), 3, lambda step: batch(model, step))
    assert all(torch.equal(layer.base_layer.weight, frozen[key]) for key, layer in method.adapters.layers.items())


@both
def test_progress_counts_the_splits(name: str) -> None:
    model, told = tiny("llama"), []
    METHODS[name].build({}).begin_task(model, task_of(model), lambda *step: told.append(step))
    assert told == [(key, done, 14) for done, key in enumerate(weights(tiny("llama")), start=1)]


@both
def test_a_rank_above_the_smallest_weight_s_is_refused(name: str) -> None:
    model = Stack([(9, 9), (4, 9)])
    with pytest.raises(LoricaError, match=r"r = 5 is more than the 4 directions of layers\.1"):
        METHODS[name].build({"r": 5}).begin_task(model, task_of(model))
    assert all(isinstance(layer, nn.Linear) for layer in model.layers)
    assert all(p.requires_grad for p in model.parameters())


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.data())
def test_factors_are_the_best_approximation_and_the_least_part(m: int, n: int, seed: int, data: st.DataObject) -> None:
    weight = matrix(m, n, seed, torch.float64)
    r = data.draw(st.integers(1, min(m, n)))
    sigma = torch.linalg.svdvals(weight)
    a, b = singular_factors("top", r)("w", weight)
    assert (weight - b @ a).norm().item() == pytest.approx(sigma[r:].norm().item(), abs=1e-9)
    a, b = singular_factors("bottom", r)("w", weight)
    assert (b @ a).norm().item() == pytest.approx(sigma[-r:].norm().item(), abs=1e-9)
    assert (weight - b @ a).norm().item() == pytest.approx(sigma[:-r].norm().item(), abs=1e-9)


def test_minor_factors_of_a_rank_deficient_weight_are_zero() -> None:
    weight = matrix(8, 2) @ matrix(2, 6, seed=1)
    a, b = singular_factors("bottom", 4)("w", weight)
    assert a.shape == (4, 6)
    assert b.shape == (8, 4)
    assert (b @ a).abs().max() < 1e-6
