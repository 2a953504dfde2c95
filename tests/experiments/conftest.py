"""A stream of two tasks and a held-out ability, and small models that can learn it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorica
from lorica.data.stream import TaskStream, read_stream
from tests.training.conftest import llama_folder, t5_folder  # noqa: F401

Write = Callable[..., TaskStream]

SETTINGS: dict[str, Any] = {
    "seqft": {"method": "seqft", "label": "sequential fine-tuning", "learning_rate": 1e-2},
    "half": {
        "method": "osft", "label": "OSFT", "learning_rate": 1e-2, "options": {"unfreeze_rank_ratio": 0.5},
    },
}  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a stream of two tasks, each one answer for all rows, and read it; ``changes`` replace fields."""

    def make(**changes: Any) -> TaskStream:
        folder = tmp_path / "stream"
        folder.mkdir(exist_ok=True)
        for name, answer in (("first", "a"), ("second", "b"), ("known", "c")):
            rows = [{"prompt": f"{name} {i}?", "completion": answer} for i in range(8)]
            for part in ("train", "test"):
                (folder / f"{name}.{part}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        fields = {
            "name": "letters",
            "version": 1,
            "description": "two answers",
            "tasks": [
                {"name": name, "train_file": f"{name}.train.jsonl", "test_file": f"{name}.test.jsonl"}
                for name in ("first", "second")
            ],
            "held_out": [{"name": "known", "test_file": "known.test.jsonl"}],
            "training": {"max_steps": 15, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 3},
            "methods": SETTINGS,
        }
        (folder / "stream.yaml").write_text(json.dumps(fields | changes))
        return read_stream(folder / "stream.yaml")

    return make


def run(stream: TaskStream, model: Path, out: Path, **options: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Run a stream and return the records and the lines that were told."""
    told: list[str] = []
    config = {"stream": "letters", "model_name_or_path": model, "output_dir": out} | options
    return lorica.run(config, told.append, stream=stream), told
