"""A run that is stopped and called again ends with the same numbers and the same bytes as one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

import lorica.experiments.cell
import lorica.experiments.scoring
import lorica.experiments.story
from lorica.data.stream import read_stream
from lorica.errors import Interrupted, LoricaError
from lorica.training.trainer import MethodTrainer
from tests.experiments.conftest import Write, llama_folder, run, write  # noqa: F401
from tests.reliability.interruptions import signalled_in

LASTING = (
    "scores", "retention", "metrics", "row_scores", "carried_bytes", "leakage", "intervals", "model_parameters",
)  # fmt: skip


def stop_at(monkeypatch: pytest.MonkeyPatch, tasks: int) -> None:
    """Send SIGTERM in the middle of training the task with this number, counted from 1 over the whole run."""
    begun: list[Any] = []

    class Stopper(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begun.append(1)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if len(begun) == tasks and state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    add(monkeypatch, Stopper)


def add(monkeypatch: pytest.MonkeyPatch, callback: type[TrainerCallback]) -> None:
    """Give every Trainer that is made another callback."""
    start = MethodTrainer.__init__

    def with_callback(self: Any, *args: Any, **given: Any) -> None:
        start(self, *args, **given | {"callbacks": [*given["callbacks"], callback()]})

    monkeypatch.setattr(MethodTrainer, "__init__", with_callback)


@pytest.mark.reliability("R10", "R11")
@pytest.mark.parametrize("method", ["seqft", "half", "lora", "olora", "ewc", "replay", "per-task", "joint"])
def test_a_stopped_run_goes_on_to_the_same_end(
    method: str, write: Write, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"methods": method, "max_steps": 5, "learning_rates": 1e-2, "save_models": True}
    stream = write(tasks=[
        {"name": name, "train_file": f"{file}.train.jsonl", "test_file": f"{file}.test.jsonl"}
        for name, file in (("one", "first"), ("two", "second"), ("three", "known"))
    ])  # fmt: skip
    (whole,), _ = run(stream, llama_folder, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        stop_at(patch, 1 if method == "joint" else 3)
        kept = "what is done is kept, also of task three; the same command goes on"
        with pytest.raises(Interrupted, match=kept) as stopped:
            run(stream, llama_folder, tmp_path / "parts", **options)
    assert stopped.value.signum == signal.SIGTERM
    assert [folder.name for folder in (tmp_path / "parts").rglob("checkpoint-*")] == ["checkpoint-3"]
    with monkeypatch.context() as patch:
        steps = begun_steps(patch)
        (resumed,), told = run(stream, llama_folder, tmp_path / "parts", **options)
    assert steps == list(range(4, 16 if method == "joint" else 6)), "those before are not taken again"
    assert not list((tmp_path / "parts").rglob("task-*"))
    assert [line.split(",")[1].split(":")[0] for line in told if ", after" in line] == [" after three"]
    for field in LASTING:
        assert json.dumps(resumed[field]) == json.dumps(whole[field]), field
    assert resumed["cost"]["steps"] == whole["cost"]["steps"] == 15
    check_same_files(tmp_path / "whole" / method, tmp_path / "parts" / method)


def check_same_files(whole: Path, parts: Path) -> None:
    """Both folders hold the same weights and the same answers."""
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(one[key], two[key]) for key in one)
    answers = (whole / "predictions.jsonl").read_text()
    assert (parts / "predictions.jsonl").read_text() == answers
    assert len(answers.splitlines()) > 8


def begun_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of each step of training as it begins."""
    steps: list[int] = []

    class Counter(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(state.global_step + 1)

    add(monkeypatch, Counter)
    return steps


@pytest.mark.reliability("R12")
@pytest.mark.parametrize("method", ["half", "per-task"])
def test_a_task_that_is_learned_is_not_learned_again_when_its_scoring_is_stopped(
    method: str, write: Write, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"methods": method, "max_steps": 3, "learning_rates": 1e-2, "save_models": True}
    (whole,), _ = run(write(), llama_folder, tmp_path / "whole", **options)
    with signalled_in(lorica.experiments.scoring, "score_task", call=4), pytest.raises(Interrupted):
        run(write(), llama_folder, tmp_path / "parts", **options)  # three columns before the first task
    with monkeypatch.context() as patch:
        steps = begun_steps(patch)
        (resumed,), _ = run(write(), llama_folder, tmp_path / "parts", **options)
    assert steps == [1, 2, 3], "of the second task alone"
    for field in LASTING:
        assert json.dumps(resumed[field]) == json.dumps(whole[field]), field
    check_same_files(tmp_path / "whole" / method, tmp_path / "parts" / method)


class Killed(BaseException):
    """Stands for SIGKILL: nobody handles it."""


@pytest.mark.reliability("R1", "R10")
def test_killed_within_a_task_it_goes_on_from_the_last_checkpoint(
    write: Write, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"methods": "half", "max_steps": 5, "save_models": True}
    run(write(), llama_folder, tmp_path / "whole", **options)
    begun: list[Any] = []

    class Killer(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            begun.append(1)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if len(begun) == 2 and state.global_step == 4:
                raise Killed

    with monkeypatch.context() as patch:
        add(patch, Killer)
        with pytest.raises(Killed):
            run(write(), llama_folder, tmp_path / "parts", **options, save_steps=3)
    with monkeypatch.context() as patch:
        steps = begun_steps(patch)
        run(write(), llama_folder, tmp_path / "parts", **options)  # how often is saved is no matter
    assert steps == [4, 5]
    check_same_files(tmp_path / "whole" / "half", tmp_path / "parts" / "half")
    assert not list((tmp_path / "parts").rglob("task-*"))


def test_checkpoints_of_another_task_are_not_gone_on_from(
    write: Write, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"methods": "half", "max_steps": 3, "save_steps": 1, "save_models": True}
    run(write(), llama_folder, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(lorica.experiments.cell.CellRun, "_remove_tasks", killing_after_a_task)
        with pytest.raises(Killed):
            run(write(), llama_folder, tmp_path / "parts", **options)
    assert (tmp_path / "parts" / "half" / "cell" / "task-1" / "checkpoint-3").is_dir()
    run(write(), llama_folder, tmp_path / "parts", **options)
    check_same_files(tmp_path / "whole" / "half", tmp_path / "parts" / "half")


def killing_after_a_task(cell: Any, but: Path | None = None) -> None:
    """Stand for a kill between the writing of a stage and the removal of what it makes needless."""
    if (cell.folder / "stage-1").is_dir():
        raise Killed


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"save_only_model": True}, "--save_only_model has no effect in lorica run"),
        ({"save_strategy": "best"}, "--save_strategy best goes by scores while training; give no, steps or epoch"),
        ({"load_best_model_at_end": True}, "--load_best_model_at_end has no effect in lorica run"),
    ],
)
def test_what_a_run_keeps_of_a_task_can_be_said(
    option: dict[str, Any], message: str, write: Write, llama_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(LoricaError, match=message):
        run(write(), llama_folder, tmp_path / "out", methods="seqft", **option)


@pytest.mark.parametrize("method", ["half", "per-task"])
def test_a_run_that_could_not_write_its_end_ends_at_the_next_call(
    method: str, write: Write, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"methods": method, "max_steps": 3, "learning_rates": 1e-2, "save_models": True}
    (whole,), _ = run(write(), llama_folder, tmp_path / "whole", **options)

    def full(*_: Any) -> None:
        raise LoricaError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(lorica.experiments.story, "save_model", full)
        with pytest.raises(LoricaError, match="no space left"):
            run(write(), llama_folder, tmp_path / "parts", **options)
    monkeypatch.setattr(lorica.experiments.cell, "fit", None)
    (resumed,), _ = run(write(), llama_folder, tmp_path / "parts", **options)
    for field in LASTING:
        assert json.dumps(resumed[field]) == json.dumps(whole[field]), field
    check_same_files(tmp_path / "whole" / method, tmp_path / "parts" / method)
    assert not list((tmp_path / "parts").rglob("stage-*/model"))


def test_what_is_finished_is_not_done_again(
    write: Write, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = write()
    first, _ = run(stream, llama_folder, tmp_path / "out", methods="seqft", max_steps=2)
    monkeypatch.setattr(lorica.experiments.cell, "fit", None)
    again, told = run(stream, llama_folder, tmp_path / "out", methods="seqft", max_steps=2)
    assert json.dumps(again) == json.dumps(first)
    assert not [line for line in told if "after" in line]


def test_a_folder_of_another_run_is_refused(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    stream = write()
    run(stream, llama_folder, tmp_path / "out", methods="seqft", max_steps=2)
    with pytest.raises(LoricaError, match=r"was begun with learning_rate 0\.01, and it is now 0\.5; give what"):
        run(stream, llama_folder, tmp_path / "out", methods="seqft", max_steps=2, learning_rates=0.5)
    Path(stream.path("second.train.jsonl")).write_text('{"prompt": "new", "completion": "row"}\n')
    with pytest.raises(LoricaError, match="was begun with rows of second"):
        run(stream, llama_folder, tmp_path / "out", methods="seqft", max_steps=2)


def test_another_model_under_the_same_name_is_refused(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    run(write(), model, tmp_path / "out", methods="seqft", max_steps=2)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoricaError, match="was begun with sha256 of the model "):
        run(write(), model, tmp_path / "out", methods="seqft", max_steps=2)


def changed_tokenizer(folder: Path) -> None:
    """Let the tokenizer begin every text with a space."""
    data = json.loads((folder / "tokenizer.json").read_text())
    data["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(data))


TURNS = "{% for message in messages %}{{ message.role[0] }}:{{ message.content }};{% endfor %}"


def template(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


OTHER_TOKENS: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "tokenizer": (changed_tokenizer, {}, "tokens of rows of first "),
    "template": (template(TURNS.replace(";", "!")), {}, "tokens of rows of first "),
    "prompt": (template(TURNS + "{% if add_generation_prompt %}a{% endif %}"), {}, "tokens of scored rows of first "),
    "length of the stream": (lambda _: None, {"max_length": 12}, "tokens of rows of first "),
}


@pytest.mark.reliability("R19")
@pytest.mark.parametrize("change", OTHER_TOKENS)
def test_the_same_files_as_other_tokens_are_refused(
    change: str, write: Write, llama_folder: Path, tmp_path: Path
) -> None:
    """The weights, the files and all options are those of before."""
    alter, fields, message = OTHER_TOKENS[change]
    model = Path(shutil.copytree(llama_folder, tmp_path / "model"))
    template(TURNS)(model)
    stream = write()
    for part in ("train", "test"):
        turns = [{"role": "user", "content": "first?"}, {"role": "assistant", "content": "a"}]
        Path(stream.path(f"first.{part}.jsonl")).write_text((json.dumps({"messages": turns}) + "\n") * 8)
    options: dict[str, Any] = {"methods": "seqft", "max_steps": 2}
    run(stream, model, tmp_path / "out", **options)
    run(stream, model, tmp_path / "out", **options)
    alter(model)
    path = tmp_path / "stream" / "stream.yaml"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(LoricaError, match=rf"cell was begun with {message}\"[0-9a-f]{{64}}\", and it is now"):
        run(read_stream(path), model, tmp_path / "out", **options)


def test_the_first_difference_is_named_where_it_is(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    stream = write()
    run(stream, llama_folder, tmp_path / "out", methods="seqft", max_steps=2)
    known = {"name": "known", "test_file": "known.test.jsonl", "metric": "token_f1"}
    with pytest.raises(LoricaError, match=r'begun with held out\.1\.metric "exact_match", and it is now "token_f1"'):
        run(write(held_out=[known]), llama_folder, tmp_path / "out", methods="seqft", max_steps=2)


def test_where_nothing_is_finished_any_run_may_begin(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match="cannot load the weights"):
        run(write(), llama_folder, tmp_path / "out", methods="seqft", max_steps=2, dtype="float23")
    (record,), _ = run(write(), llama_folder, tmp_path / "out", methods="seqft", max_steps=2)
    assert record["cost"]["steps"] == 4


def test_a_folder_with_other_things_is_left_alone(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    cell = tmp_path / "out" / "seqft" / "cell"
    cell.mkdir(parents=True)
    (cell / "thesis.tex").write_text("mine")
    with pytest.raises(LoricaError, match="is not empty and not of lorica run"):
        run(write(), llama_folder, tmp_path / "out", methods="seqft")
    assert (cell / "thesis.tex").read_text() == "mine"


def test_damaged_progress_is_named(
    write: Write, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Interrupted):
            run(write(), llama_folder, tmp_path / "out", methods="seqft", max_steps=4)
    (progress,) = (tmp_path / "out").rglob("progress.json")
    progress.write_text("{")
    with pytest.raises(LoricaError, match=r"stage-1: progress\.json has 1 bytes, not .*; remove .*stage-1 to go on"):
        run(write(), llama_folder, tmp_path / "out", methods="seqft", max_steps=4)
