"""Compare methods on the knowledge beds: choose each one's settings on one bed, measure them on others.

    python -m benchmarks.retention.compare choose --beds BED0 --output_dir OUT
    python -m benchmarks.retention.compare measure --beds BED1 BED2 BED3 --chosen_on BED0 --output_dir OUT
    python -m benchmarks.retention.compare collect --beds BED0 BED1 BED2 BED3 --output_dir OUT --output FILE.json

The grid names for each entry the stream, the settings of the methods file and the learning rates. ``choose`` runs all
of them, each as a `lorica run` of its own, in OUT/BED/ENTRY/SETTING-RATE; ``measure`` runs of each entry what had the
highest mean recall over all sets (``all`` of recall.py) at the end. What is there already is not run again, so both go
on where they were stopped. A run that diverged has no record and is not chosen. ``--entries`` takes a part of the grid.
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
from benchmarks.retention.recall import recall
from lorica.errors import LoricaError
from lorica.json_file import load_record

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

    def chosen(self, output_dir: Path, bed: Path) -> Iterator[Cell]:
        """Yield of each entry the cell with the highest mean recall on a bed.

        Raises:
            LoricaError: nothing of an entry has been run there.
        """
        for name, cells in self.entries.items():
            known = {cell: told["all"] for cell in cells if (told := figures(cell, output_dir, bed))}
            if not known:
                raise LoricaError(f"{output_dir / bed.name / name}: nothing was run there; run choose on {bed}")
            yield max(known, key=lambda cell: known[cell])

    def run(self, cell: Cell, output_dir: Path, bed: Path) -> None:
        """Run a cell unless its record is there."""
        folder = cell.folder(output_dir, bed)
        if record_of(folder) is not None:
            return
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


def figures(cell: Cell, output_dir: Path, bed: Path) -> dict[str, float]:
    """Return what recall.py says of a cell; nothing where it has no record."""
    file = record_of(cell.folder(output_dir, bed))
    return recall(load_record(file), str(file)) if file else {}


def collected(grid: Grid, output_dir: Path, beds: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the figures of every cell that has been run, with what they were measured by."""
    found = []
    for cells in grid.entries.values():
        for bed, cell in ((bed, cell) for cell in cells for bed in beds):
            file = record_of(cell.folder(output_dir, bed))
            if file is None:
                continue
            record = load_record(file)
            told = {name: round(value, 2) for name, value in recall(record, str(file)).items()}
            beside = {"label": record["label"], "seconds": round(record["cost"]["seconds"]),
                      "revision": record["git_revision"]}  # fmt: skip
            found.append({"bed": bed.name} | cell._asdict() | told | beside)
    return found


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
    parser.add_argument("--entries", nargs="+", default=[], help="of the grid; default: all")
    parser.add_argument("--output", type=Path, help="JSON file, for collect")
    run_script(parser, work)


def work(arguments: argparse.Namespace) -> None:
    for needed, by in (("chosen_on", "measure"), ("output", "collect")):
        if arguments.work == by and getattr(arguments, needed) is None:
            raise LoricaError(f"--{needed} is needed to {by}")
    grid, out = Grid.read(arguments.grid, arguments.entries), arguments.output_dir
    if arguments.work == "collect":
        write_results(arguments.output, collected(grid, out, arguments.beds))
        return
    for name, cells in grid.entries.items():
        part = grid._replace(entries={name: cells})
        for cell in cells if arguments.work == "choose" else part.chosen(out, arguments.chosen_on):
            for bed in arguments.beds:
                grid.run(cell, out, bed)
                told = "".join(f"  {what} {value:.1f}" for what, value in figures(cell, out, bed).items())
                print(f"{bed.name:8} {name:16} {cell.setting:16} {cell.rate:8g}{told or '  no record'}", flush=True)


if __name__ == "__main__":
    main()
