"""Compare methods on the knowledge beds: choose each one's settings on one bed, measure them on others.

    python -m benchmarks.retention.compare choose --beds BED0 --output_dir OUT
    python -m benchmarks.retention.compare measure --beds BED1 BED2 BED3 --chosen_on BED0 --output_dir OUT
    python -m benchmarks.retention.compare collect --beds BED0 BED1 BED2 BED3 --output_dir OUT --output FILE.json

The grid names for each entry the stream, the settings of the methods file and the learning rates. ``choose`` runs all
of them, each as a `lorica run` of its own, in OUT/BED/ENTRY/SETTING-RATE; ``measure`` runs of each entry what had the
highest mean recall over all sets (``all`` of recall.py) at the end. What is there already is not run again, so both go
on where they were stopped; nor is what ``--kept FILE.json`` holds, of an earlier ``collect``, perhaps on another
machine. A run that diverged has no record and is not chosen. ``--entries`` takes a part of the grid.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.retention.bed import STREAM, run_script
from benchmarks.retention.recall import COLUMNS, recall
from lorica.errors import LoricaError
from lorica.json_file import load_record, read_json

RECIPES = Path(__file__).parent
GRID = RECIPES / "knowledge-grid.yaml"


class Cell(NamedTuple):
    """One run: a line of the methods file at one learning rate."""

    entry: str
    stream: str
    setting: str
    rate: float

    def folder(self, output_dir: Path, bed: Path) -> Path:
        return output_dir / bed.name / self.entry / f"{self.setting}-{self.rate:g}"


Row = dict[str, Any]
"""What is kept of a cell on a bed: which it is, the figures of recall.py, and what they were measured by."""


class Results(NamedTuple):
    """What has been run: records in a folder, and rows that were collected before."""

    output_dir: Path
    kept: Sequence[Row] = ()

    @classmethod
    def read(cls, output_dir: Path, kept: Path | None) -> Results:
        """Return those of a folder, with the rows of a file of ``collect``."""
        return cls(output_dir, read_json(kept, "file of collected results") if kept else ())

    def row(self, cell: Cell, bed: Path) -> Row | None:
        """Return the row of a cell on a bed; None where it has not been run."""
        file = record_of(cell.folder(self.output_dir, bed))
        which = {"bed": bed.name} | cell._asdict()
        if file is None:
            return next((row for row in self.kept if which.items() <= row.items()), None)
        record = load_record(file)
        told = {name: round(value, 2) for name, value in recall(record, str(file)).items()}
        beside = {"label": record["label"], "seconds": round(record["cost"]["seconds"])}
        return which | told | beside | {"revision": record["git_revision"]}


class Grid(NamedTuple):
    """A comparison: which configuration, model and methods file, and the cells of each entry."""

    config: str
    model: str
    methods_file: str
    entries: dict[str, list[Cell]]

    @classmethod
    def read(cls, path: Path, only: Sequence[str]) -> Grid:
        """Read a grid file; see ``read_grid``."""
        given = read_grid(path, only)
        entries = {
            name: [
                Cell(name, entry.get("stream", STREAM), setting, float(rate))
                for setting in entry.get("settings", [name])
                for rate in entry["rates"]
            ]
            for name, entry in given["entries"].items()
        }
        return cls(given["config"], given["model"], given["methods_file"], entries)

    def chosen(self, results: Results, bed: Path) -> Iterator[Cell]:
        """Yield of each entry the cell with the highest mean recall on a bed.

        Raises:
            LoricaError: nothing of an entry has been run there.
        """
        for name, cells in self.entries.items():
            known = {cell: row["all"] for cell in cells if (row := results.row(cell, bed))}
            if not known:
                folder = results.output_dir / bed.name / name
                raise LoricaError(f"{folder}: nothing was run there; run choose on {bed}")
            yield max(known, key=lambda cell: known[cell])

    def run(self, cell: Cell, results: Results, bed: Path) -> None:
        """Run a cell unless that has been done."""
        if results.row(cell, bed) is not None:
            return
        folder = cell.folder(results.output_dir, bed)
        command = [
            sys.executable, "-m", "lorica", "run", bed / cell.stream, "--config", RECIPES / self.config,
            "--model_name_or_path", bed / self.model, "--methods_file", RECIPES / self.methods_file,
            "--methods", cell.setting, "--learning_rates", cell.rate, "--output_dir", folder,
        ]  # fmt: skip
        run_logged(command, folder)


def read_grid(path: Path, only: Sequence[str]) -> dict[str, Any]:
    """Return what a grid file says, of its ``entries`` those asked for, or all.

    Raises:
        LoricaError: an entry that is asked for is not in it.
    """
    given: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = given["entries"]
    if missing := [name for name in only if name not in known]:
        raise LoricaError(f"{path}: no entry {missing[0]}; there are {', '.join(known)}")
    return given | {"entries": {name: entry for name, entry in known.items() if not only or name in only}}


def run_logged(command: Sequence[object], folder: Path) -> None:
    """Run a command whose output goes beside a folder; tell how it ended where it failed."""
    log = folder.with_suffix(folder.suffix + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run([str(word) for word in command], stdout=output, stderr=output, check=False).returncode
    if code:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        print(f"{folder}: ended with {code}: {''.join(last)}", flush=True)


def record_of(folder: Path) -> Path | None:
    """Return the finished record of a cell's run, None where there is none yet."""
    found = list(folder.rglob("run.json"))
    return found[0] if found else None


def collected(grid: Grid, results: Results, beds: Sequence[Path]) -> list[Row]:
    """Return the row of every cell that has been run."""
    found = (results.row(cell, bed) for cells in grid.entries.values() for cell in cells for bed in beds)
    return [row for row in found if row is not None]


def write_results(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a JSON array with a row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["choose", "measure", "collect"])
    parser.add_argument("--grid", type=Path, default=GRID)
    parser.add_argument("--beds", type=Path, nargs="+", required=True, help="folders of knowledge.py, with the model")
    parser.add_argument("--chosen_on", type=Path, help="the bed that settings were chosen on, for measure")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--kept", type=Path, help="JSON file of an earlier collect: what it holds is not run again")
    parser.add_argument("--entries", nargs="+", default=[], help="of the grid; default: all")
    parser.add_argument("--output", type=Path, help="JSON file, for collect")
    run_script(parser, work)


def work(arguments: argparse.Namespace) -> None:
    for needed, by in (("chosen_on", "measure"), ("output", "collect")):
        if arguments.work == by and getattr(arguments, needed) is None:
            raise LoricaError(f"--{needed} is needed to {by}")
    grid = Grid.read(arguments.grid, arguments.entries)
    results = Results.read(arguments.output_dir, arguments.kept)
    if arguments.work == "collect":
        write_results(arguments.output, collected(grid, results, arguments.beds))
        return
    for name, cells in grid.entries.items():
        part = grid._replace(entries={name: cells})
        for cell in cells if arguments.work == "choose" else part.chosen(results, arguments.chosen_on):
            for bed in arguments.beds:
                grid.run(cell, results, bed)
                row = results.row(cell, bed)
                told = "  no record" if row is None else "".join(f"  {what} {row[what]:.1f}" for what in COLUMNS)
                print(f"{bed.name:8} {name:16} {cell.setting:16} {cell.rate:8g}{told}", flush=True)


if __name__ == "__main__":
    main()
