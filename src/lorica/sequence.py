"""The story of a stream: for each method, learn task after task and score everything after each."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainingArguments

from lorica.data.dataset import EncodedDataset, load
from lorica.data.stream import TaskStream
from lorica.errors import Interrupted, LoricaError, did_you_mean
from lorica.evaluation.evaluator import exact_match
from lorica.methods import METHODS, Method, Protection
from lorica.record import SCHEMA, Stopwatch, environment, peak_memory, write_json
from lorica.scores import ScoreMatrix
from lorica.training.arguments import check_arguments, training_arguments
from lorica.training.models import (
    position_limit,
    read_model,
    read_model_config,
    read_tokenizer,
    stock_configuration,
)
from lorica.training.trainer import fit

Say = Callable[[str], None]

MAX_LENGTH = 1024
"""Longest row of a stream, in tokens, where the model has that many positions."""


def run(
    stream: TaskStream,
    model_name_or_path: str,
    output_dir: str | Path,
    *,
    methods: Sequence[str] | None = None,
    seed: int = 0,
    say: Say = print,
) -> list[dict[str, Any]]:
    """Run methods over a stream and return their records; each is also written to ``OUT/<name>/run.json``.

    Every method starts from the same model and sees the same rows in the same order for the same number of
    steps. The score of a task is the exact match of greedy generation, in percent.

    Args:
        stream: the tasks, the held-out abilities and the settings of each method.
        model_name_or_path: the model that every method starts from.
        output_dir: one folder per method is made in it.
        methods: names of the stream's settings; all of them by default.
        seed: of the order of the rows.
        say: takes each line of what is told along the way.

    Raises:
        LoricaError: the stream, one of its files or the model cannot be used; files, methods and their settings are
            looked at before the first method starts.
        Interrupted: a signal came. The records of the methods that had ended are there; a stream is not resumed.
    """
    records = []
    names = list(methods or stream.methods)
    check_stream(stream, names)
    clock = Clock(stages=len(names) * (len(stream.tasks) + 1))
    for name in names:
        folder = Path(output_dir) / name
        tell: Say = lambda line: say(f"{line}   {clock.tick()}")  # noqa: E731
        stream_run = StreamRun(stream, name, model_name_or_path, folder, seed, tell)
        folder.mkdir(parents=True, exist_ok=True)
        record = stream_run.run()
        write_json(folder / "run.json", record)
        records.append(record)
    return records


def check_stream(stream: TaskStream, names: Sequence[str]) -> None:
    """Refuse a stream without the methods asked for, with settings that do not exist, or with a missing file."""
    if not names:
        raise LoricaError(f"stream {stream.name!r} has settings for no method; name one under 'methods'")
    for name in names:
        if name not in stream.methods:
            known = ", ".join(stream.methods)
            hint = did_you_mean(name, stream.methods)
            raise LoricaError(f"stream {stream.name!r} has no settings for method {name!r}; it has {known}.{hint}")
        build_method(stream, name)
    check_arguments(stream.training, where=f"stream {stream.name!r}: ")
    files = [(f"task {task.name!r}", file) for task in stream.tasks for file in (task.train_file, task.test_file)]
    files += [(f"ability {ability.name!r}", ability.test_file) for ability in stream.held_out]
    for owner, file in files:
        if not Path(stream.path(file)).exists():
            raise LoricaError(f"stream {stream.name!r}, {owner}: no file {stream.path(file)}")


def build_method(stream: TaskStream, name: str) -> Method:
    """Return a new method by its settings in a stream."""
    settings = stream.methods[name]
    where = f"stream {stream.name!r}, method {name!r}"
    known = [field.name for field in fields(Protection)]
    for key in settings.protection:
        if key not in known:
            raise LoricaError(f"{where}: unknown protection {key!r}.{did_you_mean(key, known)}")
    try:
        return METHODS[settings.method](Protection(**settings.protection))
    except LoricaError as error:
        raise LoricaError(f"{where}: {error}") from error


class Clock:
    """How far a run of equal stages is, and about how long it will still take."""

    def __init__(self, stages: int) -> None:
        self.stages, self.done, self.watch = stages, 0, Stopwatch()

    def tick(self) -> str:
        """Count one stage as done and say how much time is left."""
        self.done += 1
        left = self.watch.seconds / self.done * (self.stages - self.done)
        return f"[{self.done}/{self.stages}, about {left:.0f} s left]" if self.done < self.stages else "[done]"


class StreamRun:
    """One method on one stream with one seed."""

    def __init__(
        self, stream: TaskStream, method_name: str, model_name: str, folder: Path, seed: int, say: Say
    ) -> None:
        self.stream, self.method_name, self.settings = stream, method_name, stream.methods[method_name]
        self.model_name, self.folder, self.seed, self.say = model_name, folder, seed, say
        self.watch = Stopwatch()
        self.tokenizer = read_tokenizer(model_name)
        self.config = read_model_config(model_name)
        arguments = self._arguments()
        self.batch_size = arguments.per_device_eval_batch_size
        self.model = read_model(model_name, self.config, device=arguments.device)
        self.tests = {task.name: self._tests(task.test_file) for task in stream.tasks}
        self.abilities = {ability.name: self._tests(ability.test_file) for ability in stream.held_out}
        size = len(stream.tasks)
        self.scores = np.full((size + 1, size), math.nan)
        self.retention: dict[str, list[float]] = {name: [] for name in self.abilities}
        self.steps, self.training_seconds, self.trainable = 0, 0.0, 0
        self.leakage: list[dict[str, Any]] = []
        self.plan: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Learn the tasks in order and return the record."""
        self._score(0)
        self._tell("before", 0)
        for stage, task in enumerate(self.stream.tasks, start=1):
            self._learn(task.train_file)
            self._score(stage)
            self._tell(f"after {task.name}", stage)
        return self._record()

    def _learn(self, train_file: str) -> None:
        method = build_method(self.stream, self.method_name)
        method.begin_task(self.model)
        data, arguments = self._load(train_file), self._arguments()
        try:
            with stock_configuration(self.model):
                *_, last = fit(self.model, method, data, self.tokenizer, arguments, quiet=True)
        except Interrupted as stopped:
            if stopped.checkpoint is not None:  # nothing could go on from the middle of a stream
                shutil.rmtree(stopped.checkpoint, ignore_errors=True)
            raise Interrupted(stopped.signum) from None
        self.steps += int(last["step"])
        self.training_seconds += last["train_runtime"]
        self._close(method)

    def _arguments(self) -> TrainingArguments:
        return training_arguments(
            {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
            | self.stream.training
            | {"learning_rate": self.settings.learning_rate, "seed": self.seed},
            str(self.folder),
            hidden_size=None,
            seq2seq=bool(self.config.is_encoder_decoder),
        )

    def _close(self, method: Method) -> None:
        assert method.plan is not None
        self.trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        audit = method.audit(self.model)
        self.leakage = audit.to_records() if audit else []
        self.plan = method.plan.records() if audit else []
        method.end_task(self.model)

    def _score(self, stage: int) -> None:
        for column, test in enumerate(self.tests.values()):
            self.scores[stage, column] = self._exact(test)
        for name, test in self.abilities.items():
            self.retention[name].append(self._exact(test))

    def _exact(self, test: EncodedDataset) -> float:
        match, _ = exact_match(self.model.eval(), test, self.tokenizer, batch_size=self.batch_size)
        assert match is not None  # see _tests
        return match

    def _tests(self, file: str) -> EncodedDataset:
        rows = self._load(file)
        if not any(row.answer is not None for row in rows.examples):
            raise LoricaError(f"{self.stream.path(file)}: no row has an answer to score; give prompts with completions")
        return rows

    def _load(self, file: str) -> EncodedDataset:
        return load(
            self.stream.path(file),
            self.tokenizer,
            max_length=min(MAX_LENGTH, position_limit(self.config) or MAX_LENGTH),
            seq2seq=bool(self.config.is_encoder_decoder),
        )

    def _tell(self, when: str, stage: int) -> None:
        held = [f"{name} {values[-1]:5.1f}" for name, values in self.retention.items()]
        cells = [f"{name} {self.scores[stage, i]:5.1f}" for i, name in enumerate(self.tests)]
        self.say(f"{self.settings.label}, {when}: " + "  ".join(held + cells))

    def _record(self) -> dict[str, Any]:
        matrix = ScoreMatrix(list(self.tests), self.scores)
        return {
            "schema": SCHEMA,
            "kind": "run",
            "stream": self.stream.name,
            "stream_version": self.stream.version,
            "method": self.settings.method,
            "label": self.settings.label,
            "seed": self.seed,
            "model": Path(self.model_name).name,
            "model_parameters": self.model.num_parameters(),
            **matrix.to_json(),
            "retention": self.retention,
            "metrics": matrix.metrics(),
            "cost": {
                "seconds": self.watch.seconds,
                "seconds_per_step": self.training_seconds / max(self.steps, 1),
                "peak_rss_bytes": peak_memory(),
                "trainable_parameters": self.trainable,
            },
            "learning_rate": self.settings.learning_rate,
            "plan": self.plan,
            "leakage": self.leakage,
            "config": {"settings": self.settings.model_dump(mode="json"), "training": self.stream.training},
            **environment(),
        }
