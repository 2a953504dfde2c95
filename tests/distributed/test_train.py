"""``lorica train`` on several processes: one run, of which the first process tells."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import lorica.update
from lorica.config import build_config
from lorica.constrain.bases import Bases
from lorica.errors import Interrupted, LoricaError
from lorica.methods.rehearsal import Rehearsal
from lorica.update import train
from tests.distributed.ranks import on_ranks, torchrun
from tests.methods.little_text import little_text  # noqa: F401
from tests.reliability.interruptions import stopped_at
from tests.training.conftest import llama_folder  # noqa: F401

STEPS = 6


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows of several lengths, so that processes have different numbers of tokens."""
    told = [{"prompt": f"{'very ' * (i % 4)}long {i}:", "completion": f" {'x' * (i % 7)} {i % 3}"} for i in range(50)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, told)))
    return tmp_path / "rows.jsonl"


def updated(model: Path, rows: Path, out: Path, rows_at_once: int, lines: list[str], **given: Any) -> dict[str, Any]:
    options = {"max_steps": STEPS, "save_steps": 2, "save_total_limit": 10, "logging_steps": 1, "disable_tqdm": True}
    options |= {"preset": "paper", "model_name_or_path": str(model), "train_file": str(rows), "output_dir": str(out)}
    options |= {"per_device_train_batch_size": rows_at_once, "retention_file": str(rows)}
    return train(build_config(options | given), say=lines.append)


def on_two(work: Any, *args: Any, **given: Any) -> list[Any]:
    """Do something in two processes, and return of each what it told, how it ended, and its record."""

    def one(rank: int) -> list[Any]:
        lines: list[str] = []
        try:
            record = work(*args, lines=lines, **given)
        except (LoricaError, Interrupted) as error:
            return [lines, f"{type(error).__name__}: {error}", {}]
        return [lines, "", {name: record[name] for name in ("scores", "loss_curve", "rejected")}]

    return on_ranks(2, one)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


@pytest.mark.reliability("R30")
def test_two_processes_train_as_one_does(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    told: list[str] = []
    one = updated(model_folder, rows, tmp_path / "one", 4, told, gradient_accumulation_steps=2)
    (lines, ended, record), (silence, _, same) = on_two(
        updated, model_folder, rows, tmp_path / "two", 2, gradient_accumulation_steps=2
    )
    assert ended == ""
    mine, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in theirs) <= 1e-6
    for point, other in zip(record["loss_curve"], one["loss_curve"], strict=True):
        assert point["loss"] == pytest.approx(other["loss"], abs=1e-3)
    for when in ("before", "after"):
        assert record["scores"][when]["retention"]["rows"] == pytest.approx(one["scores"][when]["retention"]["rows"])
    assert same == record
    assert silence == []
    assert [line.split()[0] for line in lines] == [line.split()[0] for line in told]
    whole = json.loads((tmp_path / "two" / "lorica.json").read_text())
    assert whole["leakage"]
    assert (tmp_path / "two" / "report.html").exists()


