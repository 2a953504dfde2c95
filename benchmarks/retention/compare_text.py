"""Compare methods on a stream of real text: choose each one's settings on rows cut from train, measure on test rows.

    python -m benchmarks.retention.compare_text run     --grid GRID.yaml --data_dir DATA --model MODEL --output_dir OUT
    python -m benchmarks.retention.compare_text collect --grid GRID.yaml --output_dir OUT --output FILE.json

The grid names for each entry the settings of the methods file and the learning rates. Each setting is one `lorica run`
with the first seed, OUT/ENTRY/SETTING: every rate is scored on rows cut from train, then the best is trained on all
rows and scored on test rows. The setting with the best validation is run with the other seeds, which draw other rows
of both kinds, and these and its first run are the result. What is there already is not run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.retention.bed import run_script
from benchmarks.retention.compare import RECIPES, read_grid, record_of, run_logged, write_results
from benchmarks.retention.recall import ends
from lorica.errors import LoricaError
from lorica.json_file import load_record
from lorica.scores import ScoreMatrix


class Entry(NamedTuple):
    """A line of the comparison: settings of the methods file, each with the same rates."""

    name: str
    settings: list[str]
    rates: list[float]


class TextGrid(NamedTuple):
    """A comparison on a stream; the first of the seeds is the one that settings are chosen with."""

    stream: str
    config: str
    methods_file: str
    seeds: list[int]
    entries: list[Entry]

    @classmethod
    def read(cls, path: Path, only: Sequence[str] = ()) -> TextGrid:
        """Read a grid file; see ``read_grid``."""
        given = read_grid(path, only)
        entries = [
            Entry(name, entry.get("settings", [name]), [float(rate) for rate in entry["rates"]])
            for name, entry in given["entries"].items()
        ]
        return cls(given["stream"], given["config"], given["methods_file"], given["seeds"], entries)

    def run(self, words: Sequence[object], setting: str, rates: Sequence[float], seed: int, folder: Path) -> None:
        """Run a setting with one seed unless its record is there.

        Args:
            words: options of ``lorica run`` that are the same for all.
        """
        if record_of(folder) is None:
            command = [
                sys.executable, "-m", "lorica", "run", RECIPES / self.stream, "--config", RECIPES / self.config,
                "--methods_file", RECIPES / self.methods_file, "--methods", setting, "--learning_rates", *rates,
                "--seeds", seed, "--output_dir", folder, *words,
            ]  # fmt: skip
            run_logged(command, folder)

    def records(self, output_dir: Path, entry: Entry) -> dict[str, dict[str, Any]]:
        """Return the records of an entry's settings that were run with the first seed."""
        files = {setting: record_of(output_dir / entry.name / setting) for setting in entry.settings}
        return {setting: load_record(file) for setting, file in files.items() if file is not None}


def validated(record: dict[str, Any]) -> float:
    """Return the validation score that a record's rate was chosen by, percent."""
    sweep = record["sweep"]
    chosen: float = sweep["validation"][f"{sweep['selected']:g}"][sweep["selected_by"]]
    return chosen


def best_of(records: dict[str, dict[str, Any]]) -> str:
    """Return the setting with the highest validation score; of equals the first."""
    return max(records, key=lambda setting: validated(records[setting]))


def figures(record: dict[str, Any], where: str) -> dict[str, float]:
    """Return a run's mean scores, percent: of all tasks at the end, of each right after it, of all before the first."""
    matrix = ScoreMatrix.from_json(record, where=where)
    average, learned = ends(matrix, where)
    before = sum(record["scores"][0]) / len(matrix.tasks)
    return {"all": round(average, 2), "learned": round(learned, 2), "before": round(before, 2)}


def compare(grid: TextGrid, words: Sequence[object], output_dir: Path) -> None:
    """Run all entries, one after the other, and tell each's figures."""
    first, *others = grid.seeds
    for entry in grid.entries:
        for setting in entry.settings:
            grid.run(words, setting, entry.rates, first, output_dir / entry.name / setting)
        records = grid.records(output_dir, entry)
        if not records:
            print(f"{entry.name:16} no record", flush=True)
            continue
        setting = best_of(records)
        for seed in others:
            grid.run(
                words, setting, [records[setting]["learning_rate"]], seed, _again(output_dir, entry, setting, seed)
            )
        for row in measured(grid, output_dir, entry):
            print(f"{entry.name:16} {setting:16} {row['rate']:8g} seed {row['seed']}  {row['all']:.1f}"
                  f"  learned {row['learned']:.1f}", flush=True)  # fmt: skip


def _again(output_dir: Path, entry: Entry, setting: str, seed: int) -> Path:
    return output_dir / entry.name / f"{setting}-seed-{seed}"


def measured(grid: TextGrid, output_dir: Path, entry: Entry) -> list[dict[str, Any]]:
    """Return the figures of an entry's chosen setting, a row for each seed that was run."""
    records = grid.records(output_dir, entry)
    setting = best_of(records)
    folders = {seed: _again(output_dir, entry, setting, seed) for seed in grid.seeds[1:]}
    files = {grid.seeds[0]: record_of(output_dir / entry.name / setting)}
    files |= {seed: record_of(folder) for seed, folder in folders.items()}
    rows = []
    for seed, file in files.items():
        if file is not None:
            record = load_record(file)
            beside = {"label": record["label"], "seconds": round(record["cost"]["seconds"]),
                      "carried": record["carried_bytes"][-1], "revision": record["git_revision"]}  # fmt: skip
            told = {"entry": entry.name, "setting": setting, "rate": record["learning_rate"], "seed": seed}
            rows.append(told | figures(record, str(file)) | beside)
    return rows


def tried(grid: TextGrid, output_dir: Path, entry: Entry) -> list[dict[str, Any]]:
    """Return the validation scores that an entry's setting and rate were chosen from."""
    rows = []
    for setting, record in grid.records(output_dir, entry).items():
        for rate, told in record["sweep"]["validation"].items():
            scores = {"all": told["average_accuracy"], "learned": told["learning_accuracy"]}
            rows.append({"entry": entry.name, "setting": setting, "rate": float(rate)} | scores)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["run", "collect"])
    parser.add_argument("--grid", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, help="folder with cl/, for run")
    parser.add_argument("--model", type=Path, help="folder of the model, for run")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--entries", nargs="+", default=[], help="of the grid; default: all")
    parser.add_argument("--output", type=Path, help="JSON file, for collect")
    run_script(parser, work)


def work(arguments: argparse.Namespace) -> None:
    needs = {"run": ("data_dir", "model"), "collect": ("output",)}[arguments.work]
    if missing := [name for name in needs if getattr(arguments, name) is None]:
        raise LoricaError(f"--{missing[0]} is needed to {arguments.work}")
    grid, out = TextGrid.read(arguments.grid, arguments.entries), arguments.output_dir
    if arguments.work == "run":
        compare(grid, ["--data_dir", arguments.data_dir, "--model_name_or_path", arguments.model], out)
        return
    ran = [entry for entry in grid.entries if grid.records(out, entry)]
    rows = [row | {"what": what} for what, of in (("tried", tried), ("measured", measured)) for entry in ran
            for row in of(grid, out, entry)]  # fmt: skip
    write_results(arguments.output, rows)


if __name__ == "__main__":
    main()
