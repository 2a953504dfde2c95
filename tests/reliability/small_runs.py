"""Small runs of the commands, and everything that they leave behind."""

from __future__ import annotations

import json
import pickle
import pickletools
from pathlib import Path
from typing import Any

import lorica
from lorica.config import build_config
from lorica.data.stream import TaskStream, read_stream
from lorica.update import train

FAST = {"max_steps": 4, "learning_rate": 3e-3, "disable_tqdm": True, "seed": 1, "preset": "paper"}
FAST |= {"per_device_train_batch_size": 4}


def rows_file(folder: Path, name: str = "new", count: int = 24) -> str:
    """Write rows of prompts and answers and return the path of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    lines = [{"prompt": f"{name} {i}?", "completion": f" {(7 * i) % 10}"} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def update(model: Path | str, out: Path, file: str, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """Update a model and return the record and what was told."""
    told: list[str] = []
    values = {"model_name_or_path": str(model), "train_file": file, "output_dir": str(out)} | FAST | options
    return train(build_config(values), say=told.append), told


def stream_of(folder: Path, names: tuple[str, ...] = ("first", "second"), **changes: Any) -> TaskStream:
    """Write a stream of tasks and read it; ``changes`` replace fields."""
    parts = [rows_file(folder, f"rows{i}", 8) for i in range(len(names))]
    fields = {
        "name": "small", "version": 1, "description": "rows",
        "tasks": [{"name": n, "train_file": file, "test_file": file} for n, file in zip(names, parts, strict=True)],
        "training": {"max_steps": 2, "per_device_train_batch_size": 4},
        "methods": {"seqft": {"method": "seqft", "learning_rate": 1e-2}},
    }  # fmt: skip
    (folder / "stream.yaml").write_text(json.dumps(fields | changes))
    return read_stream(folder / "stream.yaml")


def run(stream: TaskStream, model: Path | str, out: Path, **options: Any) -> list[dict[str, Any]]:
    """Run methods on a stream and return the records."""
    config = {"stream": "small", "model_name_or_path": model, "output_dir": out} | options
    return lorica.run(config, lambda line: None, stream=stream)


def files_in(folder: Path) -> list[Path]:
    """Return every file below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


class Bomb:
    """Unpickled, it makes a file: the sign that code of the pickle was run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def bomb(mark: Path) -> bytes:
    """Return a pickle that makes a file when it is loaded."""
    return pickle.dumps({"state": Bomb(mark)}, protocol=2)


def is_pickle(data: bytes) -> bool:
    """Tell whether bytes can be unpickled: as they are, or as an archive of torch's."""
    if data.startswith(b"PK\x03\x04"):
        return True
    try:
        return any(operation.name == "STOP" for operation, *_ in pickletools.genops(data))
    except Exception:
        return False
