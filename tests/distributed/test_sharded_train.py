"""``lorica train --fsdp full_shard``: the model lies in parts, and the update is that of one process."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, Trainer
from transformers.distributed import DistributedConfig

import lorica
import lorica.cli
import lorica.evaluation.evaluator
import lorica.training.sharded_state
import lorica.update
from lorica import processes
from lorica.config import build_config
from lorica.errors import Interrupted, LoricaError
from lorica.evaluation.generate import greedy_answers
from lorica.forecast.communication import Layout
from lorica.forecast.story import expected
from lorica.training.checkpoints import STATE, kept_bases, newest_complete
from lorica.training.sharded_state import ShardedState
from lorica.training.sharding import Sharding
from lorica.training.trust import PICKLES
from lorica.update import Update, train
from tests.builders import tiny, trainable
from tests.distributed.ranks import on_ranks
from tests.distributed.trainings import difference, load_sharded, save, weights_of, whole
from tests.reliability.interruptions import cases, quick_updates, signalled_in, stopped_at
from tests.training.conftest import byte_tokenizer, llama_folder, t5_folder  # noqa: F401

STEPS, ROWS = 22, 24
"""Of an update, and rows of each step."""

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"

GO_ON = {"resume_from_checkpoint": "true"}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_updates():
        yield


def updated(model: Path, rows: Path, out: Path, shares: int = 2, **given: Any) -> dict[str, Any]:
    """Update a model with so many rows a step, in as many shares as processes times accumulated batches."""
    options = {"max_steps": STEPS, "save_steps": 2, "save_total_limit": 20, "logging_steps": 1, "disable_tqdm": True}
    options |= {
        "model_name_or_path": str(model),
        "train_file": str(rows),
        "output_dir": str(out),
        "preset": "paper",
        "learning_rate": 1e-2,
    }
    options |= {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": ROWS // shares,
        "weight_decay": 0.1,
        "max_grad_norm": 0.2,
    }
    lines: list[str] = []
    record = train(build_config(options | given), say=lines.append)
    return {"lines": lines} | {name: record[name] for name in ("scores", "loss_curve", "leakage", "parent")}


def sharded(size: int, *args: Any, work: Any = updated, **given: Any) -> list[Any]:
    """Update in several processes whose model is sharded, and return of each how it ended, and its record."""

    def one(rank: int) -> list[Any]:
        try:
            return ["", work(*args, **{"shares": 2 * size, "fsdp": "full_shard"} | given)]
        except (LoricaError, Interrupted) as error:
            return [f"{type(error).__name__}: {error}", {}]

    return on_ranks(size, one)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def apart(one: Path, other: Path) -> float:
    """Return the largest relative difference of two models' weights, as norms."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


def same_bits(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def rows_in(folder: Path) -> Path:
    """Write rows of several lengths, so that processes have different numbers of tokens, and which fill all steps."""
    told = [{"prompt": f"{'very ' * (i % 4)}long {i}:", "completion": f" {'x' * (i % 7)} {i % 3}"} for i in range(48)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, told)))
    return folder / "rows.jsonl"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return rows_in(tmp_path)


