"""Memory mode ``lean``: the same constraint and the same training, with less on the device."""

from __future__ import annotations

import copy
import gc
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.constrain.linear import SubspaceLayer
from lorica.constrain.origin import set_aside
from lorica.constrain.protect import protected_layers
from lorica.errors import LoricaError
from lorica.subspace.derived import Derived
from tests.builders import Stack, leakage, plan_for, tiny, trainable, weights

SHAPES = [(30, 8), (8, 30), (16, 16)]
K = {30: 6, 16: 10}


def protected(memory: str, dtype: torch.dtype = torch.float32) -> Stack:
    model = Stack(SHAPES, dtype=dtype)
    return lorica.protect(model, plan_for(model, lambda m, n: K[max(m, n)]), memory=memory)


def steps(model: Stack, count: int = 20) -> Stack:
    optimizer = AdamW(trainable(model), lr=1e-2)
    for seed in range(count):
        model(model.inputs(seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def layers(model: nn.Module) -> list[SubspaceLayer]:
    return list(protected_layers(model).values())


def resident(model: nn.Module) -> int:
    """Return the bytes on the device of the weights that are there while nothing trains."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_trains_as_fast_does(dtype: torch.dtype) -> None:
    fast, lean = steps(protected("fast", dtype)), steps(protected("lean", dtype))
    for one, other in zip(layers(fast), layers(lean), strict=True):
        moved = one.delta().norm()
        assert moved > 0
        assert (one.delta() - other.delta()).norm() <= 1e-4 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_constraint_is_as_exact(dtype: torch.dtype) -> None:
    before = Stack(SHAPES, dtype=dtype)
    for layer, plain in zip(layers(steps(protected("lean", dtype))), before.layers, strict=True):
        base = plain.weight.detach().double()
        k = K[max(base.shape)]
        assert max(leakage(base, base + layer.delta().double(), k)) <= 1e-6
        assert torch.equal(layer.base, plain.weight)
        assert torch.equal(layer.weight, (base.float() + layer.delta()).to(dtype))


def test_long_sides_are_read_off_and_nothing_else_is_resident_twice() -> None:
    fast, lean = protected("fast"), protected("lean")
    tall, wide, _ = layers(lean)
    assert isinstance(tall.out_basis, Derived)
    assert isinstance(wide.in_basis, Derived)
    weight_bytes = sum(layer.weight.nbytes for layer in layers(fast))
    reflectors = 2 * 30 * 6 * 4
    read_off = 2 * 6 * (6 + 8) * 4
    assert resident(fast) - resident(lean) == weight_bytes + reflectors - read_off


def test_narrow_weights_have_narrow_bases_on_the_device_and_exact_ones_aside() -> None:
    (layer, *_) = layers(protected("lean", torch.bfloat16))
    assert {buffer.dtype for buffer in layer.buffers()} == {torch.bfloat16}
    assert layer._exact is not None
    assert {buffer.dtype for side in layer._exact for buffer in side.buffers()} == {torch.float32}
    assert {buffer.dtype for buffer in layers(protected("fast", torch.bfloat16))[0].out_basis.buffers()} == {
        torch.float32
    }


def anonymous_kib() -> int:
    gc.collect()
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_what_is_set_aside_takes_no_anonymous_memory() -> None:
    weight = torch.ones(32, 1024, 1024)
    before = anonymous_kib()
    aside = set_aside(weight, None, "w")
    grown = anonymous_kib() - before
    assert torch.equal(aside, weight)
    assert grown < 0.1 * weight.nbytes / 1024


def test_no_file_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = steps(protected("lean"), 2)
    assert list(tmp_path.iterdir()) == []
    assert all(torch.isfinite(layer.base).all() for layer in layers(model))


def test_a_folder_without_room_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    model = Stack(SHAPES)
    with pytest.raises(LoricaError, match=r"no room for it.*TMPDIR.*memory 'fast'"):
        lorica.protect(model, plan_for(model, 4), memory="lean")
    assert list(tmp_path.iterdir()) == []
    assert not protected_layers(model)


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of maps")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_from_a_file_are_mapped_from_it(kind: str, tmp_path: Path) -> None:
    tiny(kind).save_pretrained(tmp_path)
    model = type(tiny(kind)).from_pretrained(tmp_path)
    plain = weights(model)
    lorica.protect(model, lorica.plan(model), memory="lean")
    assert str(tmp_path / "model.safetensors") in mapped_files()
    assert "lorica-" not in mapped_files()
    for name, layer in protected_layers(model).items():
        stored = plain[f"{name}.weight"]
        assert torch.equal(layer.base, stored.T if layer.transposed else stored)
    assert kind != "gpt2" or all(isinstance(layer, Conv1D) for layer in protected_layers(model).values())


def test_weights_that_changed_since_are_not_taken_from_the_file(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    model = type(tiny("llama")).from_pretrained(tmp_path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 1
    changed = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    lorica.protect(model, lorica.plan(model), memory="lean")
    assert torch.equal(protected_layers(model)["model.layers.0.mlp.up_proj"].base, changed)


def test_the_last_bit_does_not_depend_on_where_w0_lies(tmp_path: Path) -> None:
    def trained(model: nn.Module) -> dict[str, Tensor]:
        lorica.protect(model, lorica.plan(model), memory="lean")
        optimizer = AdamW(trainable(model), lr=1e-2)
        ids = torch.arange(24).reshape(2, 12)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        return weights(lorica.release(model))

    tiny("llama").save_pretrained(tmp_path)
    from_file = type(tiny("llama")).from_pretrained(tmp_path)
    from_memory = copy.deepcopy(from_file)
    from_memory.name_or_path = ""
    one, other = trained(from_file), trained(from_memory)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_release_and_a_state_dict_know_nothing_of_it(tmp_path: Path) -> None:
    lean = steps(protected("lean"))
    state = copy.deepcopy(lean.state_dict())
    again = protected("fast")
    again.load_state_dict(state)
    for one, other in zip(layers(lean), layers(again), strict=True):
        torch.testing.assert_close(one.weight, other.weight)
    assert set(weights(lorica.release(lean))) == set(weights(Stack(SHAPES)))


def test_a_copy_of_a_lean_model_trains_on_its_own() -> None:
    model = steps(protected("lean"), 3)
    twin = copy.deepcopy(model)
    kept = weights(model)
    steps(twin, 3)
    assert all(torch.equal(kept[key], value) for key, value in weights(model).items())
    assert not torch.equal(layers(twin)[0].weight, layers(model)[0].weight)


def test_an_unknown_mode_is_named() -> None:
    model = Stack(SHAPES)
    with pytest.raises(LoricaError, match=r"memory 'leen' is unknown; known: fast, lean. Did you mean 'lean'\?"):
        lorica.protect(model, plan_for(model, 4), memory="leen")


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_model_without_values_gets_layers_without_values(memory: str) -> None:
    real, blank = tiny("llama"), copy.deepcopy(tiny("llama")).to("meta")
    for model in (real, blank):
        lorica.protect(model, lorica.plan(model), memory=memory)
    shapes = [{k: (v.shape, v.dtype) for k, v in (*m.named_parameters(), *m.named_buffers())} for m in (real, blank)]
    assert shapes[0] == shapes[1]
    assert all(layer.base.is_meta and layer.core.is_meta for layer in layers(blank))
    ids = torch.zeros(2, 6, dtype=torch.long, device="meta")
    blank(input_ids=ids, labels=ids).loss.backward()
    AdamW(trainable(blank)).step()
    assert all(parameter.grad.is_meta for parameter in trainable(blank))
