"""LoRA and IncLoRA, and what all methods on PEFT's adapters do to a model: before, during and after a task."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, LoraModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import lorica
from lorica.errors import LoricaError
from lorica.methods import METHODS, Method
from tests.builders import EXPERTS, Stack, batch, task_of, tiny, train, trainable

FAMILY = ("lora", "inclora", "olora", "pissa", "milora")
UP = "model.layers.0.mlp.up_proj"


def learn(method: Method, model: nn.Module, index: int, lr: float = 5e-3, steps: int = 3) -> list[float]:
    """Take a method through one whole task with AdamW and return the losses, the penalty included."""
    task = task_of(model, index)
    method.begin_task(model, task)
    optimizer = AdamW(trainable(model), lr=lr)
    losses = []
    torch.manual_seed(index)  # of dropout
    for step in range(steps):
        inputs = batch(model, seed=100 * index + step)
        outputs = model(**inputs)
        extra = method.penalty(model, inputs, outputs.logits)
        loss = outputs.loss if extra is None else outputs.loss + extra
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    method.end_task(model, task)
    return losses


def anatomy(model: nn.Module) -> dict[str, object]:
    """Return everything about a model but the values of its weights."""
    return {
        "modules": [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "parameters": [(n, id(p), p.dtype, p.shape, p.requires_grad) for n, p in model.named_parameters()],
        "keys": list(model.state_dict()),
    }


def values(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "t5", "qwen3-moe"])
def test_the_model_is_plain_again_and_only_the_targets_moved(name: str, kind: str) -> None:
    model = tiny(kind, torch.bfloat16)
    model.get_parameter(next(n for n, _ in model.named_parameters())).requires_grad_(False)
    method = METHODS[name].build({"r": 3, "freeze_experts": kind in EXPERTS})
    before, was = values(model), anatomy(model)
    learn(method, model, 0)
    assert anatomy(model) == was
    targets = {f"{n}.weight" for n in lorica.plan(model, freeze_experts=kind in EXPERTS).names()}
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])} == targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_only_adapters_train_in_float32_or_wider(name: str, dtype: torch.dtype) -> None:
    model = tiny("gpt2", dtype)
    METHODS[name].build({"r": 3}).begin_task(model, task_of(model))
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[-3] for n in found} == {"lora_A", "lora_B"}
    assert {p.dtype for p in found.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    # c_attn 32 -> 96, c_proj 32 -> 32, c_fc 32 -> 128, c_proj 128 -> 32, in each of two blocks
    assert sum(p.numel() for p in found.values()) == 2 * 3 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))


@pytest.mark.parametrize("name", FAMILY)
def test_train_also_opens_what_it_names(name: str) -> None:
    model = tiny("llama")
    before = values(model)
    method = METHODS[name].build({"train_also": ["norm"], "target_modules": ["up_proj"]})
    learn(method, model, 0)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if "norm" in key or "up_proj" in key}
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", FAMILY)
def test_a_new_process_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = tiny("llama", torch.bfloat16)
    method = METHODS[name].build({"r": 3})
    learn(method, model, 0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    save_file(method.state_dict(), tmp_path / "method.safetensors")
    whole = [learn(method, model, index) for index in (1, 2)]

    torch.manual_seed(12345)
    again, resumed = tiny("llama", torch.bfloat16), METHODS[name].build({"r": 3})
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    resumed.load_state_dict(load_file(tmp_path / "method.safetensors"))
    assert [learn(resumed, again, index) for index in (1, 2)] == whole
    for state, other in ((model.state_dict(), again.state_dict()), (method.state_dict(), resumed.state_dict())):
        assert state.keys() == other.keys()
        assert all(torch.equal(state[key], other[key]) for key in state)


@pytest.mark.parametrize("name", FAMILY)
def test_an_adapter_that_did_not_train_changes_nothing(name: str) -> None:
    model = tiny("llama").eval()
    inputs = batch(model)
    logits, before = model(**inputs).logits, values(model)
    method = METHODS[name].build({})
    random_state = torch.get_rng_state()
    method.begin_task(model, task_of(model))
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(model(**inputs).logits, logits, atol=1e-6, rtol=1e-6)
    method.end_task(model, task_of(model))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], atol=2e-8, rtol=0)  # weights of 0.02 on average


@pytest.mark.parametrize("name", FAMILY)
def test_an_adapter_is_in_the_mode_of_its_model(name: str) -> None:
    model = tiny("llama").eval()
    METHODS[name].build({"dropout": 0.5}).begin_task(model, task_of(model))
    assert not any(module.training for module in model.modules())


def test_dropout_is_on_the_way_into_the_adapter_and_nowhere_else() -> None:
    model = Stack([(4, 200)], bias=False)
    weight, x = model.layers[0].weight.detach().clone(), torch.ones(16, 200)
    method = METHODS["lora"].build({"r": 1, "alpha": 3, "dropout": 0.25})
    method.begin_task(model, task_of(model))
    layer = model.layers[0]
    assert torch.equal(layer(x), x @ weight.T)  # B = 0: what the weight sees is not dropped
    ((a, b),) = method.adapters.factors().values()
    a.data.fill_(1.0)
    b.data.fill_(1.0)
    kept = (layer(x) - x @ weight.T) / 3 * 0.75  # the number of inputs that were kept
    torch.testing.assert_close(kept, kept.round(), atol=1e-2, rtol=0)
    assert 140 < kept.mean() < 160
    assert kept[:, 0].unique().numel() > 4
    torch.testing.assert_close(layer.eval()(x), x @ weight.T + 3 * 200, atol=1e-3, rtol=0)


def test_what_a_merge_adds_is_rounded_once() -> None:
    model = tiny("llama", torch.bfloat16)
    weight = model.get_parameter(f"{UP}.weight").detach().clone()
    method = METHODS["lora"].build({"r": 3, "alpha": 6})
    learn(method, model, 0)
    state = method.state_dict()
    want = weight.double() + 2 * state[f"{UP}.lora_B"].double() @ state[f"{UP}.lora_A"].double()
    half_a_unit = torch.finfo(torch.bfloat16).eps / 2
    error = (model.get_parameter(f"{UP}.weight").double() - want).abs()
    assert bool((error <= half_a_unit * want.abs() * (1 + 1e-4)).all())


def sequential_in_peft(model: nn.Module, tasks: int, optimizer: type, lr: float) -> nn.Module:
    """Train one LoRA of PEFT through several tasks, never merged until the end."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(model, config)
    for index in range(tasks):
        fresh = optimizer([p for p in adapted.parameters() if p.requires_grad], lr=lr)
        train(adapted, fresh, 4, lambda step, index=index: batch(model, seed=100 * index + step))
    return adapted.merge_and_unload()


