"""The optimizer's step in the backward pass gives the weights of the ordinary order, one gradient at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments
from transformers.optimization import Adafactor

import lorica
from lorica.config import build_config
from lorica.constrain.linear import SubspaceLayer
from lorica.constrain.protect import protected_layers
from lorica.data.collate import Collator
from lorica.errors import LoricaError
from lorica.methods import METHODS
from lorica.training.arguments import training_arguments
from lorica.training.guards import Diverged
from lorica.training.in_backward import StepInBackward, check_embeddings, check_in_backward
from lorica.training.trainer import fit
from lorica.update import train as update
from tests.builders import BatchRows, batch, matrix, plan_for, protected_tiny, task_of, tiny, trainable, weights
from tests.training.conftest import byte_tokenizer

Rows = Callable[..., str]
Make = Callable[[list[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, scale_parameter=False, relative_step=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, centered=True),
}


def loop(model: nn.Module, optimizer: Optimizer, steps: int = 4) -> dict[str, Tensor]:
    """Train by hand under a schedule and return the weights."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(steps):
        model(**batch(model, step)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {key: value.clone() for key, value in model.state_dict().items()}


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups with rates of their own."""
    every = trainable(model)
    return [{"params": every[::2]}, {"params": every[1::2], "lr": 3e-3}]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_the_weights_are_those_of_the_ordinary_order_bitwise(architecture: str, make: Make) -> None:
    both = []
    for wrap in (lambda inner: inner, StepInBackward):
        model = protected_tiny(architecture, train_also=["norm|ln_"])
        both.append(loop(model, wrap(make(groups_of(model)))))
    ordinary, fused = both
    assert all(torch.equal(ordinary[key], fused[key]) for key in ordinary)
    untouched = protected_tiny(architecture, train_also=["norm|ln_"]).state_dict()
    assert not all(torch.equal(fused[key], untouched[key]) for key in fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_they_are_where_bases_are_read_off_the_weight(dtype: torch.dtype) -> None:
    both = []
    for wrap in (lambda inner: inner, StepInBackward):
        model = tiny("llama", dtype)
        lorica.protect(model, lorica.plan(model, 0.5), memory="lean")
        both.append(loop(model, wrap(OPTIMIZERS["adamw"](trainable(model)))))
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])


def test_each_layer_is_folded_once_a_step_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = protected_tiny("llama")
    optimizer = StepInBackward(torch.optim.AdamW(trainable(model), 1e-2, fused=True))
    folded: list[nn.Module] = []
    fold = SubspaceLayer.fold
    monkeypatch.setattr(SubspaceLayer, "fold", lambda layer: (folded.append(layer), fold(layer))[1])
    expected: list[nn.Module] = []
    owners = {layer.core: layer for layer in protected_layers(model).values()}
    optimizer.inner.register_step_pre_hook(
        lambda inner, *_: expected.append(owners[inner.param_groups[0]["params"][0]])
    )
    model(**batch(model)).loss.backward()
    assert [id(layer) for layer in folded] == [id(layer) for layer in expected], "at once after its own step"
    assert set(folded) == set(owners.values())
    assert len(folded) == len(owners)
    optimizer.step()
    for layer in owners.values():
        torch.testing.assert_close(layer.matrix, layer.base + layer.delta(), atol=1e-6, rtol=0)
        assert layer.core.abs().max() > 0


def test_one_gradient_lives_at_a_time() -> None:
    model = protected_tiny("llama", train_also=["norm"])
    optimizer = StepInBackward(torch.optim.AdamW(trainable(model), 1e-2))
    alive = []
    optimizer.inner.register_step_pre_hook(
        lambda *_: alive.append(sum(parameter.grad is not None for parameter in model.parameters()))
    )
    model(**batch(model)).loss.backward()
    assert alive == [1] * len(trainable(model))
    assert all(parameter.grad is None for parameter in model.parameters())


class Repeated(nn.Module):
    """One protected layer used three times, plainly or under one of torch's two kinds of checkpointing."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.kind = nn.Linear(16, 16), nn.Linear(16, 16), kind
        lorica.protect(self, plan_for(self, 8))

    def forward(self, x: Tensor) -> Tensor:
        def use(x: Tensor) -> Tensor:
            return torch.tanh(self.first(x))

        for _ in range(3):
            x = use(x) if self.kind == "plain" else checkpoint(use, x, use_reentrant=self.kind == "re-entrant")
        return self.last(x).square().mean()


def learn(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    for step in range(3):
        model(matrix(5, 16, seed=step).float().requires_grad_()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize("kind", ["plain", "not re-entrant"])
def test_a_layer_used_several_times_waits_for_its_whole_gradient(kind: str) -> None:
    ordinary, fused = Repeated(kind), Repeated(kind)
    expected = learn(ordinary, torch.optim.AdamW(trainable(ordinary), 1e-2))
    got = learn(fused, StepInBackward(torch.optim.AdamW(trainable(fused), 1e-2)))
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_a_gradient_that_comes_in_parts_is_refused() -> None:
    model = Repeated("re-entrant")
    with pytest.raises(LoricaError, match=r"a gradient of shape \(8, 8\) came twice in one step"):
        learn(model, StepInBackward(torch.optim.AdamW(trainable(model), 1e-2)))
    model = protected_tiny("llama")
    optimizer = StepInBackward(torch.optim.AdamW(trainable(model), 1e-2))
    model(**batch(model)).loss.backward()
    with pytest.raises(LoricaError, match="gradient accumulation"):
        model(**batch(model)).loss.backward()
    with pytest.raises(LoricaError, match="no closure"):
        optimizer.step(lambda: 0.0)


class Counting(torch.optim.SGD):
    """Keeps the number of its steps in the parameter group, as schedule-free optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def test_an_optimizer_that_counts_for_all_parameters_is_refused() -> None:
    model = protected_tiny("llama")
    StepInBackward(Counting(trainable(model), 1e-2))
    with pytest.raises(LoricaError, match="Counting keeps 'k' for all parameters together"):
        model(**batch(model)).loss.backward()


def test_a_constrained_optimizer_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(LoricaError, match="projects and clips all gradients together"):
        StepInBackward(lorica.ConstrainedOptimizer(torch.optim.AdamW(trainable(model)), {}))


def test_state_groups_and_hooks_are_the_inner_one_s() -> None:
    model, other = tiny("llama"), tiny("llama")
    first, *rest = trainable(model)
    inner = torch.optim.AdamW([first], 1e-2)
    optimizer = StepInBackward(inner)
    optimizer.add_param_group({"params": rest, "lr": 1e-3})
    halfway = loop(model, optimizer, steps=2)
    assert optimizer.param_groups is inner.param_groups
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, len(rest)]
    assert optimizer.state_dict().keys() == inner.state_dict().keys()

    other.load_state_dict(halfway)
    first, *rest = trainable(other)
    again = StepInBackward(torch.optim.AdamW([{"params": [first]}, {"params": rest}], 0.5))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, stepper in ((model, optimizer), (other, again)):
        one(**batch(one, 7)).loss.backward()
        stepper.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

    optimizer.remove()
    before = weights(model)
    model(**batch(model)).loss.backward()
    assert all(torch.equal(before[key], value) for key, value in weights(model).items())
    assert all(parameter.grad is not None for parameter in trainable(model))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"--max_grad_norm 1 needs the norm of all gradients.*give --max_grad_norm 0"),
        ({"max_grad_norm": 0, "gradient_accumulation_steps": 2}, "give --gradient_accumulation_steps 1"),
        ({"max_grad_norm": 0, "fp16": True}, "--fp16 scales the loss"),
        ({"max_grad_norm": 0, "optim": "galore_adamw_layerwise"}, "--optim galore_adamw_layerwise steps in the back"),
        ({"max_grad_norm": 0, "optim": "lomo"}, "--optim lomo steps in the backward pass by itself"),
        ({"max_grad_norm": 0, "optim": "grokadamw"}, "--optim grokadamw clips all gradients together"),
    ],
)
def test_arguments_that_need_all_gradients_are_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match=message):
        check_in_backward(TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **given))


def test_refused_before_the_weights_are_loaded(tmp_path: Path) -> None:
    options: dict[str, Any] = {"hidden_size": 8, "seq2seq": False}
    training_arguments({}, str(tmp_path), **options)
    with pytest.raises(LoricaError, match="give --max_grad_norm 0"):
        training_arguments({}, str(tmp_path), **options, optimizer_in_backward=True)


def test_embeddings_do_not_train_so_with_bitsandbytes() -> None:
    class AdamW8bit(torch.optim.AdamW):
        __module__ = "bitsandbytes.optim.adamw"

    model = tiny("llama")
    optimizer = AdamW8bit(model.parameters())
    with pytest.raises(LoricaError, match="embeddings cannot train with it and bitsandbytes"):
        check_embeddings(model, optimizer)
    model.get_input_embeddings().requires_grad_(False)
    check_embeddings(model, optimizer)


# --- through lorica train -----------------------------------------------------------------------------------------

FAST = {"max_steps": 6, "learning_rate": 3e-3, "disable_tqdm": True, "seed": 1, "max_grad_norm": 0, "preset": "paper"}


def run(model: Path, out: Path, train_file: str, **options: Any) -> dict[str, Tensor]:
    values = {"model_name_or_path": str(model), "train_file": train_file, "output_dir": str(out)} | FAST | options
    update(build_config(values), say=lambda line: None)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_updates_one_after_another_are_the_ordinary_ones_bitwise(
    kind: str, request: pytest.FixtureRequest, rows: Rows, tmp_path: Path
) -> None:
    folders = [request.getfixturevalue(f"{kind}_folder")] * 2
    for name in ("one", "two"):
        outs = [tmp_path / f"{name}-{fused}" for fused in (False, True)]
        ordinary, fused = (
            run(folder, out, rows(name), optimizer_in_backward=out is outs[1], protect_learned=0.1)
            for folder, out in zip(folders, outs, strict=True)
        )
        assert all(torch.equal(ordinary[key], fused[key]) for key in ordinary)
        assert all(row["holds"] for row in json.loads((outs[1] / "lorica.json").read_text())["leakage"])
        folders = outs


def test_resumed_from_a_checkpoint_it_is_the_undisturbed_run_bitwise(
    llama_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    options = {"optimizer_in_backward": True, "save_steps": 2, "lr_scheduler_type": "cosine"}
    whole = run(llama_folder, tmp_path / "out", rows("new"), **options)
    for file in ("lorica.json", "model.safetensors", "checkpoint-6/trainer_state.json"):
        (tmp_path / "out" / file).unlink()
    newest = tmp_path / "out" / "checkpoint-4"
    resumed = run(llama_folder, tmp_path / "out", rows("new"), **options, resume_from_checkpoint=str(newest))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_projected_constraint_is_refused_before_anything_is_written(
    llama_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    with pytest.raises(LoricaError, match="projects or watches the gradients of all weights together"):
        run(llama_folder, tmp_path / "out", rows("new"), constraint="block", optimizer_in_backward=True)
    assert not (tmp_path / "out").exists()


def fitted(tmp_path: Path, learning_rate: float) -> tuple[nn.Module, list[dict[str, float]] | None]:
    """Train a tiny model under ``seqft`` and return it with the log, None if the loss was no number."""
    model, method = tiny("llama"), METHODS["seqft"].build({})
    method.begin_task(model, task_of(model))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, optim="sgd", learning_rate=learning_rate, max_grad_norm=0,
        logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    collate = Collator(byte_tokenizer(), seq2seq=False)
    try:
        rows = BatchRows(model)
        log = fit(model, method, rows, byte_tokenizer(), collate, arguments, optimizer_in_backward=True, quiet=True)
    except Diverged:
        return model, None
    return model, log


def test_the_log_tells_no_norm_of_gradients_that_are_gone(tmp_path: Path) -> None:
    model, log = fitted(tmp_path, 0.1)
    assert log is not None
    assert [row["loss"] for row in log if "loss" in row]
    assert not any("grad_norm" in row for row in log)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters()), "hooks are gone"


@pytest.mark.reliability("R15")
def test_a_diverged_run_stops_before_the_weights_are_no_numbers(tmp_path: Path) -> None:
    model, log = fitted(tmp_path, 1e30)
    assert log is None
    assert all(parameter.isfinite().all() for parameter in model.parameters())
