"""What recipes/accelerate holds and docs/distributed.md prints: it runs on two processes, and asks for what exists."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorica
from lorica.constrain.protect import protected_layers
from tests.distributed.ranks import free_port, on_ranks, torchrun
from tests.distributed.trainings import Course, in_fsdp, load_sharded, plan_of_shapes, save, weights_of
from tests.training.conftest import llama_folder, rows  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "accelerate"
SCRIPT = RECIPES / "train_sharded.py"
CONFIGS = {
    "ddp": DistributedType.MULTI_GPU,
    "ddp-nodes": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
}
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(), re.S)


def example(words: str) -> str:
    """Return the one example of the page with these words, for two processes."""
    (found,) = (code for code in EXAMPLES if words in code)
    return found.replace("fsdp_size=8", "fsdp_size=2")


def words_for(folder: Path, train_file: str, out: Path) -> list[str]:
    given = {"model": folder, "train_file": train_file, "output_dir": out, "learning_rate": 1e-2, "max_steps": 2}
    return [f"--{name}={value}" for name, value in given.items()] + ["--disable_tqdm=true"]


def check_updated(before: Path, after: Path) -> None:
    """Check that a plain model lies there which keeps to its constraint and has moved everywhere."""
    AutoModelForCausalLM.from_pretrained(after)
    report = lorica.audit(before, after, lorica.Plan.load(after / "plan.json"))
    assert report.holds, report.table()
    assert min(row.relative_change for row in report.rows) > 0


def test_every_configuration_is_known_here() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_takes_the_configuration(name: str) -> None:
    config = load_config_from_file(str(RECIPES / f"{name}.yaml"))
    assert config.distributed_type is CONFIGS[name]
    assert config.num_processes == 8 * config.num_machines
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) | set(config.deepspeed_config) - {"zero3_init_flag"} <= options


def test_fsdp_and_deepspeed_are_set_as_lorica_needs_them() -> None:
    fsdp = yaml.safe_load((RECIPES / "fsdp2.yaml").read_text())["fsdp_config"]
    assert (fsdp["fsdp_version"], fsdp["fsdp_cpu_ram_efficient_loading"]) == (2, False)
    plugin = yaml.safe_load((RECIPES / "zero2.yaml").read_text())["deepspeed_config"]
    deepspeed = json.loads((RECIPES / plugin["deepspeed_config_file"]).read_text())
    assert deepspeed["zero_optimization"] == {"stage": 2}
    assert deepspeed["torch_autocast"]["enabled"]
    assert not {"bf16", "fp16"} & set(deepspeed)


@pytest.mark.slow
def test_the_script_trains_as_one_process_does(
    llama_folder: Path, rows: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(llama_folder, tmp_path / "model")
    config = tmp_path / "model" / "config.json"  # without dropout, of which each process would draw its own
    config.write_text(config.read_text().replace('"attention_dropout": 0.1', '"attention_dropout": 0.0'))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)  # that of the test

    def work(rank: int) -> None:
        runpy.run_path(str(SCRIPT), run_name="__main__")

    for size in (1, 2):
        out = tmp_path / f"by {size}"
        given = [*words_for(tmp_path / "model", rows("new"), out), f"--per_device_train_batch_size={4 // size}"]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given])
        on_ranks(size, work)
        check_updated(tmp_path / "model", out)
    one, two = (load_file(tmp_path / f"by {size}" / "model.safetensors") for size in (1, 2))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--copies=2"], ["--bf16=true"]], ids=["plain", "hybrid", "bf16"])
def test_torchrun_takes_the_script(
    options: list[str], llama_folder: Path, rows: Callable[..., str], tmp_path: Path
) -> None:
    command = torchrun(4 if "--copies=2" in options else 2, str(SCRIPT), *options)
    command += words_for(llama_folder, rows("new"), tmp_path / "updated")
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    check_updated(llama_folder, tmp_path / "updated")


SLURM = {
    "srun": 'shift; n=$SLURM_NNODES; for ((i = 0; i < n; i++)); do SLURM_PROCID=$i "$@" & done; wait -n && wait -n',
    "scontrol": '[[ $1 == show ]] && echo localhost || echo "$@" >> "$TOLD"',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}
"""What stands for Slurm's commands: each node is a process of this machine."""


