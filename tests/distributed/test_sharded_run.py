"""``lorica run --fsdp full_shard``: the model lies in parts all through, and the run is that of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, Trainer
from transformers.distributed import DistributedConfig

import lorica.experiments.setup
import lorica.experiments.stages
import lorica.experiments.story
from lorica import processes
from lorica.data import Collator, load
from lorica.data.stream import MethodSettings, TaskStream, read_stream
from lorica.errors import Interrupted, LoricaError
from lorica.evaluation.choices import choice_scores
from lorica.evaluation.harness import lm_eval_scores
from lorica.experiments.cell import CellRun
from lorica.training.sharding import Sharding
from lorica.training.trust import PICKLES
from tests.builders import tiny
from tests.distributed.ranks import on_ranks, torchrun
from tests.distributed.trainings import load_sharded, save
from tests.experiments import conftest
from tests.reliability.interruptions import cases, quick_updates, signalled_in, stopped_at
from tests.training.conftest import byte_tokenizer, llama_folder, t5_folder  # noqa: F401

SETTINGS = {
    "seqft": {"method": "seqft", "learning_rate": 3e-3},
    "half": {"method": "osft", "learning_rate": 3e-3, "options": {"unfreeze_rank_ratio": 0.5}},
}
TRAINING = {"max_steps": 5, "weight_decay": 0.1, "max_grad_norm": 0.5, "per_device_eval_batch_size": 3}
TRAINING |= {"adam_epsilon": 1e-3}  # so that gradients of nearly 0 are not divided by what their rounding is
ROWS = 8
"""Of each step; one process has them in two parts, two have a part each."""

SAME = ("scores", "retention", "metrics", "row_scores", "carried_bytes", "intervals", "model_parameters", "label")

Record = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_updates():
        yield


def stream_in(folder: Path) -> TaskStream:
    """Write a stream of two tasks, one that is answered in texts of several lengths and one by choosing."""
    told = {
        "first": [{"prompt": f"{'very ' * (i % 3)}first {i}?", "completion": "a"} for i in range(ROWS)],
        "second": [{"prompt": f"second {i}?", "completion": "ab"[i % 3 % 2]} for i in range(ROWS)],
        "known": [{"prompt": f"known {i}?", "completion": "c" * (i % 5 + 1)} for i in range(7)],
    }
    folder.mkdir()
    for name, rows in told.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks: list[dict[str, Any]] = [
        {"name": name, "train_file": f"{name}.jsonl", "test_file": f"{name}.jsonl"} for name in ("first", "second")
    ]
    tasks[1] |= {"choices": ["a", "b"], "scoring": "choose"}
    fields = {"name": "letters", "version": 1, "description": "two answers", "tasks": tasks}
    fields |= {"held_out": [{"name": "known", "test_file": "known.jsonl"}], "training": TRAINING, "methods": SETTINGS}
    (folder / "stream.yaml").write_text(json.dumps(fields))
    return read_stream(folder / "stream.yaml")


def ran(stream: TaskStream, model: Path, out: Path, shares: int = 2, **options: Any) -> tuple[list[str], list[Record]]:
    """Run methods with the rows of a step in so many shares: processes times accumulated batches."""
    given = {"save_models": True, "per_device_train_batch_size": ROWS // shares} | options
    if processes.launched() == 1:
        given["gradient_accumulation_steps"] = shares
    records, told = conftest.run(stream, model, out, **given)
    return told, records


def sharded(size: int, *args: Any, work: Any = ran, **options: Any) -> list[Any]:
    """Run in several processes whose model is sharded; of each: how it ended, what it told, and its records."""

    def one(rank: int) -> list[Any]:
        try:
            told, records = work(*args, **{"shares": size, "fsdp": "full_shard"} | options)
        except (LoricaError, Interrupted) as error:
            return [f"{type(error).__name__}: {error}", [], []]
        return ["", told, [{name: record[name] for name in (*SAME, "leakage")} for record in records]]

    return on_ranks(size, one)


def apart(one: Path, other: Path) -> float:
    """Return the largest relative difference of two models' weights, as norms."""
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def taught(model: Path, rows: Path) -> None:
    """Teach a model rows, so that it has something to lose, and texts of its own end at several lengths."""
    torch.manual_seed(0)
    tokenizer, learner = byte_tokenizer(), AutoModelForCausalLM.from_pretrained(model)
    data = load(rows, tokenizer)
    batch = Collator(tokenizer)([data[index] for index in range(len(data))])
    optimizer = AdamW(learner.parameters(), lr=3e-3)
    for _ in range(60):
        learner(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    learner.save_pretrained(model)


def without_dropout(model: Path) -> None:
    """Set it to 0 in a model's configuration: each process would draw its own."""
    config = json.loads((model / "config.json").read_text())
    config |= dict.fromkeys(config.keys() & {"attention_dropout", "dropout_rate"}, 0.0)
    (model / "config.json").write_text(json.dumps(config))


@dataclass(frozen=True)
class Finished:
    """A run by one process, and the same by two whose model is sharded."""

    stream: TaskStream
    model: Path
    one: Path
    two: Path
    by_one: tuple[list[str], list[Record]]
    by_two: list[Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(llama_folder, model := folder / "model")
    without_dropout(model)
    stream = stream_in(folder / "stream")
    taught(model, folder / "stream" / "known.jsonl")
    by_one = ran(stream, model, folder / "one")
    return Finished(stream, model, folder / "one", folder / "two", by_one, sharded(2, stream, model, folder / "two"))


@pytest.mark.reliability("R30")
def test_a_sharded_run_is_that_of_one_process(finished: Finished) -> None:
    (ended, told, records), (_, silence, same) = finished.by_two
    lines, alone = finished.by_one
    assert ended == ""
    assert same == records
    assert silence == []
    assert [line.split("[")[0] for line in told] == [line.split("[")[0] for line in lines]
    for method, record, one in zip(SETTINGS, records, alone, strict=True):
        mine, theirs = (out / method / "model" for out in (finished.two, finished.one))
        assert apart(mine, theirs) <= 1e-6, method
        assert apart(mine, finished.model) > 0.05, method
        assert [name for name in SAME if record[name] != one[name]] == [], method
        answers = [(out / method / "predictions.jsonl").read_text() for out in (finished.two, finished.one)]
        assert answers[0] == answers[1]
    assert len({json.dumps(row) for row in records[0]["scores"]}) > 1
    assert len({len(json.loads(line)["answer"]) for line in answers[0].splitlines()}) > 3
    leaks = records[1]["leakage"]
    assert len(leaks) == 14
    assert max(max(row["master_leak_u"], row["master_leak_v"]) for row in leaks) <= 1e-5
    assert all(row["holds"] for row in leaks)


def test_what_it_leaves_behind_is_a_plain_model(finished: Finished) -> None:
    for method in SETTINGS:
        mine, theirs = (out / method / "model" for out in (finished.two, finished.one))
        assert names_in(mine) == names_in(theirs)
        assert (mine / "config.json").read_text() == (theirs / "config.json").read_text()
        AutoModelForCausalLM.from_pretrained(mine)
        assert names_in(finished.two / method / "cell") == names_in(finished.one / method / "cell")
    assert not [path for path in finished.two.rglob("*") if path.suffix in PICKLES or path.name == ".metadata"]
    record = json.loads((finished.two / "half" / "run.json").read_text())
    assert record["processes"] == 2


def goes_on(finished: Finished, out: Path, **options: Any) -> list[str]:
    """Run one method in two processes, from where it was stopped, and return how each ended."""
    given = {"methods": "half", "save_steps": 2} | options
    return [ended for ended, _, _ in sharded(2, finished.stream, finished.model, out, **given)]


def same_bits(finished: Finished, out: Path) -> bool:
    mine, theirs = (load_file(run / "half" / "model" / "model.safetensors") for run in (out, finished.two))
    answers = [(run / "half" / "predictions.jsonl").read_bytes() for run in (out, finished.two)]
    return all(torch.equal(mine[name], theirs[name]) for name in theirs) and answers[0] == answers[1]


def killed_in(target: Any, name: str, call: int) -> Any:
    """Return what a run is done with in which process 1 is killed when it calls a function for the n-th time."""

    def disturbed(*args: Any, **options: Any) -> Any:
        if os.environ["RANK"] != "1":
            return ran(*args, **options)
        with signalled_in(target, name, signal.SIGKILL, call):
            return ran(*args, **options)

    return disturbed


PLACES = {  # where process 1 is killed, and what is then there to go on from
    "within the first task": (Trainer, "training_step", 4, "stage-0", "task-1/checkpoint-2"),
    "within the second task": (Trainer, "training_step", 9, "stage-1", "task-2/checkpoint-2"),
    "as the weights are gathered": (lorica.experiments.stages, "whole_weights", 1, "stage-0", "task-1/checkpoint-5"),
    "between the tasks": (CellRun, "_score", 2, "stage-1", None),
    "as the model is saved": (lorica.experiments.story, "whole_weights", 1, "stage-2", None),
}


@pytest.mark.reliability("R11")
@pytest.mark.parametrize("place", cases(PLACES, ["within the second task"]))
def test_where_one_process_is_killed_the_same_command_goes_on(
    place: tuple[Any, str, int, str, str | None], finished: Finished, tmp_path: Path
) -> None:
    *where, stage, checkpoint = place
    with pytest.raises(AssertionError, match=r"^process 1: no result$"):
        goes_on(finished, tmp_path / "out", work=killed_in(*where))
    cell = tmp_path / "out" / "half" / "cell"
    assert [path.name for path in cell.glob("stage-*")] == [stage]
    assert checkpoint is None or (cell / checkpoint / "trained").is_dir()
    assert goes_on(finished, tmp_path / "out") == ["", ""]
    assert same_bits(finished, tmp_path / "out")
    assert not list(cell.glob("task-*"))


@pytest.mark.slow
@pytest.mark.reliability("R13")
@pytest.mark.parametrize("which", [0, 1])
def test_a_signal_to_one_process_stops_both_and_the_same_command_goes_on(
    which: int, finished: Finished, tmp_path: Path
) -> None:
    def disturbed(*args: Any, **options: Any) -> Any:
        if int(os.environ["RANK"]) != which:
            return ran(*args, **options)
        with stopped_at("on_step_begin", 4, signal.SIGTERM):
            return ran(*args, **options)

    ends = goes_on(finished, tmp_path / "out", work=disturbed)
    assert all(ended.startswith("Interrupted: stopped by SIGTERM; what is done is kept, also of") for ended in ends)
    assert (tmp_path / "out" / "half" / "cell" / "task-1" / "checkpoint-4").is_dir()
    assert goes_on(finished, tmp_path / "out") == ["", ""]
    assert same_bits(finished, tmp_path / "out")


def nodes_of_two(*args: Any, **options: Any) -> Any:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return ran(*args, **options)


@pytest.mark.slow
def test_copies_of_a_sharded_model(finished: Finished, tmp_path: Path) -> None:
    """A copy on each of two nodes."""
    given = {"fsdp": "hybrid_shard", "work": nodes_of_two}
    (ended, _, records), *others = sharded(4, finished.stream, finished.model, tmp_path / "out", **given)
    assert ended == ""
    assert all(same == records for _, _, same in others)
    for method, record, one in zip(SETTINGS, records, finished.by_one[1], strict=True):
        assert apart(tmp_path / "out" / method / "model", finished.one / method / "model") <= 1e-6
        assert [name for name in SAME if record[name] != one[name]] == []


WAYS: dict[str, dict[str, Any]] = {  # in bfloat16 one process is as far from itself with its rows in other parts
    "bfloat16": {"dtype": "bfloat16", "methods": "half", "within": 1e-1},
    "what was measured": {"methods": "measured", "within": 1e-2},
    "a choice of rates": {"methods": "half", "learning_rates": [1e-3, 3e-3], "validation_fraction": 0.5},
    "checkpointing": {"methods": "half", "activation_checkpointing": True},
    "end to end": {"methods": "seqft", "padding_free": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("given", cases(WAYS, ()))
def test_other_ways_of_running(given: dict[str, Any], finished: Finished, tmp_path: Path) -> None:
    options = {"source": "curvature", "calibration": "random"}
    measured = MethodSettings(method="osft", learning_rate=3e-3, options=options)
    stream = finished.stream.model_copy(update={"methods": finished.stream.methods | {"measured": measured}})
    given = dict(given)
    within = given.pop("within", 1e-6)
    _, alone = ran(stream, finished.model, tmp_path / "one", **given)
    (ended, _, records), (_, _, same) = sharded(2, stream, finished.model, tmp_path / "two", **given)
    assert ended == ""
    assert same == records
    method = given["methods"]
    assert apart(tmp_path / "two" / method / "model", tmp_path / "one" / method / "model") <= within
    assert all(row["holds"] for row in records[0]["leakage"])
    assert records[0]["carried_bytes"] == alone[0]["carried_bytes"]


@pytest.mark.slow
def test_a_model_with_an_encoder(finished: Finished, t5_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(t5_folder, model := tmp_path / "model")
    without_dropout(model)
    _, alone = ran(finished.stream, model, tmp_path / "one", methods="half")
    (ended, _, (record,)), _ = sharded(2, finished.stream, model, tmp_path / "two", methods="half")
    assert ended == ""
    assert apart(tmp_path / "two" / "half" / "model", tmp_path / "one" / "half" / "model") <= 1e-6
    assert [name for name in SAME if record[name] != alone[0][name]] == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"methods": ["seqft", "ewc"]}, "method 'ewc': --fsdp: --method ewc needs whole weights; give osft or"),
    "optimizer": ({"optim": "adafactor"}, "method 'seqft': --fsdp: --optim adafactor is not known to step parts"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_had_is_refused_before_anything_starts(
    given: dict[str, Any], message: str, finished: Finished, tmp_path: Path
) -> None:
    (told, *_), (other, *_) = sharded(2, finished.stream, finished.model, tmp_path / "out", **given)
    assert told.startswith("LoricaError: ")
    assert message in told
    assert other == "Elsewhere: process 0 could not go on"
    assert not (tmp_path / "out").exists()


OPTIONS: dict[str, dict[str, Any]] = {
    "--protect_learned is not taken": {"protect_learned": 0.1},
    "--remember_tasks is not taken": {"source": "activation", "calibration": "random", "remember_tasks": True},
    "--rehearse is not taken": {"rehearse": 1},
    "--constraint block is held by an optimizer": {"constraint": "block"},
    "--ranks marginal compares": {"ranks": "marginal", "source": "curvature", "calibration": "random"},
    "--calibration self is not taken": {"source": "activation"},
}


@pytest.mark.parametrize(
    ("message", "options"), OPTIONS.items(), ids=lambda value: "" if isinstance(value, dict) else value
)
def test_options_of_methods_that_cannot_be_had_are_refused(
    message: str, options: dict[str, Any], finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"mine": MethodSettings(method="osft", options=options)}
    stream = finished.stream.model_copy(update={"methods": settings})
    monkeypatch.setattr(lorica.experiments.setup, "sharding", lambda given: Sharding(2))
    with pytest.raises(LoricaError, match=f"stream 'letters', method 'mine': --fsdp: {message}"):
        ran(stream, finished.model, tmp_path / "out", methods="mine")


def test_one_process_alone_is_not_sharded(finished: Finished, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match="--fsdp needs several processes: torchrun --nproc_per_node N -m lorica"):
        ran(finished.stream, finished.model, tmp_path / "out", fsdp="full_shard")
    settings = {"mine": MethodSettings(method="osft", training={"fsdp": "full_shard"})}
    stream = finished.stream.model_copy(update={"methods": settings})
    with pytest.raises(LoricaError, match="method 'mine': --fsdp is for all methods: give it to lorica run"):
        ran(stream, finished.model, tmp_path / "out", methods="mine")


def test_a_run_that_was_not_sharded_is_another_run(finished: Finished) -> None:
    (told, *_), _ = sharded(2, finished.stream, finished.model, finished.two, fsdp=None)
    assert "was begun with fsdp {" in told
    assert "and it is now null" in told


def test_choices_are_scored_in_step(tmp_path: Path) -> None:
    """The second process has a batch less, and takes as many passes."""
    folder, prompts, choices = save("llama", tmp_path), [[1, 2, 3 + i] for i in range(5)], [["!", "#"]] * 5

    def scores(model: Any) -> list[Any]:
        with processes.working_together():
            return choice_scores(model, byte_tokenizer(), prompts, choices, batch_size=2)

    first, second = on_ranks(2, lambda rank: scores(load_sharded(folder, 2)))
    alone = scores(tiny("llama"))
    assert first == second
    assert [score for row in first for score in row] == pytest.approx([score for row in alone for score in row])


@pytest.mark.slow
def test_tasks_of_the_harness_are_scored_by_all_in_step(finished: Finished, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    whole = AutoModelForCausalLM.from_pretrained(finished.model)
    parts = partial(
        AutoModelForCausalLM.from_pretrained, finished.model, distributed_config=DistributedConfig(fsdp_size=2)
    )
    rows = [{"question": f"{i}?", "options": ["a", "b c", "d"], "label": i % 3} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"task": "mine", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    task |= {"doc_to_text": "{{question}}", "doc_to_choice": "{{options}}", "doc_to_target": "label"}
    task |= {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    (tmp_path / "mine.yaml").write_text(json.dumps(task))

    def score(model: Any) -> float:
        with processes.working_together():
            (found,) = processes.together(
                [str(tmp_path / "mine.yaml")],
                lambda file: list(lm_eval_scores(model, byte_tokenizer(), [file], batch_size=2).items()),
                in_step=processes.in_step(model),
            )
        ((name, metrics),) = found
        assert name == "mine"
        return metrics["acc"]

    assert on_ranks(2, lambda rank: score(parts())) == [score(whole)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_take_it(launcher: str, finished: Finished, tmp_path: Path) -> None:
    start = torchrun(2, "-m", "lorica", "run")
    if launcher == "accelerate":
        recipe = Path(__file__).resolve().parents[2] / "recipes" / "accelerate" / "fsdp2.yaml"
        start = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
        start += ["--config_file", str(recipe), "-m", "lorica", "run"]
    words = [str(finished.model.parent / "stream" / "stream.yaml"), "--model_name_or_path", str(finished.model)]
    words += ["--output_dir", str(tmp_path / "out"), "--methods", "half", "--save_models"]
    words += ["--fsdp", "full_shard"] if launcher == "torchrun" else []
    words += ["--per_device_train_batch_size", str(ROWS // 2)]
    done = subprocess.run(
        [*start, *words], capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("osft, after second") == 1
    assert done.stdout.count("report: ") == 1
    assert same_bits(finished, tmp_path / "out")
    identity = json.loads((tmp_path / "out" / "half" / "cell" / "cell.json").read_text())
    assert identity["fsdp"]["shards"] == 2
