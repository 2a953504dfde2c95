"""``lorica run`` on several processes: one run, of which the first process tells and writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorica.experiments.cell
import lorica.experiments.setup
from lorica import processes
from lorica.data.stream import TaskStream
from lorica.errors import Interrupted, LoricaError
from lorica.evaluation.choices import choice_scores
from lorica.experiments.abilities import FromHarness
from lorica.methods import METHODS
from lorica.methods.seqft import SeqFT
from tests.builders import tiny
from tests.distributed.ranks import on_ranks
from tests.experiments import conftest
from tests.experiments.conftest import Write, llama_folder, write  # noqa: F401
from tests.experiments.test_classifier import bert_folder, labelled  # noqa: F401
from tests.methods.little_text import little_text  # noqa: F401
from tests.reliability.interruptions import quick_updates, stopped_at
from tests.training.conftest import byte_tokenizer

QUICK = ["seqft", "osft", "lora", "ewc", "replay"]
"""Methods of the quick form."""

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.0},
    "inclora": {"dropout": 0.0},
    "olora": {"dropout": 0.0},
    "ewc": {"fisher_rows": 8},
    "ogd": {"gradients_per_task": 4},
    "osft-gradient": {"k": 4, "refresh": 1},
}
FORMS: dict[str, dict[str, Any]] = {
    "osft-block": {"constraint": "block"},
    "osft-remembering": {"source": "activation", "remember_tasks": True, "remember_rows": 4, "protect_learned": 0.1},
    "osft-lean": {"memory_mode": "lean"},
    "osft-rehearsing": {"rehearse": 0.5},
}
"""Further forms of ``osft``, by the name of their settings."""

SETTINGS = {
    name: {"method": name, "learning_rate": 1e-3, "options": OPTIONS.get(name, {})} for name in METHODS
} | {
    name: {"method": "osft", "learning_rate": 1e-3, "options": options} for name, options in FORMS.items()
}  # fmt: skip
TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3}
LASTING = ("scores", "retention", "metrics", "row_scores", "carried_bytes", "intervals", "model_parameters", "label")
BITWISE = (*LASTING, "leakage")

Record = dict[str, Any]
Outcome = tuple[list[str], str, list[Record]]


@pytest.fixture
def stream(write: Write, tmp_path: Path) -> TaskStream:
    """Two tasks, the first with answers of several lengths, the second answered by choosing; a held-out ability."""
    first, second = (
        {"name": name, "train_file": f"{name}.train.jsonl", "test_file": f"{name}.test.jsonl"}
        for name in ("first", "second")
    )
    made = write(
        tasks=[first, second | {"choices": ["a", "b"], "scoring": "choose"}], methods=SETTINGS, training=TRAINING
    )
    rows = [{"prompt": f"first {i}?", "completion": "a" * (i % 5 + 1)} for i in range(8)]
    (tmp_path / "stream" / "first.train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return made


def ran(stream: TaskStream, model: Path, out: Path, lines: list[str], **options: Any) -> list[Record]:
    """Run methods and keep their models."""
    with quick_updates():
        records, told = conftest.run(stream, model, out, **{"save_models": True} | options)
    lines += told
    return records


def on_two(work: Callable[..., list[Record]]) -> list[Outcome]:
    """Do something in two processes, and return of each what it told, how it ended, and its records."""

    def one(rank: int) -> Any:
        lines: list[str] = []
        try:
            records = work(lines=lines)
        except (LoricaError, Interrupted) as error:
            return [lines, f"{type(error).__name__}: {error}", []]
        return [lines, "", [{name: record[name] for name in BITWISE} for record in records]]

    return [tuple(told) for told in on_ranks(2, one)]  # type: ignore[misc]


def weights(out: Path, method: str) -> dict[str, torch.Tensor]:
    return load_file(out / method / "model" / "model.safetensors")


def same_files(one: Path, other: Path, method: str) -> None:
    mine, theirs = weights(one, method), weights(other, method)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    answers = [(out / method / "predictions.jsonl").read_bytes() for out in (one, other)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("methods", "parts"),
    [
        (QUICK, 1),
        pytest.param([*METHODS][::-1], 1, marks=pytest.mark.slow),
        # These follow a subspace whose last directions hang on how the gradient of a batch is rounded.
        pytest.param([*FORMS], 2, marks=pytest.mark.slow),
    ],
    ids=["quick", "methods", "forms"],
)
def test_two_processes_run_as_one_does(
    methods: list[str], parts: int, stream: TaskStream, model_folder: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    batches = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
    alone = ran(stream, model_folder, tmp_path / "one", told, methods=methods, **batches)
    run = partial(ran, stream, model_folder, tmp_path / "two", methods=methods, per_device_train_batch_size=2)
    (lines, ended, records), (silence, _, same) = on_two(run)
    assert ended == ""
    start = load_file(model_folder / "model.safetensors")
    for method, record, one in zip(methods, records, alone, strict=True):
        mine, theirs = weights(tmp_path / "two", method), weights(tmp_path / "one", method)
        assert max(float((mine[name] - theirs[name]).abs().max()) for name in theirs) <= 1e-6, method
        assert max(float((mine[name] - start[name]).abs().max()) for name in theirs) > 1e-4, method
        assert [name for name in LASTING if record[name] != one[name]] == [], method
        assert not (tmp_path / "two" / method / "cell" / "stage-2" / "model").exists()
    assert same == records
    assert silence == []
    assert [line.split("[")[0] for line in lines] == [line.split("[")[0] for line in told]


@pytest.mark.reliability("R13")
@pytest.mark.parametrize("which", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_signal_to_one_process_stops_both_and_the_same_command_goes_on(
    which: int, stream: TaskStream, model_folder: Path, tmp_path: Path
) -> None:
    run = partial(ran, stream, model_folder, methods="ewc", per_device_train_batch_size=1)
    on_two(partial(run, tmp_path / "whole"))

    def disturbed(lines: list[str]) -> list[Record]:
        if int(os.environ["RANK"]) != which:
            return run(tmp_path / "out", lines=lines)
        with stopped_at("on_step_begin", 3, signal.SIGTERM):
            return run(tmp_path / "out", lines=lines)

    ends = [ended for _, ended, _ in on_two(disturbed)]
    assert all(ended.startswith("Interrupted: stopped by SIGTERM; what is done is kept, also of") for ended in ends)
    checkpoints = [path.name for path in (tmp_path / "out").rglob("checkpoint-*")]
    assert checkpoints == ["checkpoint-3"]
    assert [ended for _, ended, _ in on_two(partial(run, tmp_path / "out"))] == ["", ""]
    same_files(tmp_path / "out", tmp_path / "whole", "ewc")
    assert not list((tmp_path / "out").rglob("task-*"))


@pytest.mark.reliability("R11")
@pytest.mark.parametrize("which", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "call"),
    [("_learn", 2), pytest.param("_remove_tasks", 3, marks=pytest.mark.slow)]
    + [pytest.param(name, 2, marks=pytest.mark.slow) for name in ("_keep", "_score")],
)
def test_a_killed_process_ends_both_and_the_same_command_goes_on(
    name: str, call: int, which: int, stream: TaskStream, model_folder: Path, tmp_path: Path
) -> None:
    run = partial(ran, stream, model_folder, methods="replay", per_device_train_batch_size=2)
    on_two(partial(run, tmp_path / "whole"))
    real = getattr(lorica.experiments.cell.CellRun, name)
    calls = []

    def killed(self: Any, *args: Any, **given: Any) -> Any:
        calls.append(name)
        if len(calls) == call and int(os.environ["RANK"]) == which:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args, **given)

    def disturbed(lines: list[str]) -> list[Record]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lorica.experiments.cell.CellRun, name, killed)
            return run(tmp_path / "out", lines=lines)

    with pytest.raises(AssertionError, match=f"^process {which}: no result$"):
        on_two(disturbed)
    (_, ended, (record,)), (_, other, _) = on_two(partial(run, tmp_path / "out"))
    assert (ended, other) == ("", "")
    same_files(tmp_path / "out", tmp_path / "whole", "replay")
    whole = json.loads((tmp_path / "whole" / "replay" / "run.json").read_text())
    assert whole["processes"] == 2
    assert {field: record[field] for field in BITWISE} == {field: whole[field] for field in BITWISE}


def test_a_rate_with_which_one_process_fails_is_left_out_by_both(
    stream: TaskStream, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(self: Any, model: Any, *given: Any) -> Any:
        return torch.tensor(float("nan")) if self.spoils and int(os.environ.get("RANK", 0)) == 1 else None

    built = lorica.experiments.cell.CellRun._begin

    def begun(self: Any, *given: Any) -> None:
        built(self, *given)
        self.method.spoils = self.cell.learning_rate == 2e-3

    monkeypatch.setattr(SeqFT, "penalty", spoiled)
    monkeypatch.setattr(lorica.experiments.cell.CellRun, "_begin", begun)
    run = partial(ran, stream, model_folder, methods="seqft", validation_fraction=0.5)
    (_, ended, _), (_, other, _) = on_two(partial(run, tmp_path / "out", learning_rates=[1e-3, 2e-3]))
    assert (ended, other) == ("", "")
    sweep = json.loads((tmp_path / "out" / "seqft" / "sweep" / "sweep.json").read_text())
    assert sweep["selected"] == 1e-3
    assert "the loss is nan at step 1" in sweep["validation"]["0.002"]["diverged"]
    assert sweep["validation"]["0.001"]["diverged"] is None
    (_, ended, _), (_, other, _) = on_two(partial(run, tmp_path / "all", learning_rates=[2e-3]))
    assert ended.startswith("Diverged: seqft, seed 0, task first: the loss is nan at step 1")
    assert other == "Elsewhere: process 0 could not go on"


def test_a_mistake_is_told_by_one_process(stream: TaskStream, model_folder: Path, tmp_path: Path) -> None:
    run = partial(ran, stream, model_folder, tmp_path / "out", methods="seqft")
    first, second = on_two(partial(run, tasks="third"))
    assert "'third'" in first[1]
    assert second[1].startswith("Elsewhere: ")
    assert not (tmp_path / "out").exists()


def test_another_number_of_processes_is_another_run(stream: TaskStream, model_folder: Path, tmp_path: Path) -> None:
    run = partial(ran, stream, model_folder, tmp_path / "out", methods="seqft")
    run(lines=[])
    first, second = on_two(run)
    assert "was begun with number of processes 1, and it is now 2" in first[1]
    assert second[1].startswith("Elsewhere: ")


def test_rows_are_shared_out_for_scoring() -> None:
    model = tiny("llama")
    prompts, choices = [[1, 2, 3 + i] for i in range(6)], [["!", "#"]] * 6

    def scores(rank: int | None) -> list[Any]:
        passes: list[int] = []
        handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
        with processes.working_together():
            found = choice_scores(model, byte_tokenizer(), prompts, choices, batch_size=2)
        handle.remove()
        return [found, len(passes)]

    alone, passes = scores(None)
    assert passes == 3
    assert on_ranks(2, scores) == [[alone, 2], [alone, 1]]


def test_what_the_first_process_has_comes_to_the_others() -> None:
    kinds = (torch.float32, torch.bfloat16, torch.int32, torch.float64)

    def work(rank: int) -> list[Any]:
        own = {str(kind): torch.arange(6 - rank).to(kind).view(2 - rank, -1) + rank for kind in kinds}
        with processes.working_together():
            found = processes.of_first(own | {"empty": torch.zeros(0, 3)})
        return [[name, str(one.dtype), one.tolist()] for name, one in found.items()]

    first, second = on_ranks(2, work)
    assert first == second
    assert [row[:2] for row in first[:-1]] == [[str(kind)] * 2 for kind in kinds]
    assert first[0][2] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


@pytest.mark.slow
def test_a_classifier_is_scored_by_both(labelled: TaskStream, bert_folder: Path, tmp_path: Path) -> None:
    run = partial(ran, labelled, bert_folder, methods="seqft", learning_rates=3e-3)
    (one,) = run(tmp_path / "one", [])
    (_, ended, (record,)), _ = on_two(partial(run, tmp_path / "two", per_device_train_batch_size=8))
    assert ended == ""
    assert record["scores"] == one["scores"]
    assert record["scores"][-1][1] == 100.0


def test_a_task_of_the_harness_is_scored_by_the_first(
    stream: TaskStream, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(self: Any, model: Any, *given: Any) -> float:
        assert os.environ["RANK"] == "0"
        return 40.0

    monkeypatch.setattr(FromHarness, "score", score)
    monkeypatch.setattr(lorica.experiments.setup, "check_harness", lambda *_, **__: None)
    (_, ended, (record,)), (_, _, (same,)) = on_two(
        partial(ran, stream, model_folder, tmp_path / "out", methods="seqft", held_out="arc_easy", max_steps=1)
    )
    assert ended == ""
    assert record["retention"]["arc_easy"] == same["retention"]["arc_easy"] == [40.0, 40.0, 40.0]


@pytest.mark.slow
def test_torchrun(stream: TaskStream, model_folder: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "lorica", "run"]
    words = [str(tmp_path / "stream" / "stream.yaml"), "--model_name_or_path", str(model_folder)]
    words += ["--output_dir", str(tmp_path / "out"), "--methods", "seqft"]
    launched = partial(
        subprocess.run,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    done = launched([*launcher, *words])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seqft, after second") == 1
    assert done.stdout.count("report: ") == 1
    wrong = launched([*launcher, *words, "--lerning_rate", "1"])
    assert wrong.returncode != 0
    assert wrong.stderr.count("lorica: ") == 1, wrong.stderr