@pytest.mark.parametrize(
    ("dtype", "optimizer", "lr", "atol"),
    [
        (torch.float32, SGD, 1.0, 1e-6),
        (torch.float32, AdamW, 1e-3, 1e-6),
        (torch.float64, SGD, 1.0, 1e-14),
        (torch.float64, AdamW, 1e-3, 1e-14),
    ],
)
def test_sequential_lora_is_one_lora_trained_through(
    dtype: torch.dtype, optimizer: type, lr: float, atol: float
) -> None:
    model, start = tiny("llama", dtype), tiny("llama", dtype)
    reference = sequential_in_peft(tiny("llama", dtype), 3, optimizer, lr)
    method = METHODS["lora"].build({"r": 3, "alpha": 6, "dropout": 0, "target_modules": ["q_proj", "v_proj"]})
    for index in range(3):
        method.begin_task(model, task_of(model, index))
        train(model, optimizer(trainable(model), lr=lr), 4, lambda s, index=index: batch(model, seed=100 * index + s))
        method.end_task(model, task_of(model, index))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[key], atol=atol, rtol=0)
    key = "model.layers.0.self_attn.v_proj.weight"
    assert (model.get_parameter(key) - start.get_parameter(key)).abs().max() > 1e-3


def test_sequential_lora_in_bfloat16_stays_within_the_rounding_of_its_tasks() -> None:
    model = tiny("llama", torch.bfloat16)
    weight = model.get_parameter(f"{UP}.weight").detach().double()
    method = METHODS["lora"].build({"dropout": 0})
    for index in range(6):
        learn(method, model, index, lr=3e-4)
    state = method.state_dict()
    delta = 4 * state[f"{UP}.lora_B"].double() @ state[f"{UP}.lora_A"].double()
    once = ((weight + delta).to(torch.bfloat16).double() - weight - delta).norm()
    assert (model.get_parameter(f"{UP}.weight").double() - weight - delta).norm() < 6**0.5 * once
    assert once < 0.1 * delta.norm()


def test_taking_out_what_was_merged_gives_the_old_weight_back() -> None:
    model = tiny("llama", torch.bfloat16)
    weight = model.get_parameter(f"{UP}.weight").detach().clone()
    method = METHODS["lora"].build({"dropout": 0})
    learn(method, model, 0, lr=3e-4)
    merged = model.get_parameter(f"{UP}.weight").detach().clone()
    assert (merged != weight).float().mean() > 0.5
    method.begin_task(model, task_of(model, 1))
    base = model.get_parameter(f"{UP}.base_layer.weight")
    same_exponent = merged.float().frexp().exponent <= weight.float().frexp().exponent
    assert same_exponent.float().mean() > 0.9
    assert torch.equal(base[same_exponent], weight[same_exponent])
    half_a_unit = torch.finfo(torch.bfloat16).eps / 2
    assert bool(((base - weight).abs() <= half_a_unit * merged.abs() * 1.01).all())


