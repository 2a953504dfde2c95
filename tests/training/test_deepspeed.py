"""What ``--deepspeed`` and Accelerate's launcher stand for, and what cannot be had under DeepSpeed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from lorica import processes
from lorica.config import build_config
from lorica.errors import LoricaError
from lorica.training import deepspeed
from lorica.training.arguments import check_arguments
from lorica.training.deepspeed import FILLED, check_deepspeed, check_option
from lorica.training.launcher import launcher_settings
from lorica.training.states import save_tree
from lorica.training.zero import ZeroState
from tests.builders import tiny

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "accelerate" / "zero2.json"
AUTO = dict.fromkeys(FILLED, "auto")
ZERO_2 = {"zero_optimization": {"stage": 2}}


def zero(**fields: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2} | fields}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("none.json", "none.json: cannot read the DeepSpeed configuration"),
        ("{1}", "--deepspeed {1}: "),
        ([], "--deepspeed: give a JSON file of DeepSpeed's settings"),
        ({}, "zero_optimization has the stage None; give 1 or 2"),
        ({"zero_optimization": 2}, "zero_optimization has the stage None; give 1 or 2"),
        (zero(stage=0), "zero_optimization has the stage 0; give 1 or 2"),
        (zero(stage=3), "ZeRO-3 takes the weights apart; --fsdp full_shard does so"),
        (ZERO_2 | {"bf16": {"enabled": True}}, "bf16 is not taken: it casts the cores"),
        (ZERO_2 | {"fp16": {"enabled": "true"}}, "fp16 is not taken: it casts the cores"),
        (ZERO_2 | {"amp": {"enabled": True}}, "amp is not taken: it casts the cores"),
        (ZERO_2 | {"optimizer": {"type": "AdamW"}}, "optimizer is not taken: --optim and its options say it"),
        (ZERO_2 | {"scheduler": {"type": "WarmupLR"}}, "scheduler is not taken: --lr_scheduler_type"),
        (ZERO_2 | {"gradient_cliping": 1.0}, "gradient_cliping is not taken. Did you mean 'gradient_clipping'?"),
        (zero(offload_optimizer={"device": "cpu"}), "zero_optimization.offload_optimizer is not taken: the"),
        (zero(offload_param={"device": "nvme"}), "zero_optimization.offload_param is not taken"),
        (zero(round_robin_gradients=True), "zero_optimization.round_robin_gradients is not taken."),
        (zero(overlap_com=True), "Did you mean 'overlap_comm'?"),
        (ZERO_2 | {"torch_autocast": {"enabled": True}}, "torch_autocast takes enabled and dtype bfloat16"),
        (ZERO_2 | {"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast takes enabled and dtype"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(LoricaError) as refused:
        check_arguments({"deepspeed": value})
    assert message in str(refused.value)


def test_what_the_options_say_is_filled_in() -> None:
    """Left out of the file, DeepSpeed would not clip."""
    assert check_option(ZERO_2) == AUTO | ZERO_2
    assert check_option(json.dumps(ZERO_2 | {"gradient_clipping": 0.5})) == AUTO | ZERO_2 | {"gradient_clipping": 0.5}
    off = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}, "amp": None, "steps_per_print": 5}
    without = {"offload_optimizer": {"device": "none"}, "offload_param": None, "overlap_comm": True}
    assert check_option(off | zero(**without)) == AUTO | zero(overlap_comm=True) | {"steps_per_print": 5}


def test_the_recipe_is_taken() -> None:
    found = check_arguments({"deepspeed": str(RECIPE)})["deepspeed"]
    assert found == AUTO | ZERO_2 | {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    assert check_arguments({"deepspeed": found})["deepspeed"] == found
    assert check_arguments({"deepspeed": "false"})["deepspeed"] is None


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, {}),
        ({"ACCELERATE_USE_DEEPSPEED": "false"}, {}),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "x.json"}, {"deepspeed": "x.json"}),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
            {"deepspeed": zero(stage=1, offload_optimizer={"device": "none"}, offload_param={"device": "none"})},
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            {
                "deepspeed": {"gradient_accumulation_steps": 4}
                | zero(offload_optimizer={"device": "none"}, offload_param={"device": "none"})
            },
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            {"deepspeed": zero(offload_optimizer={"device": "cpu"}, offload_param={"device": "none"})},
        ),
    ],
)  # fmt: skip
def test_what_the_launcher_was_told_is_an_option(
    told: dict[str, str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with launcher_settings() as asked:
        assert asked == expected
        assert "ACCELERATE_USE_DEEPSPEED" not in os.environ
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as Accelerate leaves it
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "gpm"}, "--deepspeed: --method gpm is not known to be right; give osft, seqft, ewc, lwf or replay"),
        ({"constraint": "block"}, "--deepspeed: --constraint block is held by an optimizer"),
        ({"optim": "adagrad"}, "--deepspeed: --optim adagrad is not known to step parts of a weight"),
        ({"optim": "adafactor"}, "--deepspeed: --optim adafactor is not known"),
        ({"bf16": True}, "--deepspeed: --bf16 is not taken: it casts the cores"),
        ({"use_cpu": True}, "--deepspeed: --use_cpu is not taken where there is a GPU"),
        ({"save_only_model": True}, "--deepspeed: --save_only_model is not taken"),
        ({"load_best_model_at_end": True}, "--deepspeed: --load_best_model_at_end is not taken"),
    ],
)
def test_what_does_not_go_with_deepspeed(
    given: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "size", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    config = build_config({"model_name_or_path": "m", "train_file": "f", "output_dir": str(tmp_path)} | given)
    arguments = TrainingArguments(str(tmp_path), report_to="none")
    for name, value in config.training.items():
        setattr(arguments, name, value)
    with pytest.raises(LoricaError, match=message):
        check_deepspeed(arguments, config.method, vars(config))


def test_what_the_file_and_the_options_say_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "size", lambda: 2)
    arguments: Any = TrainingArguments(str(tmp_path), report_to="none")
    arguments.hf_deepspeed_config = SimpleNamespace(mismatches=["- ds gradient_clipping=0.5 vs hf max_grad_norm=1.0"])
    with pytest.raises(LoricaError, match=r"disagree \(ds gradient_clipping=0.5 vs hf max_grad_norm=1.0\); give it"):
        check_deepspeed(arguments, "osft", {})
    arguments.mixed_precision = "bf16"
    with pytest.raises(LoricaError, match="--deepspeed: the launcher's mixed_precision is not taken: it casts"):
        check_deepspeed(arguments, "osft", {})


def test_one_process_alone_shares_nothing_out(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), report_to="none")
    with pytest.raises(LoricaError, match="--deepspeed needs several processes: torchrun --nproc_per_node N"):
        check_deepspeed(arguments, "osft", {})


def test_the_package_is_asked_for_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "find_spec", lambda name: None)
    with pytest.raises(LoricaError, match=r"pip install 'lorica\[deepspeed\]'"):
        deepspeed.check_installed()


def test_the_parts_of_another_number_of_processes_are_refused(tmp_path: Path) -> None:
    for rank in range(3):
        save_tree({}, tmp_path, f"optimizer.process-{rank}")
    with pytest.raises(ValueError, match="it lies in 3 parts, and DeepSpeed goes on with as many processes"):
        ZeroState(tiny("llama")).load_optimizer(None, tmp_path)  # type: ignore[arg-type]