@pytest.mark.reliability("R13")
@pytest.mark.parametrize("which", [0, 1])
def test_a_signal_to_one_process_stops_both_after_one_step(
    which: int, model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    run = partial(updated, model_folder, rows, rows_at_once=2)
    on_two(run, tmp_path / "whole")

    def disturbed(lines: list[str]) -> dict[str, Any]:
        if int(os.environ["RANK"]) != which:
            return run(tmp_path / "out", lines=lines)
        with stopped_at("on_step_begin", 3, signal.SIGTERM):
            return run(tmp_path / "out", lines=lines)

    ends = [ended for _, ended, _ in on_two(disturbed)]
    assert all(ended.startswith("Interrupted: stopped by SIGTERM") for ended in ends), ends
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert [ended for _, ended, _ in on_two(run, tmp_path / "out", resume_from_checkpoint="true")] == ["", ""]
    mine, theirs = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("given", [{}, {"rehearse": 0.5}], ids=["dropout", "dropout and rehearsed texts"])
def test_what_each_process_draws_goes_on_where_it_was(
    given: dict[str, Any], llama_folder: Path, rows: Path, tmp_path: Path
) -> None:
    run = partial(updated, llama_folder, rows, rows_at_once=2, attn_implementation="eager", **given)
    on_two(run, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    for name in ("lorica.json", "model.safetensors", "checkpoint-6", "checkpoint-4"):
        path = tmp_path / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    on_two(run, tmp_path / "out", resume_from_checkpoint="true")
    mine, theirs = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_processes_rehearse_different_texts_and_stay_one_model(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    def watched(rank: int) -> list[Any]:
        drawn: list[list[int]] = []
        cores: list[float] = []
        draw, trained = Rehearsal._draw, lorica.update.fit

        def noted(self: Rehearsal, count: int) -> list[int]:
            found = draw(self, count)
            if len(self.texts) > 1:  # the forecast's has one
                drawn.append(found)
            return found

        def fit(model: Any, *args: Any, **given: Any) -> Any:
            log = trained(model, *args, **given)
            cores.extend(float(p.detach().double().sum()) for p in model.parameters() if p.requires_grad)
            return log

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Rehearsal, "_draw", noted)
            patch.setattr(lorica.update, "fit", fit)
            updated(model_folder, rows, tmp_path / "out", 2, [], rehearse=1.0, rehearse_weight=100.0)
        return [drawn, cores]

    (drawn, cores), (others, same) = on_ranks(2, watched)
    assert len(drawn) == len(others) == STEPS
    assert all(one != two for one, two in zip(drawn, others, strict=True))
    assert any(cores)
    assert cores == same, "else a process has followed its own texts alone"


def test_a_mistake_is_told_by_one_process(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": 3}\n')
    first, second = on_two(updated, model_folder, tmp_path / "bad.jsonl", tmp_path / "out", 2)
    assert "bad.jsonl:1" in first[1]
    assert second[1].startswith("Elsewhere: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.reliability("R16")
def test_a_loss_that_is_no_number_in_one_process_stops_both(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    from lorica.methods.osft import OSFT

    class Spoiled(OSFT):
        steps = 0

        def penalty(self, model: Any, *given: Any) -> Any:
            self.steps += 1
            spoiled = self.steps == 3 and int(os.environ["RANK"]) == 1
            return torch.tensor(float("nan")) if spoiled else None

    def spoiled(lines: list[str]) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lorica.update.build_method", lambda name, own, given: Spoiled.build(own))
            return updated(model_folder, rows, tmp_path / "out", 2, lines)

    first, second = on_two(spoiled)
    assert first[1] == "Elsewhere: process 1 could not go on"
    assert second[1].startswith("Diverged: the loss is nan at step 3, rows ")
    assert second[1].endswith("checkpoint-2")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer_in_backward": True}, "--optimizer_in_backward is for one process"),
        ({"deepspeed": "x.json"}, "x.json: cannot read the DeepSpeed configuration"),
        ({"ddp_timeout": 60}, "--ddp_timeout is not taken"),
        ({"accelerator_config": {"even_batches": False}}, "--accelerator_config: even_batches"),
        ({"train_sampling_strategy": "group_by_length"}, "--train_sampling_strategy group_by_length: each process"),
    ],
)
def test_what_several_processes_cannot_do(
    given: dict[str, Any], message: str, model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    (_, told, _), (_, other, _) = on_two(updated, model_folder, rows, tmp_path / "out", 2, **given)
    assert message in told
    assert other.startswith("Elsewhere: ")


def test_the_loss_while_training_is_that_of_one_process(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    scored = {"eval_file": str(rows), "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 5}

    def losses(out: Path, lines: list[str], rows_at_once: int) -> list[float]:
        record = updated(model_folder, rows, out, rows_at_once, lines, **scored)
        state = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())
        assert record["loss_curve"]
        return [point["eval_loss"] for point in state["log_history"] if "eval_loss" in point]

    expected = losses(tmp_path / "one", [], 4)
    told = on_ranks(2, lambda rank: losses(tmp_path / "two", [], 2))
    assert told[0] == told[1] == pytest.approx(expected, abs=2e-2)  # batches weigh alike, whatever they hold


def test_one_process_writes_a_checkpoint(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    def saves(rank: int) -> int:
        count = 0

        def counted(*args: Any, **given: Any) -> None:
            nonlocal count
            count += 1
            saved(*args, **given)

        saved = LlamaForCausalLM.save_pretrained
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LlamaForCausalLM, "save_pretrained", counted)
            updated(model_folder, rows, tmp_path / "out", 2, [])
        return count

    assert on_ranks(2, saves) == [4, 0]  # three checkpoints and the model


def test_bases_that_differ_stop_the_training(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    def disturbed(lines: list[str]) -> dict[str, Any]:
        made = Bases.of

        def flipped(*args: Any) -> Any:
            out, inp = made(*args)
            return out.mapped(torch.neg) if os.environ["RANK"] == "1" else out, inp

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Bases, "of", flipped)
            return updated(model_folder, rows, tmp_path / "out", 2, lines)

    assert all("the processes have made different bases" in ended for _, ended, _ in on_two(disturbed))


@pytest.mark.slow
def test_torchrun(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    command = torchrun(2, "-m", "lorica", "train", "--model_name_or_path", str(model_folder))
    command += ["--train_file", str(rows), "--output_dir", str(tmp_path / "out")]
    command += ["--per_device_train_batch_size", "2", "--max_steps", "3", "--rehearse_tokens", "256"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the constraint holds in all 14 weights") == 1