@dataclass(frozen=True)
class Finished:
    """An update by one process, and the same by two whose model is sharded, with all its checkpoints."""

    model: Path
    rows: Path
    one: Path
    two: Path
    by_one: dict[str, Any]
    by_two: list[Any]

    def stopped_after(self, step: int, folder: Path) -> Path:
        """Copy what the two processes had left behind, had they been stopped after a step."""
        out = folder / "out"
        shutil.copytree(self.two, out)
        for path in out.iterdir():
            if path.name.startswith("checkpoint-") and int(path.name.split("-")[1]) > step:
                shutil.rmtree(path)
        for name in ("lorica.json", "model.safetensors"):
            (out / name).unlink()
        return out

    def goes_on(self, size: int, out: Path, **given: Any) -> list[str]:
        """Go on with it in so many processes, and return how each ended."""
        options = {"train_also": ["norm", "lm_head"], "retention_file": str(self.rows)} | GO_ON | given
        return [ended for ended, _ in sharded(size, self.model, self.rows, out, **options)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(llama_folder, model := folder / "model")
    config = model / "config.json"  # without dropout, of which each process would draw its own
    config.write_text(config.read_text().replace('"attention_dropout": 0.1', '"attention_dropout": 0.0'))
    rows = rows_in(folder)
    given: dict[str, Any] = {"train_also": ["norm", "lm_head"], "retention_file": str(rows)}
    by_one = updated(model, rows, folder / "one", **given)
    by_two = sharded(2, model, rows, folder / "two", **given)
    return Finished(model, rows, folder / "one", folder / "two", by_one, by_two)


@pytest.mark.reliability("R30")
def test_a_sharded_update_is_that_of_one_process(finished: Finished) -> None:
    (ended, record), (_, same) = finished.by_two
    alone = finished.by_one
    assert ended == ""
    assert apart(finished.two, finished.one) <= 1e-6
    assert {name: same[name] for name in ("scores", "loss_curve")} == {n: record[n] for n in ("scores", "loss_curve")}
    assert same["lines"] == []
    assert [line.split()[0] for line in record["lines"]] == [line.split()[0] for line in alone["lines"]]
    for row, other in zip(record["leakage"], alone["leakage"], strict=True):
        assert row["name"] == other["name"]
        assert row["holds"]
        assert max(row["master_leak_u"], row["master_leak_v"]) <= 1e-5
        assert row["relative_change"] == pytest.approx(other["relative_change"], rel=1e-4)
    for when in ("before", "after"):
        for name, score in record["scores"][when]["retention"].items():
            assert score == pytest.approx(alone["scores"][when]["retention"][name])
    for point, other in zip(record["loss_curve"], alone["loss_curve"], strict=True):
        assert point["loss"] == pytest.approx(other["loss"], abs=1e-3)


def test_what_it_leaves_behind_is_a_plain_folder_without_pickles(finished: Finished) -> None:
    assert names_in(finished.two) == names_in(finished.one)
    assert not [path for path in finished.two.rglob("*") if path.suffix in PICKLES or path.name == ".metadata"]
    mine, theirs = (json.loads((out / "config.json").read_text()) for out in (finished.two, finished.one))
    assert mine == theirs
    AutoModelForCausalLM.from_pretrained(finished.two)
    report = lorica.audit(finished.model, finished.two)
    assert report.holds, report.table()


@pytest.mark.slow
def test_it_goes_on_to_the_same_bits(finished: Finished, tmp_path: Path) -> None:
    out = finished.stopped_after(18, tmp_path)
    assert finished.goes_on(2, out) == ["", ""]
    assert same_bits(out, finished.two)


@contextmanager
def offloading() -> Iterator[None]:
    """Let FSDP2 offload in here, with nothing but the host to take it from: no memory can be page-locked then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sharding, "moves", property(lambda self: self.offload))
        patch.setattr(transformers.distributed.fsdp, "CPUOffloadPolicy", partial(CPUOffloadPolicy, pin_memory=False))
        yield


def test_offloaded_it_goes_on_to_the_same_bits(finished: Finished, tmp_path: Path) -> None:
    def work(*args: Any, **given: Any) -> dict[str, Any]:
        with offloading():
            return updated(*args, **given)

    out = finished.stopped_after(18, tmp_path)
    assert finished.goes_on(2, out, work=work, fsdp="full_shard offload") == ["", ""]
    assert same_bits(out, finished.two)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["osft", "seqft"])
def test_an_offloaded_update_is_that_of_one_process(method: str, finished: Finished, tmp_path: Path) -> None:
    def work(*args: Any, **given: Any) -> dict[str, Any]:
        with offloading(), stopped_at("on_step_begin", 15, signal.SIGTERM):
            return updated(*args, **given)

    given: dict[str, Any] = {"method": method, "fsdp": "full_shard", "fsdp_config": {"cpu_offload": True}}
    given |= {"train_also": ["norm", "lm_head"]} if method == "osft" else {"learning_rate": 3e-3}
    ends = sharded(2, finished.model, finished.rows, tmp_path / "out", work=work, **given)
    assert all(ended.startswith("Interrupted: stopped by SIGTERM") for ended, _ in ends), ends
    with offloading():
        (ended, record), _ = sharded(2, finished.model, finished.rows, tmp_path / "out", **given | GO_ON)
    assert ended == ""
    assert all(max(row["master_leak_u"], row["master_leak_v"]) <= 1e-5 for row in record["leakage"])
    updated(finished.model, finished.rows, tmp_path / "one", **given | {"fsdp": None, "fsdp_config": None})
    assert apart(tmp_path / "out", tmp_path / "one") <= 1e-6


@pytest.mark.reliability("R30")
@pytest.mark.parametrize("size", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on(size: int, finished: Finished, tmp_path: Path) -> None:
    """Three of them have parts of other lengths than two."""
    out = finished.stopped_after(2, tmp_path)
    changed = ["world_size", "per_device_train_batch_size"]
    assert finished.goes_on(size, out, allow_changed=changed) == [""] * size
    assert apart(out, finished.two) <= 1e-6


@pytest.mark.reliability("R13")
@pytest.mark.parametrize("which", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_process_stops_all_and_they_go_on_to_the_same_bits(
    which: int, finished: Finished, tmp_path: Path
) -> None:
    def disturbed(*args: Any, **given: Any) -> dict[str, Any]:
        if int(os.environ["RANK"]) != which:
            return updated(*args, **given)
        with stopped_at("on_substep_end", 19, signal.SIGTERM):
            return updated(*args, **given)

    out = finished.stopped_after(16, tmp_path)
    ends = finished.goes_on(2, out, work=disturbed)
    assert all(ended.startswith("Interrupted: stopped by SIGTERM; checkpoint: ") for ended in ends), ends
    assert {"checkpoint-18", "checkpoint-19"} <= names_in(out)
    assert "checkpoint-20" not in names_in(out)
    assert finished.goes_on(2, out) == ["", ""]
    assert same_bits(out, finished.two)


def killed_in(target: Any, name: str, call: int) -> Any:
    """Return what a run is done with in which process 1 is killed when it calls a function for the n-th time."""

    def disturbed(*args: Any, **given: Any) -> dict[str, Any]:
        if os.environ["RANK"] == "1":
            with signalled_in(target, name, signal.SIGKILL, call):
                return updated(*args, **given)
        try:
            return updated(*args, **given)
        except LoricaError as error:
            (args[2].parent / "ended").write_text(str(error))
            raise

    return disturbed


PLACES = {
    "passes": (Trainer, "training_step", 5),
    "scores": (lorica.evaluation.evaluator, "exact_match", 2),
    "writes what trains": (lorica.training.sharded_state, "save", 3),
    "writes the optimizer": (lorica.training.sharded_state, "save", 4),
    "reads what trained": (lorica.training.sharded_state, "load", 1),
    "writes the model": (lorica.update, "whole_weights", 1),
}
"""Where a process can be killed while the others wait for it."""


@pytest.mark.reliability("R1")
@pytest.mark.parametrize("place", cases(PLACES, ()))
def test_where_one_process_is_killed_all_end_and_go_on_from_what_is_whole(
    place: tuple[Any, str, int], finished: Finished, tmp_path: Path
) -> None:
    out = finished.stopped_after(16, tmp_path)
    with pytest.raises(AssertionError, match=r"^process 1: no result$"):
        finished.goes_on(2, out, work=killed_in(*place))
    assert (tmp_path / "ended").read_text() == "another process has ended"
    assert not (out / "lorica.json").exists()
    assert finished.goes_on(2, out) == ["", ""]
    assert same_bits(out, finished.two)


@pytest.mark.reliability("R6")
def test_a_full_disk_of_one_process_stops_all_with_one_message(finished: Finished, tmp_path: Path) -> None:
    def full(*args: Any, **given: Any) -> dict[str, Any]:
        def refused(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.MonkeyPatch.context() as patch:
            if os.environ["RANK"] == "1":
                patch.setattr(HuggingFaceStorageWriter, "write_data", refused)
            return updated(*args, **given)

    out = finished.stopped_after(18, tmp_path)
    first, second = finished.goes_on(2, out, work=full)
    assert first == "Elsewhere: process 1 could not go on"
    assert second.startswith("CannotWrite: ")
    assert "checkpoint-18, is whole: make room and go on with --resume_from_checkpoint true" in second
    assert "checkpoint-20" not in names_in(out)


@pytest.mark.reliability("R1", "R3", "R4", "R5")
def test_checkpoints_that_are_not_whole_are_passed_over(finished: Finished, tmp_path: Path) -> None:
    out = finished.stopped_after(18, tmp_path)
    next((out / "checkpoint-18" / "training_state" / "optimizer.parts").iterdir()).unlink()
    (part,) = (out / "checkpoint-16" / "trained").glob("shard-00002-*")
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    told: list[str] = []
    assert newest_complete(out, told.append) == out / "checkpoint-14"
    assert [line.split(" is passed over")[0] for line in told] == [
        f"notice: {out / 'checkpoint-18'}",
        f"notice: {out / 'checkpoint-16'}",
    ]
    assert newest_complete(out, told.append, reset_optimizer=True) == out / "checkpoint-18"
    (out / "bases" / "process-1.safetensors").unlink()
    assert newest_complete(out, told.append) is None
    assert "process-1.safetensors, the bases that its weights were trained in, is missing" in told[-1]


def test_a_checkpoint_of_another_model_is_refused(finished: Finished, tmp_path: Path) -> None:
    """It holds what trains alone."""
    out = finished.stopped_after(18, tmp_path)
    shutil.copytree(finished.model, tmp_path / "model")
    weight = load_file(tmp_path / "model" / "model.safetensors")
    weight["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weight, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    first, second = replace(finished, model=tmp_path / "model").goes_on(2, out)
    assert "--resume_from_checkpoint: sha256 of the model was " in first
    assert second == "Elsewhere: process 0 could not go on"


@pytest.mark.slow
def test_a_new_optimizer_goes_on_where_its_state_is_lost(finished: Finished, tmp_path: Path) -> None:
    out = finished.stopped_after(18, tmp_path)
    shutil.rmtree(out / "checkpoint-18" / "training_state" / "optimizer.parts")
    assert finished.goes_on(2, out, reset_optimizer=True) == ["", ""]
    assert 1e-6 < apart(out, finished.two) < 0.1


@pytest.mark.reliability("R31")
def test_taking_an_optimizers_state_over_changes_no_weight(finished: Finished) -> None:
    """A new one takes a step for it."""
    place = finished.two / "checkpoint-10"

    def work(rank: int) -> list[Any]:
        model = AutoModelForCausalLM.from_pretrained(finished.model, distributed_config=DistributedConfig(fsdp_size=2))
        lorica.protect(model, lorica.plan(model, 0.25), kept=kept_bases(place))
        state = ShardedState(model)
        assert state.load(place)
        before = weights_of(model)
        optimizer = AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        state.load_optimizer(optimizer, place / STATE)
        steps = {float(one["step"]) for one in optimizer.state.values()}
        moved = [bool((whole(one["exp_avg"]) != 0).any()) for one in optimizer.state.values()]
        return [difference(before, weights_of(model)), sorted(steps), all(moved)]

    assert on_ranks(2, work) == [[0.0, [10.0], True]] * 2


def run_in(folder: Path, model: Path, size: int = 2, within: float = 1e-6, **given: Any) -> dict[str, Any]:
    """Update by one process and by several with a sharded model, compare, and return the record of these."""
    short = {"max_steps": 3, "save_strategy": "no", "retention_file": str(rows_in(folder))} | given
    shared = {"fsdp": short.pop("fsdp", "full_shard")}
    updated(model, rows_in(folder), folder / "one", **short)
    ends = [ended for ended, _ in sharded(size, model, rows_in(folder), folder / "several", **short | shared)]
    assert ends == [""] * size
    assert apart(folder / "several", folder / "one") <= within
    record = json.loads((folder / "several" / "lorica.json").read_text())
    expected = json.loads((folder / "one" / "lorica.json").read_text())
    (after,), (alone,) = (one["scores"]["after"]["retention"].values() for one in (record, expected))
    assert after == pytest.approx(alone, rel=1e-2)
    assert len(record["leakage"]) == len(expected["leakage"])
    assert all(row["holds"] for row in record["leakage"])
    return record


WAYS: dict[str, dict[str, Any]] = {  # what is rounded to 8 bits, or divided by roots of what is nearly 0, is apart
    "plain fine-tuning": {"method": "seqft"},
    "bfloat16": {"dtype": "bfloat16", "within": 1e-2},
    "lean": {"memory_mode": "lean"},
    "activation": {"source": "activation", "calibration": "random", "within": 1e-1},  # each calibrates it with its own
    "checkpointing": {"activation_checkpointing": True},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "sgd without momentum": {"optim": "sgd"},
    "rmsprop": {"optim": "rmsprop", "within": 1e-5},
    "adagrad": {"optim": "adagrad", "within": 1e-5},
    "not fused": {"optim": "adamw_torch"},
    "end to end": {"padding_free": True},
    "mixed": {"bf16": True, "use_cpu": True, "within": 2e-2},
}


@pytest.mark.parametrize("given", cases(WAYS, ()))
def test_other_ways_of_training(given: dict[str, Any], finished: Finished, tmp_path: Path) -> None:
    run_in(tmp_path, finished.model, **given)


def nodes_of_two(*args: Any, **given: Any) -> dict[str, Any]:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return updated(*args, **given)


@pytest.mark.slow
def test_copies_of_a_sharded_model(finished: Finished, tmp_path: Path) -> None:
    """A copy on each of two nodes; they go on as one on a node of four."""
    out = finished.stopped_after(2, tmp_path)
    given = {"allow_changed": ["world_size", "per_device_train_batch_size"], "fsdp": "hybrid_shard"}
    assert finished.goes_on(4, out, work=nodes_of_two, **given) == [""] * 4
    assert apart(out, finished.two) <= 1e-6
    assert names_in(out / "bases") == {"bases.safetensors", "process-1.safetensors"}


@pytest.mark.slow
def test_copies_write_what_they_hold_once(finished: Finished, tmp_path: Path) -> None:
    given = {"save_steps": 1, "max_steps": 2, "fsdp": "hybrid_shard"}
    ends = sharded(4, finished.model, finished.rows, tmp_path / "out", work=nodes_of_two, **given)
    assert [ended for ended, _ in ends] == [""] * 4
    out = tmp_path / "out"
    assert names_in(out / "bases") == {"bases.safetensors", "process-1.safetensors"}
    held = [path.stat().st_size for path in (finished.two / "bases").iterdir()]
    assert sum(path.stat().st_size for path in (out / "bases").iterdir()) <= 1.1 * sum(held)
    for folder in ("trained", "training_state/optimizer.parts"):
        assert sum(path.stat().st_size for path in (out / "checkpoint-2" / folder).iterdir()) <= 1.2 * sum(
            path.stat().st_size for path in (finished.two / "checkpoint-2" / folder).iterdir()
        )
    (out / "lorica.json").unlink()
    shutil.rmtree(out / "checkpoint-2")
    (out / "model.safetensors").rename(tmp_path / "whole.safetensors")
    given |= GO_ON
    ends = sharded(4, finished.model, finished.rows, out, work=nodes_of_two, **given)
    assert [ended for ended, _ in ends] == [""] * 4
    mine, theirs = weights(out), load_file(tmp_path / "whole.safetensors")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_one_update_after_the_other(finished: Finished, tmp_path: Path) -> None:
    """The second begins at what the first has left behind."""
    record = run_in(tmp_path, finished.two)
    assert record["parent"]["updates"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_a_model_with_an_encoder(size: int, t5_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(t5_folder, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"dropout_rate": 0.1', '"dropout_rate": 0.0'))
    run_in(tmp_path, tmp_path / "model", size)


@pytest.mark.slow
def test_scores_while_training_choose_the_best(finished: Finished, tmp_path: Path) -> None:
    scored = {"eval_file": str(finished.rows), "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    scored |= {"save_steps": 1, "load_best_model_at_end": True, "greater_is_better": True, "warmup_steps": 0}
    run_in(tmp_path, finished.model, within=1e-5, train_also=["norm", "lm_head"], **scored)
    states = [
        json.loads((tmp_path / name / "checkpoint-3" / "trainer_state.json").read_text()) for name in ("one", "several")
    ]
    assert states[0]["best_global_step"] == states[1]["best_global_step"] == 1
    losses = [[point["eval_loss"] for point in state["log_history"] if "eval_loss" in point] for state in states]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_a_mistake_is_told_by_one_process(finished: Finished, tmp_path: Path) -> None:
    (told, _), (other, _) = sharded(2, finished.model, finished.rows, tmp_path / "out", method="ewc")
    assert told.startswith("LoricaError: --fsdp: --method ewc needs whole weights")
    assert other == "Elsewhere: process 0 could not go on"


def test_one_process_alone_is_not_sharded(finished: Finished, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match="--fsdp needs several processes: torchrun --nproc_per_node N"):
        updated(finished.model, finished.rows, tmp_path / "out", fsdp=True)


LAUNCHED = {"VERSION": "2", "RESHARD_AFTER_FORWARD": "true", "OFFLOAD_PARAMS": "false", "MIN_NUM_PARAMS": "100000000"}
LAUNCHED |= {
    "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "STATE_DICT_TYPE": "FULL_STATE_DICT",
    "SYNC_MODULE_STATES": "true",
}
LAUNCHED |= {
    "CPU_RAM_EFFICIENT_LOADING": "false",
    "SHARDING_STRATEGY": "FULL_SHARD",
    "ACTIVATION_CHECKPOINTING": "false",
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [pytest.param({"OFFLOAD_PARAMS": "true"}, "", marks=pytest.mark.slow), ({"VERSION": "1"}, "version = 1 is not")],
)
def test_the_launchers_settings_count(
    changed: dict[str, str], message: str, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in (LAUNCHED | changed).items():
        monkeypatch.setenv(f"FSDP_{name}", value)

    def launched(*args: Any, fsdp: str, **given: Any) -> dict[str, Any]:
        record = updated(*args, **given)
        assert os.environ["ACCELERATE_USE_FSDP"] == "true"
        return record

    given = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    (ended, _), _ = sharded(2, finished.model, finished.rows, tmp_path / "out", work=launched, **given)
    assert message in ended
    if not message:
        assert (tmp_path / "out" / "checkpoint-1" / "trained").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_take_it(launcher: str, finished: Finished, tmp_path: Path) -> None:
    start = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        "accelerate": ["-m", "accelerate.commands.launch", "--num_processes", "2"],
    }[launcher]
    if launcher == "accelerate":
        start += ["--config_file", str(RECIPES / "fsdp2.yaml")]
    given = {"model_name_or_path": finished.model, "train_file": finished.rows, "output_dir": tmp_path / "out"}
    given |= {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 4}
    given |= {"fsdp": "full_shard"} if launcher == "torchrun" else {}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, *start, "-m", "lorica", "train", *words],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the constraint holds in all 14 weights") == 1
    assert done.stdout.count(" expected in each process, in ") == 1
    assert (tmp_path / "out" / "checkpoint-2" / "trained").is_dir()


def test_the_disk_that_is_foreseen_is_what_checkpoints_take(finished: Finished, tmp_path: Path) -> None:
    given = {"model_name_or_path": str(finished.model), "train_file": str(finished.rows), "preset": "paper"}
    made = Update(build_config(given | {"output_dir": str(tmp_path / "out"), "train_also": ["norm", "lm_head"]}))
    disk = expected(made.config, made.inputs, Layout(2)).disk
    parts = list((finished.two / "checkpoint-22").rglob("shard-*"))
    tensors = [tensor for path in parts for tensor in load_file(path).values()]
    assert disk.checkpoint == pytest.approx(sum(tensor.nbytes for tensor in tensors), rel=1e-2)
    assert disk.checkpoint < disk.model


@pytest.mark.slow
def test_copies_in_every_process_go_on_in_another_number_too(finished: Finished, tmp_path: Path) -> None:
    given = {"train_also": ["norm", "lm_head"], "retention_file": str(finished.rows), "fsdp": "false"}
    with stopped_at("on_step_begin", 4, signal.SIGTERM), pytest.raises(Interrupted):
        updated(finished.model, finished.rows, tmp_path / "out", **given | {"fsdp": None})
    changed = {"allow_changed": ["world_size", "per_device_train_batch_size"]}
    ends = sharded(2, finished.model, finished.rows, tmp_path / "out", **given | GO_ON | changed)
    assert [ended for ended, _ in ends] == ["", ""]
    assert apart(tmp_path / "out", finished.one) <= 1e-6


def test_texts_that_come_near_the_last_position(tmp_path: Path) -> None:
    """Of 32 positions: a process whose text has ended there cannot go on with another whose text has not."""
    folder, prompts = save("gpt2", tmp_path), [[5, 6, 7]] * 3 + [[5] * 30]

    def texts(model: Any) -> list[str]:
        with processes.working_together():
            found = greedy_answers(model, byte_tokenizer(), prompts, max_new_tokens=8, batch_size=2)
        return [one.text for one in found]

    assert on_ranks(2, lambda rank: texts(load_sharded(folder, 2).eval())) == [texts(tiny("gpt2"))] * 2


def test_a_process_that_is_left_alone_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def left(*_: Any) -> None:
        raise processes.Ended("another process has ended")

    monkeypatch.setattr(lorica.cli, "app", left)
    monkeypatch.setattr(lorica.cli.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sys, "argv", ["lorica", "train"])
    with pytest.raises(SystemExit):
        lorica.cli.main()
    assert capsys.readouterr().err == "lorica: another process has ended\n"