@pytest.mark.slow
def test_a_job_of_slurm_goes_on_after_its_time_limit(
    llama_folder: Path, rows: Callable[..., str], tmp_path: Path
) -> None:
    for name, body in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    set_by_slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "x"}
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "TOLD": str(tmp_path / "told")}
    env = os.environ | set_by_slurm | own | {"MASTER_PORT": str(free_port())}
    given = {"model_name_or_path": llama_folder, "train_file": rows("new"), "output_dir": tmp_path / "out"}
    given |= {"preset": "paper", "max_steps": 120, "save_steps": 10, "disable_tqdm": True}
    command = ["bash", str(RECIPES / "slurm.sh"), *(str(word) for name in given for word in (f"--{name}", given[name]))]

    job = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while job.poll() is None and not any((tmp_path / "out").glob("checkpoint-*/manifest.json")):
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) != 0
    assert (tmp_path / "told").read_text() == "requeue 5\n"
    assert not (tmp_path / "out" / "lorica.json").exists()
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "lorica.json").exists()
    assert (tmp_path / "told").read_text() == "requeue 5\n"


@pytest.fixture
def at_hand(llama_folder: Path, rows: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the names of the page's examples stand for a small model and rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    shutil.copytree(llama_folder, "my-model")
    Path(rows("new")).rename("new.jsonl")


def test_the_example_that_loads_sharded(at_hand: None) -> None:
    code = example("DistributedConfig")
    on_ranks(2, lambda rank: exec(compile(code, "docs", "exec"), {"__name__": "__main__"}))
    report = lorica.audit("my-model", "updated")
    assert report.holds, report.table()
    assert min(row.relative_change for row in report.rows) > 0


def test_the_example_of_copies(at_hand: None) -> None:
    whole = (ROOT / "docs" / "usage.md").read_text()
    (usage,) = re.findall(r"### With transformers' Trainer\n+```python\n(.*?)```", whole, re.S)
    code = usage.split("lorica.release(model)")[0] + example("process_index")
    on_ranks(2, lambda rank: exec(compile(code, "docs", "exec"), {"__name__": "__main__"}))
    assert lorica.audit("my-model", "updated").holds


def test_the_example_that_saves_what_was_sharded_after_protect(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    code = example("get_model_state_dict").replace('"my-model"', repr(str(folder)))
    code = code.replace('"updated"', repr(str(tmp_path / "updated")))

    def work(rank: int) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder).train()
        lorica.protect(model, plan := plan_of_shapes(model))
        in_fsdp(model)
        Course(steps=2, parts=2).train(model, model, rank, 2)
        exec(compile(code, "docs", "exec"), {"model": model})
        return [weights_of(model), list(plan.names())]

    (trained, names), _ = on_ranks(2, work)
    saved = load_file(tmp_path / "updated" / "model.safetensors")
    before = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, torch.tensor(trained[name])) for name, tensor in saved.items())
    assert not any(torch.equal(saved[f"{name}.weight"], before[f"{name}.weight"]) for name in names)


def test_a_plan_that_was_made_on_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("llama", tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(example('.save("plan.json")').replace('"my-model"', repr(str(folder))), {})

    def work(rank: int) -> list[list[int]]:
        model = load_sharded(folder, 2)
        exec(example("Plan.load"), {"lorica": lorica, "model": model})
        return [list(layer.core.shape) for layer in protected_layers(model).values()]

    entries = lorica.Plan.load("plan.json").entries
    free = [[side - k for side, k in zip(entry.shape, entry.protected, strict=True)] for entry in entries]
    assert len({entry.k / min(entry.shape) for entry in entries}) > 1, "the plan could be told from shapes"
    assert on_ranks(2, work) == [free, free]
