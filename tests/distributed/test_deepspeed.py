"""``lorica train`` and ``lorica run`` under DeepSpeed's ZeRO-1 and 2: the weights are those of one process.

DeepSpeed is no part of what the tests need; where it is not installed these are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

import lorica
from lorica.constrain.protect import protected_layers
from lorica.data.stream import TaskStream
from lorica.training.trainer import MethodTrainer
from lorica.training.trust import PICKLES
from tests.constrain.folding import expected_weight
from tests.distributed.ranks import torchrun
from tests.distributed.test_run import LASTING, on_two, ran, stream  # noqa: F401
from tests.distributed.test_run import weights as model_of
from tests.distributed.test_sharded_train import apart, rows_in, same_bits, sharded, updated
from tests.experiments.conftest import write  # noqa: F401
from tests.methods.little_text import little_text  # noqa: F401
from tests.reliability.interruptions import cases, quick_updates, stopped_at

deepspeed = pytest.importorskip("deepspeed")

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"
GO_ON = {"resume_from_checkpoint": "true"}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}} | more


@pytest.fixture(scope="module", autouse=True)
def ready() -> Iterator[None]:
    """Let DeepSpeed compile what it needs of processes on a CPU, which takes minutes when it is done first."""
    if not torch.cuda.is_available():
        deepspeed.accelerator.get_accelerator().create_op_builder("ShareMemCommBuilder").load()
    with quick_updates():
        yield


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return rows_in(tmp_path)


def parted(model: Path, rows: Path, out: Path, stage: int = 2, work: Any = updated, **given: Any) -> list[Any]:
    """Update in two processes under DeepSpeed, and return of each how it ended, and its record."""
    return sharded(2, model, rows, out, work=work, **{"fsdp": None, "deepspeed": zero(stage)} | given)


def without_pickles(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if path.suffix in PICKLES]


@pytest.mark.reliability("R30")
@pytest.mark.parametrize("way", cases({"osft": ("osft", 2), "osft 1": ("osft", 1), "seqft": ("seqft", 2)}, ("osft",)))
def test_two_updates_in_a_row_are_those_of_one_process(
    way: tuple[str, int], model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    method, stage = way
    given: dict[str, Any] = {"method": method, "train_also": ["norm", "lm_head"]} if method == "osft" else {}
    given |= {"method": method, "retention_file": str(rows), "save_strategy": "no", "learning_rate": 1e-3}
    start = model_folder
    for task in ("first", "second"):  # which begins at what the first has left behind
        one, two = tmp_path / f"one-{task}", tmp_path / f"two-{task}"
        alone = updated(start, rows, one, **given)
        (ended, record), (other, same) = parted(start, rows, two, stage, **given)
        assert (ended, other) == ("", "")
        assert apart(two, one) <= 1e-6
        assert without_pickles(two)
        assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
        assert (same["lines"], same["loss_curve"]) == ([], record["loss_curve"])
        for point, there in zip(record["loss_curve"], alone["loss_curve"], strict=True):
            assert point["loss"] == pytest.approx(there["loss"], abs=1e-3)
            assert point["learning_rate"] == there["learning_rate"]
        (after,), (expected,) = (one["scores"]["after"]["retention"].values() for one in (record, alone))
        assert after == pytest.approx(expected, rel=1e-2)
        assert len(record["leakage"]) == len(alone["leakage"])
        assert all(row["holds"] for row in record["leakage"])
        if method == "osft":
            report = lorica.audit(start, two)
            assert report.worst <= 1e-5, report.table()
        start = two


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_are_folded_when_the_step_is_done(stage: int, model_folder: Path, rows: Path, tmp_path: Path) -> None:
    """What looks at them next may look at the tensor alone."""

    class Look(TrainerCallback):
        worst, steps, folds = 0.0, 0, 0

        def on_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
            self.steps += 1
            for layer in protected_layers(model).values():
                assert bool(layer.core.any())
                wrong = (layer.matrix.double() - expected_weight(layer)).abs().max()
                self.worst = max(self.worst, float(wrong))

    def looked(*args: Any, **given: Any) -> dict[str, Any]:
        look, begun = Look(), MethodTrainer.__init__

        def with_look(self: Any, **kwargs: Any) -> None:
            begun(self, **kwargs | {"callbacks": [look, *kwargs["callbacks"]]})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MethodTrainer, "__init__", with_look)
            record = updated(*args, **given)
        return record | {"look": [look.steps, look.worst]}

    ends = parted(model_folder, rows, tmp_path / "out", stage, work=looked, max_steps=4, warmup_steps=0)
    assert [ended for ended, _ in ends] == ["", ""]
    for _, record in ends:
        steps, worst = record["look"]
        assert steps == 4
        assert worst <= 1e-7


@pytest.mark.reliability("R13", "R31")
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_signal_stops_both_and_they_go_on_to_the_same_bits(
    stage: int, model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    given = {"max_steps": 8, "train_also": ["norm"], "eval_file": str(rows), "eval_strategy": "steps", "eval_steps": 3}
    run = partial(parted, model_folder, rows, stage=stage, **given)
    assert [ended for ended, _ in run(tmp_path / "whole")] == ["", ""]

    def disturbed(*args: Any, **given: Any) -> dict[str, Any]:
        if os.environ["RANK"] == "0":
            return updated(*args, **given)
        with stopped_at("on_substep_end", 5, signal.SIGTERM):
            return updated(*args, **given)

    out = tmp_path / "out"
    ends = [ended for ended, _ in run(out, work=disturbed)]
    assert all(ended.startswith("Interrupted: stopped by SIGTERM; checkpoint: ") for ended in ends), ends
    assert (out / "checkpoint-5").is_dir()
    assert not (out / "checkpoint-6").exists()
    assert without_pickles(out)
    assert [ended for ended, _ in run(out, **GO_ON)] == ["", ""]
    assert same_bits(out, tmp_path / "whole")


def test_another_number_of_processes_goes_on_with_a_new_optimizer_alone(
    model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    parted(model_folder, rows, out, max_steps=4)
    shutil.rmtree(out / "checkpoint-4")
    (out / "lorica.json").unlink()
    (out / "model.safetensors").unlink()
    changed = {"allow_changed": ["world_size", "per_device_train_batch_size"], "max_steps": 4} | GO_ON
    changed |= {"fsdp": None, "deepspeed": zero(2)}
    ends = [ended for ended, _ in sharded(3, model_folder, rows, out, **changed)]
    assert "it lies in 2 parts, and DeepSpeed goes on with as many processes as it began with" in ends[0]
    ends = [ended for ended, _ in sharded(3, model_folder, rows, out, **changed, reset_optimizer=True)]
    assert ends == ["", "", ""]


@pytest.mark.slow
def test_a_checkpoint_of_copies_is_of_another_run(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    parted(model_folder, rows, tmp_path / "out", max_steps=4)
    (tmp_path / "out" / "lorica.json").unlink()
    told, _ = [ended for ended, _ in parted(model_folder, rows, tmp_path / "out", deepspeed=None, **GO_ON)]
    assert "--resume_from_checkpoint: deepspeed was " in told


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bfloat16": (
        {"train_also": ["norm"], "dtype": "bfloat16"},
        "would train in torch.bfloat16, which DeepSpeed does in",
    ),
    "what disagrees": ({"deepspeed": zero(2, gradient_clipping=7.0)}, "disagree (ds gradient_clipping=7.0 vs hf"),
    "method": ({"method": "gpm"}, "--deepspeed: --method gpm is not known to be right"),
}


@pytest.mark.parametrize("given", cases(REFUSED, ("bfloat16",)))
def test_what_is_refused(given: tuple[dict[str, Any], str], model_folder: Path, rows: Path, tmp_path: Path) -> None:
    options, message = given
    ends = [ended for ended, _ in parted(model_folder, rows, tmp_path / "out", max_steps=2, **options)]
    assert message in ends[0]


WAYS: dict[str, dict[str, Any]] = {
    "autocast": {"deepspeed": zero(2, torch_autocast={"enabled": True, "dtype": "bfloat16"}), "within": 2e-2},
    "bfloat16": {"dtype": "bfloat16", "within": 1e-2},
    "plain, bfloat16": {"method": "seqft", "dtype": "bfloat16", "within": 1e-2},
    "lean": {"memory_mode": "lean"},
    "not clipped": {"max_grad_norm": 0.0},
    "protecting what was learned": {"protect_learned": 0.1},
    "checkpointing": {"activation_checkpointing": True},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "rmsprop": {"optim": "rmsprop", "within": 1e-5},
    "not fused": {"optim": "adamw_torch"},
    "end to end": {"padding_free": True},
    "smoothed": {"label_smoothing_factor": 0.1},
    "other buckets": {"deepspeed": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}},
}


@pytest.mark.parametrize("given", cases(WAYS, ()))
def test_other_ways_of_training(given: dict[str, Any], model_folder: Path, rows: Path, tmp_path: Path) -> None:
    given, within, short = dict(given), given.get("within", 1e-6), {"max_steps": 4, "save_strategy": "no"}
    own = {name: given.pop(name) for name in ("within", "deepspeed") if name in given}
    updated(model_folder, rows, tmp_path / "one", **short | given)
    ends = parted(model_folder, rows, tmp_path / "two", **short | given | {"deepspeed": own.get("deepspeed", zero(2))})
    assert [ended for ended, _ in ends] == ["", ""]
    assert apart(tmp_path / "two", tmp_path / "one") <= within
    assert all(row["holds"] for row in ends[0][1]["leakage"])


STREAMS: dict[str, tuple[list[str], int, float]] = {  # what follows the gradients of few rows hangs on their rounding
    "plain": (["osft", "seqft"], 5, 1e-6),
    "penalties": (["ewc", "lwf"], 2, 1e-6),
    "forms": (["osft-remembering", "osft-rehearsing"], 2, 1e-5),
}
"""Methods, epochs, and how far apart weights may be."""


@pytest.mark.reliability("R30")
@pytest.mark.parametrize("way", cases(STREAMS, ("plain",)))
def test_a_stream_is_learned_as_by_one_process(
    way: tuple[list[str], int, float], stream: TaskStream, model_folder: Path, tmp_path: Path
) -> None:
    methods, epochs, within = way
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": epochs}
    alone = ran(stream, model_folder, tmp_path / "one", [], methods=methods, **batches)
    batches |= {"per_device_train_batch_size": 1}
    run = partial(ran, stream, model_folder, tmp_path / "two", methods=methods, deepspeed=zero(2), **batches)
    (_, ended, records), (silence, _, same) = on_two(run)
    assert (ended, silence, same) == ("", [], records)
    start = load_file(model_folder / "model.safetensors")
    for method, record, one in zip(methods, records, alone, strict=True):
        mine, theirs = model_of(tmp_path / "two", method), model_of(tmp_path / "one", method)
        assert max(float((mine[name] - theirs[name]).abs().max()) for name in theirs) <= within, method
        assert max(float((mine[name] - start[name]).abs().max()) for name in theirs) > 1e-4, method
        assert [name for name in LASTING if record[name] != one[name]] == [], method
    assert without_pickles(tmp_path / "two")


@pytest.mark.slow
def test_replay_is_that_of_copies(stream: TaskStream, model_folder: Path, tmp_path: Path) -> None:
    """Its rows do not fill the last step of an epoch, which one process fills up otherwise than two."""
    run = partial(ran, stream, model_folder, methods=["replay"], per_device_train_batch_size=1, num_train_epochs=2)
    (_, ended, copies), _ = on_two(partial(run, tmp_path / "copies"))
    (_, other, records), _ = on_two(partial(run, tmp_path / "zero", deepspeed=zero(2)))
    assert (ended, other) == ("", "")
    mine, theirs = model_of(tmp_path / "zero", "replay"), model_of(tmp_path / "copies", "replay")
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in theirs) <= 1e-6
    assert [name for name in LASTING if records[0][name] != copies[0][name]] == []


def test_a_stream_refuses_other_methods(stream: TaskStream, model_folder: Path, tmp_path: Path) -> None:
    run = partial(ran, stream, model_folder, tmp_path / "out", methods=["osft", "gpm"], deepspeed=zero(2))
    (_, told, _), (_, other, _) = on_two(run)
    assert "method 'gpm': --deepspeed: --method gpm is not known to be right" in told
    assert other.startswith("Elsewhere: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_launchers(launcher: str, model_folder: Path, rows: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((RECIPES / "zero2.yaml").read_text()) | {"num_processes": 2}
    (tmp_path / "zero2.yaml").write_text(yaml.safe_dump(recipe))
    shutil.copy(RECIPES / "zero2.json", tmp_path)
    command = torchrun(2, "-m", "lorica") if launcher == "torchrun" else [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "zero2.yaml", "-m", "lorica",
    ]  # fmt: skip
    command += ["train", "--model_name_or_path", str(model_folder), "--train_file", str(rows), "--max_steps", "3"]
    command += ["--output_dir", "out", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2"]
    command += ["--preset", "paper"]
    command += ["--deepspeed", "zero2.json"] if launcher == "torchrun" else []
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the constraint holds in all 14 weights") == 1
    record = json.loads((tmp_path / "out" / "lorica.json").read_text())
    assert "zero_optimization" in str(record["training_arguments"]["deepspeed"])
    assert lorica.audit(model_folder, tmp_path / "out").worst <= 1e-5, "products are in bfloat16, folds are not"
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
