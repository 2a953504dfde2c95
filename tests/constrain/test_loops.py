"""Ways to train that users have: each works on a protected model without a line for Lorica."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

from lorica.constrain.protect import protected_layers
from tests.builders import (
    batch,
    half,
    leakage,
    protected_tiny,
    top_directions,
    train,
    trainable,
)
from tests.constrain.folding import adamw, assert_folded, forward, loss_of, small


def test_a_hand_written_loop_with_evaluation_in_between() -> None:
    model = protected_tiny()
    optimizer = adamw(model)
    data = batch(model)
    for _ in range(3):
        before = model(**data).loss
        before.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            assert model(**data).loss < before
        with torch.inference_mode():
            assert model(**data).loss < before
    assert_folded(model)


@pytest.mark.reliability("R28")
def test_accumulation_is_one_large_batch() -> None:
    one, many = small(), small()
    xs = one.inputs(0, rows=12)
    loss = sum(layer(x).square().sum() for layer, x in zip(one.layers, xs, strict=True))
    loss.backward()
    for i in range(4):
        part = [x[3 * i : 3 * i + 3] for x in xs]
        sum(layer(x).square().sum() for layer, x in zip(many.layers, part, strict=True)).backward()
    for a, b in zip(one.layers, many.layers, strict=True):
        torch.testing.assert_close(a.core.grad, b.core.grad)
    for model in (one, many):
        SGD(trainable(model), lr=1e-3).step()
        forward(model)
        assert_folded(model)


def test_accumulation_keeps_core_gradients_alone_and_a_step_costs_the_same() -> None:
    costs = []
    for parts in (1, 4):
        model = small()
        for seed in range(parts):
            loss_of(model, seed).backward()
            held = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
            assert held == {f"layers.{i}.core" for i in (0, 1)}
        with FlopCounterMode(display=False) as counter:
            SGD(trainable(model), lr=1e-3).step()
        costs.append(counter.get_total_flops())
    assert costs[0] == costs[1] > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    plain, checkpointed = protected_tiny(), protected_tiny()
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        train(model, adamw(model), 3, lambda step, model=model: batch(model, step))
        assert_folded(model)
    for a, b in zip(trainable(plain), trainable(checkpointed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_bf16_autocast_trains_a_float32_master() -> None:
    model = protected_tiny()
    before = {name: layer.base.clone() for name, layer in protected_layers(model).items()}
    optimizer = adamw(model)
    data = batch(model)
    losses = []
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**data).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_folded(model)
    for name, layer in protected_layers(model).items():
        assert layer.core.dtype == layer.weight.dtype == torch.float32
        assert max(leakage(before[name], layer.weight, half(*layer.weight.shape))) <= 1e-5


class Rows(torch.utils.data.Dataset):
    def __init__(self, model: nn.Module) -> None:
        data = batch(model, rows=16)
        self.rows = [{key: value[i] for key, value in data.items()} for i in range(16)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.rows[i]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor"])
def test_the_hugging_face_trainer(tmp_path: Path, optim: str) -> None:
    model = protected_tiny()
    before = {name: layer.base.clone() for name, layer in protected_layers(model).items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=5,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        optim=optim,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = Rows(model)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    before_loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before_loss
    assert_folded(model)
    for name, layer in protected_layers(model).items():
        u, v = top_directions(before[name], half(*layer.weight.shape))
        d = layer.weight.detach().double() - before[name].double()
        assert max((u.T @ d).norm(), (d @ v).norm()) <= 1e-5 * d.norm()


@pytest.fixture
def one_process_group(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_distributed_data_parallel_is_the_same_training() -> None:
    plain, wrapped = protected_tiny(), protected_tiny()
    train(plain, adamw(plain), 3, partial(batch, plain))
    parallel = nn.parallel.DistributedDataParallel(wrapped)
    train(parallel, adamw(wrapped), 3, partial(batch, wrapped))
    assert_folded(wrapped)
    for a, b in zip(trainable(plain), trainable(wrapped), strict=True):
        assert torch.equal(a, b)


def _has_compiler() -> bool:
    return importlib.util.find_spec("torch._inductor") is not None and torch._dynamo.is_dynamo_supported()


@pytest.mark.skipif(not _has_compiler(), reason="no compiler")
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_sees_every_fold(backend: str) -> None:
    plain, model = small(), small()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for each, function in ((plain, plain), (model, compiled)):
        optimizer = adamw(each)
        for step in range(4):
            function(each.inputs(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_folded(each)
    for a, b in zip(trainable(plain), trainable(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model.inputs(9)), loss_of(plain, 9), rtol=1e-4, atol=1e-5)