def test_inclora_is_the_sum_of_frozen_adapters() -> None:
    model, reference = tiny("llama"), tiny("llama")
    method = METHODS["inclora"].build({"r": 3, "alpha": 6, "dropout": 0, "target_modules": ["up_proj"]})
    config = partial(LoraConfig, r=3, lora_alpha=6, target_modules=["up_proj"])
    explicit = LoraModel(reference, config(), "task-0")
    for index in range(3):
        name = f"task-{index}"
        if index:
            explicit.peft_config[name] = config()
            explicit.inject_adapter(reference, name)
        layers = [module for module in reference.modules() if hasattr(module, "lora_A")]
        method.begin_task(model, task_of(model, index))
        for layer, (a, _) in zip(layers, method.adapters.factors().values(), strict=True):
            layer.lora_A[name].weight.data.copy_(a)
            layer.set_adapter([f"task-{i}" for i in range(index + 1)])
        new = [p for n, p in reference.named_parameters() if n.endswith(f"{name}.weight")]
        assert len(new) == 4
        inputs = partial(batch, seed=index)
        ours = train(model, SGD(trainable(model), lr=0.5), 4, lambda _, give=inputs: give(model))
        theirs = train(reference, SGD(new, lr=0.5), 4, lambda _, give=inputs: give(reference))
        assert ours == pytest.approx(theirs, abs=1e-5)
        method.end_task(model, task_of(model, index))
    assert method.state_dict() == {}
    before = tiny("llama")
    for number, layer in enumerate(layers):
        key = f"model.layers.{number}.mlp.up_proj.weight"
        changes = [2 * layer.lora_B[f"task-{i}"].weight @ layer.lora_A[f"task-{i}"].weight for i in range(3)]
        assert all(change.abs().max() > 1e-4 for change in changes)
        torch.testing.assert_close(
            model.get_parameter(key), before.get_parameter(key) + sum(changes), atol=1e-6, rtol=0
        )


def test_adapters_start_from_the_seed_and_the_task_alone() -> None:
    def first_a(seed: int, index: int, ambient: int) -> Tensor:
        model = tiny("llama")
        torch.manual_seed(ambient)
        task = replace(task_of(model, index), seed=seed)
        method = METHODS["inclora"].build({})
        method.begin_task(model, task)
        a, b = method.adapters.factors()[UP]
        assert not b.any()
        return a.detach()

    assert torch.equal(first_a(1, 0, ambient=5), first_a(1, 0, ambient=6))
    assert not torch.equal(first_a(1, 0, ambient=5), first_a(1, 1, ambient=5))
    assert not torch.equal(first_a(1, 0, ambient=5), first_a(2, 0, ambient=5))
    assert first_a(1, 0, ambient=5).abs().max() <= 32**-0.5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lora", {"r": 0}, "r = 0 is out of range"),
        ("inclora", {"alpha": 0}, "alpha = 0.0 is out of range"),
        ("pissa", {"dropout": 1}, "dropout = 1.0 is out of range"),
        ("olora", {"lambda1": -1}, "lambda1 = -1.0 is out of range"),
        ("olora", {"lambda2": float("nan")}, "lambda2 = nan is out of range"),
        ("milora", {"alpha": 4}, "unknown option 'alpha'"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        METHODS[name].build(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["nothing_like_it"]}, "matches no module"),
        ({"train_also": ["nothing_like_it"]}, "train_also: 'nothing_like_it' matches no parameter"),
        ({"target_modules": ["lm_head"]}, "tied"),
    ],
)
def test_a_refused_model_is_left_as_it_was(options: dict[str, object], message: str) -> None:
    model = tiny("llama-tied")
    was = anatomy(model)
    with pytest.raises(LoricaError, match=message):
        METHODS["lora"].build(options).begin_task(model, task_of(model))
    assert anatomy(model) == was


def test_a_module_in_two_places_is_refused() -> None:
    model = Stack([(4, 5), (4, 5)])
    model.layers[1] = model.layers[0]
    with pytest.raises(LoricaError, match=r"layers\.0 is used in more than one place"):
        METHODS["lora"].build({}).begin_task(model, task_of(tiny("llama")))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_peft_takes_for_experts_is_refused(dropout: float) -> None:
    config = tiny("qwen3-moe").config
    config.mlp_only_layers = [0]
    model = transformers.Qwen3MoeForCausalLM(config)
    was = anatomy(model)
    method = METHODS["lora"].build({"freeze_experts": True, "dropout": dropout})
    with pytest.raises(LoricaError, match="PEFT cannot adapt"):
        method.begin_task(model, task_of(model))
    assert anatomy(model) == was


def test_a_carried_lora_of_another_rank_is_refused() -> None:
    model = tiny("llama")
    method = METHODS["lora"].build({"r": 3})
    learn(method, model, 0)
    was = anatomy(model)
    other = METHODS["lora"].build({"r": 4})
    other.load_state_dict(method.state_dict())
    with pytest.raises(LoricaError, match="does not fit"):
        other.begin_task(model, task_of(model, 1))
    assert anatomy(model) == was


def test_without_peft_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    model = tiny("llama")
    was = anatomy(model)
    with pytest.raises(LoricaError, match=r"pip install 'lorica\[peft\]'"):
        METHODS["lora"].build({}).begin_task(model, task_of(model))
    assert anatomy(model) == was
