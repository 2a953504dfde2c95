"""Gather run records into one small file that can be kept with the project and reported again.

    python scripts/collect_runs.py OUT --output docs/results/recipes/trace.json

takes every ``run.json`` below the folders and writes a JSON list of them, in the order given and within a folder by
path. Left out is what grows with the model (each weight's plan and leakage); the worst leakage of each task stays.
The folders of data, models and results become DATA, MODEL and OUT, for they name a machine. A record holds counts,
hashes and scores of rows, never a row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lorica.errors import LoricaError
from lorica.json_file import load_record
from lorica.report import read_record
from lorica.report.reading import SWEEP

FILE_NAME = "run.json"
PER_WEIGHT = ("plan", "leakage")
FOLDERS = {"data_dir": "DATA", "output_dir": "OUT"}
"""Settings that hold a folder of this machine, and what stands for it."""


def record_files(sources: Iterable[Path]) -> Iterator[Path]:
    """Yield the given files and every ``run.json`` below the given folders, but for those of learning rate sweeps."""
    for source in sources:
        if not source.is_dir():
            yield source
            continue
        files = sorted(file for file in source.rglob(FILE_NAME) if SWEEP not in file.relative_to(source).parts)
        if not files:
            raise LoricaError(f"{source}: no {FILE_NAME} in this folder or below it")
        yield from files


def kept_part(file: Path) -> dict[str, Any]:
    """Return a record without what grows with the model and without the names of folders.

    Raises:
        LoricaError: the file is no record, or was changed.
    """
    read_record(file)
    try:
        record: dict[str, Any] = load_record(file)
    except ValueError as error:
        raise LoricaError(f"{file}: {error}") from error
    settings = record["config"]["run"]
    model = settings["model_name_or_path"]
    names = {settings[field]: name for field, name in FOLDERS.items() if settings[field]}
    names |= {model: f"MODELS/{Path(model).name}"}
    slim = {name: value for name, value in record.items() if name not in PER_WEIGHT}
    for parts in slim["data"].values():
        for summary in parts.values():
            summary["path"] = "/".join(Path(summary["path"]).parts[-2:])
    return {name: _renamed(value, names) for name, value in slim.items()}


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, str):
        for folder in sorted(names, key=len, reverse=True):
            value = value.replace(folder, names[folder])
        return value
    if isinstance(value, dict):
        return {key: _renamed(item, names) for key, item in value.items()}
    return [_renamed(item, names) for item in value] if isinstance(value, list) else value


def write_records(records: list[dict[str, Any]], output: Path) -> None:
    """Write a JSON list with one record a line."""
    lines = [json.dumps(record, ensure_ascii=False, separators=(",", ":")) for record in records]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run.json files, or folders that hold some at any depth")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    try:
        records = [kept_part(file) for file in record_files(arguments.runs)]
    except LoricaError as error:
        raise SystemExit(f"collect_runs: {error}") from None
    write_records(records, arguments.output)
    print(f"{len(records)} records, {arguments.output.stat().st_size:,} bytes: {arguments.output}")


if __name__ == "__main__":
    main()
