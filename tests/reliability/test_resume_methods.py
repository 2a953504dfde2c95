"""Every method: a task that is interrupted and begun again from what the stage before left is the undisturbed one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorica.constrain.bases
import lorica.constrain.factored
import lorica.constrain.optimizer
from lorica.errors import Interrupted
from lorica.memory import load_memory, save_memory
from lorica.methods import METHODS, Method
from lorica.training.arguments import training_arguments
from lorica.training.checkpoints import kept_bases, newest_complete
from lorica.training.trainer import fit
from tests.builders import tiny
from tests.methods.little_text import little_text  # noqa: F401
from tests.methods.test_conformance import CASES, build, tasks_for
from tests.reliability.interruptions import stopped_at

STEPS = 5
QUICK = (
    "osft", "osft-block", "osft-remembering", "osft-rehearsing", "osft-prompted", "osft-curvature-block", "osft-held",
    "osft-factored", "osft-gradient", "lora", "pissa", "ewc", "replay",
)  # fmt: skip
"""Each has something of its own to go on with."""

SPLITTERS = (
    (lorica.constrain.bases, "protected_directions"),
    (lorica.constrain.optimizer, "protected_directions"),
    (lorica.constrain.factored, "split"),
)


def model_of(family: str, weights: dict[str, Tensor] | None = None) -> Any:
    """Return a model with dropout, with given weights as a stage on disk would have them."""
    model = tiny(family, dropout=0.1)
    if weights is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
    return model.eval()


def arguments(model: Any, folder: Path) -> Any:
    given = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 5e-3,
        "warmup_steps": 1, "weight_decay": 0.1, "max_grad_norm": 0.5, "logging_steps": 2, "save_strategy": "no",
        "disable_tqdm": True, "use_cpu": True, "seed": 0,
    }  # fmt: skip
    return training_arguments(given, str(folder), hidden_size=None, seq2seq=model.config.is_encoder_decoder)


def learn(method: Method, model: Any, index: int, folder: Path) -> list[dict[str, float]]:
    """Learn one task, from the newest checkpoint in the folder if there is one, as ``lorica run`` does."""
    task = tasks_for(method, model, 0)[index]
    if not method.learns(task):
        return []
    torch.manual_seed(0)
    resume = newest_complete(folder, pytest.fail)
    method.kept = kept_bases(resume)
    method.begin_task(model, task)
    log = fit(
        model, method, method.training_data(task), None, task.collate, arguments(model, folder), quiet=True,
        resume_from_checkpoint=None if resume is None else str(resume),
    )  # fmt: skip
    audit = method.audit(model)
    assert audit is None or method.options.__dict__.get("retract") is False or audit.worst is not None
    method.end_task(model, task)
    return [{key: value for key, value in row.items() if key in ("step", "loss", "grad_norm")} for row in log[:-1]]


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def check(case: str, family: str, index: int, folder: Path) -> None:
    method, model = build(case, family), model_of(family)
    for earlier in range(index):
        with tempfile.TemporaryDirectory() as place:
            learn(method, model, earlier, Path(place))
    if method.restarts:
        model = model_of(family)
    weights = weights_of(model)
    save_memory(method.state_dict(), folder / "memory.safetensors")
    model.eval()
    log = learn(method, model, index, folder / "whole")
    assert log, "the last task is one that every method learns"

    def begun_again() -> tuple[Method, Any]:
        again = build(case, family)
        again.load_state_dict(load_memory(folder / "memory.safetensors"))
        return again, model_of(family, weights)

    with stopped_at("on_substep_end", 4), pytest.raises(Interrupted):
        learn(*begun_again(), index, folder / "parts")
    other, resumed = begun_again()
    with pytest.MonkeyPatch.context() as patch:
        for place, name in SPLITTERS:
            patch.setattr(place, name, lambda *_, **__: pytest.fail("split again"))
        assert learn(other, resumed, index, folder / "parts") == log
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), resumed.parameters(), strict=True))
    carried, mine = other.state_dict(), method.state_dict()
    assert carried.keys() == mine.keys()
    assert all(torch.equal(carried[name], mine[name]) for name in mine)


@pytest.mark.reliability("R9", "R10", "R11")
@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_every_method_goes_on_from_within_a_task(case: str, tmp_path: Path) -> None:
    check(case, "llama", 2 if case == "joint" else 1, tmp_path)


@pytest.mark.slow
@pytest.mark.reliability("R9", "R10", "R11")
@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("case", METHODS)
def test_on_every_kind_of_model(case: str, family: str, tmp_path: Path) -> None:
    check(case, family, 2, tmp_path)
