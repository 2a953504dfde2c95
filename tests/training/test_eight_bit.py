"""Optimizer states of eight bits by the Trainer's own names: what is missing is said, what is there holds."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, trainer_optimizer

import lorica
from lorica.config import build_config
from lorica.errors import LoricaError
from lorica.training.arguments import training_arguments
from lorica.training.in_backward import StepInBackward
from lorica.training.optimizers import wide_states
from lorica.update import train as update
from tests.builders import VOCABULARY, batch, train, trainable

Rows = Callable[..., str]
OPTIONS: dict[str, Any] = {"hidden_size": 8, "seq2seq": False}
PACKAGES = {"adamw_torch_8bit": "torchao", "adamw_bnb_8bit": "bitsandbytes"}


@pytest.mark.parametrize(("optim", "package"), [*PACKAGES.items(), ("paged_adamw_8bit", "bitsandbytes")])
def test_a_missing_package_is_one_message(
    optim: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trainer_optimizer, f"is_{package}_available", lambda: False)
    message = f"--optim {optim} needs the package {package}: pip install 'lorica[{package}]'"
    with pytest.raises(LoricaError, match=f"^{re.escape(message)}$"):
        training_arguments({"optim": optim}, str(tmp_path), **OPTIONS)


@pytest.mark.parametrize(
    ("package", "given", "message"),
    [
        ("schedulefree", {"optim": "schedule_free_adamw"}, "--optim schedule_free_adamw: .*schedulefree"),
        ("grokadamw", {"optim": "grokadamw"}, "--optim grokadamw: .*grokadamw"),
        ("", {"optim": "sgd", "optim_args": "momentum=much"}, "--optim sgd: could not convert"),
    ],
)
def test_what_transformers_cannot_build_shows_early(
    package: str, given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if package and importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(LoricaError, match=message):
        training_arguments(given, str(tmp_path), **OPTIONS)


def test_states_that_torchao_leaves_wide_are_told(tmp_path: Path) -> None:
    model, odd = nn.Linear(64, 64, bias=False), nn.Linear(97, 101, bias=False)
    arguments = TrainingArguments(output_dir=str(tmp_path), optim="adamw_torch_8bit", use_cpu=True)
    assert wide_states(arguments, model) is None
    told = wide_states(arguments, nn.Sequential(model, odd))
    assert told is not None
    assert "71 % of the optimizer's states stay in float32" in told  # 97 * 101 of 97 * 101 + 64 * 64 numbers
    assert wide_states(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), odd) is None
    assert wide_states(arguments, odd.requires_grad_(False)) is None


@pytest.fixture(params=PACKAGES)
def optim(request: pytest.FixtureRequest) -> Iterator[str]:
    pytest.importorskip(PACKAGES[request.param])
    torch.compiler.set_stance("force_eager")  # torchao compiles its step: half a minute, and the same numbers
    yield request.param
    torch.compiler.set_stance("default")


def built(optim: str, model: nn.Module, tmp_path: Path) -> torch.optim.Optimizer:
    """Return an optimizer as the Trainer builds it."""
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=optim, learning_rate=3e-3, use_cpu=True)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    return kind(trainable(model), **options)


def protected_llama() -> tuple[nn.Module, lorica.Plan]:
    """Return a protected model whose cores are of 4096 numbers and more; smaller ones keep float32 states."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).train()
    plan = lorica.plan(model, 0.5)
    return lorica.protect(model, plan), plan


def repeating(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Return one of three batches in turn."""
    return batch(model, step % 3)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the moments; codes and scales count, and a table that all share is one kilobyte."""
    parts: dict[int, int] = {}
    for state in optimizer.state.values():
        for tensor in (value for value in state.values() if torch.is_tensor(value)):
            for part in (tensor.codes, tensor.scale) if hasattr(tensor, "codes") else (tensor,):
                parts[part.data_ptr()] = part.nbytes
    return sum(parts.values())


def test_learns_as_adamw_does_in_a_quarter_of_the_state(optim: str, tmp_path: Path) -> None:
    ends, sizes = {}, {}
    for name in ("adamw_torch", optim):
        model, plan = protected_llama()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer = built(name, model, tmp_path)
        losses = train(model, optimizer, 25, partial(repeating, model))
        ends[name], sizes[name] = losses[-1], state_bytes(optimizer)
        for entry in plan.entries:
            leaks(before[f"{entry.name}.weight"], model.get_submodule(entry.name).weight.detach(), entry.k)
    assert losses[0] - ends[optim] > 0.5
    assert ends[optim] == pytest.approx(ends["adamw_torch"], abs=0.02)
    assert 0.2 < sizes[optim] / sizes["adamw_torch"] < 0.32


def leaks(before: Tensor, after: Tensor, k: int) -> None:
    """Assert that a weight moved, and not along the top k directions of what it was."""
    u, _, vh = torch.linalg.svd(before.double())
    delta = (after - before).double()
    assert delta.norm() > 1e-3 * before.norm()
    assert (u[:, :k].T @ delta).norm() <= 1e-5 * delta.norm()
    assert (delta @ vh[:k].T).norm() <= 1e-5 * delta.norm()


def test_steps_in_the_backward_pass_give_the_same_weights(optim: str, tmp_path: Path) -> None:
    both = []
    for wrap in (lambda inner: inner, StepInBackward):
        model, _ = protected_llama()
        train(model, wrap(built(optim, model, tmp_path)), 4, partial(repeating, model))
        both.append(model.state_dict())
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])


def test_resumed_from_a_checkpoint_it_is_the_undisturbed_run(
    optim: str, llama_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {
        "model_name_or_path": str(llama_folder), "train_file": rows("new"), "output_dir": str(out), "optim": optim,
        "max_steps": 6, "save_steps": 2, "learning_rate": 3e-3, "disable_tqdm": True, "unfreeze_rank_ratio": 1.0,
        "dtype": "bfloat16", "preset": "paper",
    }  # fmt: skip
    update(build_config(options), say=lambda line: None)
    whole = load_file(out / "model.safetensors")
    for file in ("lorica.json", "model.safetensors"):
        (out / file).unlink()
    update(build_config(options | {"resume_from_checkpoint": str(out / "checkpoint-4")}), say=lambda line: None)
    resumed = load_file(out / "model.safetensors")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
