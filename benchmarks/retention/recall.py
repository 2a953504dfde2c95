"""Tell how much of all sets is known at the end: of those that were learned one after the other, and of the base's own.

    python -m benchmarks.retention.recall OUT...

reads every ``run.json`` below the folders. In percent, at the end of the stream: ``all`` is the mean over all sets, the
base's own among them; ``base`` that of its own set; ``skills`` the mean of the skills. ``learned`` is the mean of the
sets that came after, each right after it was learned; ``s`` the seconds of the run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.retention.bed import run_script
from benchmarks.retention.skills import SKILLS
from lorica.errors import LoricaError
from lorica.json_file import load_record
from lorica.scores import ScoreMatrix

COLUMNS = ("all", "learned", "base", "skills")


def recall(record: Mapping[str, Any], where: str) -> dict[str, float]:
    """Return what a run's record says by the names of ``COLUMNS``, percent.

        all = (sum of the last row of the score matrix + base) / (T + 1)

    Raises:
        LoricaError: the run is not of a retention bed, or was not scored to its end.
    """
    matrix = ScoreMatrix.from_json(record, where=where)
    kept = record.get("retention", {})
    if missing := [name for name in ("facts-0", *SKILLS) if name not in kept]:
        raise LoricaError(f"{where}: no run of a retention bed: nothing is held out as {missing[0]}")
    average, learned = ends(matrix, where)
    base, tasks = kept["facts-0"][-1], len(matrix.tasks)
    return {
        "all": (average * tasks + base) / (tasks + 1),
        "learned": learned,
        "base": base,
        "skills": sum(kept[skill][-1] for skill in SKILLS) / len(SKILLS),
    }


def ends(matrix: ScoreMatrix, where: str) -> tuple[float, float]:
    """Return the mean score of all tasks at the end, and of each right after it was learned.

    Raises:
        LoricaError: the run was not scored to its end.
    """
    average, learned = matrix.average_accuracy, matrix.learning_accuracy
    if average is None or learned is None:
        raise LoricaError(f"{where}: the run was not scored to its end")
    return average, learned


def line(file: Path) -> str:
    """Return the row of a run in the table."""
    try:
        record: dict[str, Any] = load_record(file)
    except (OSError, ValueError) as error:
        raise LoricaError(f"{file}: cannot read it: {error}; remove it and run that method again") from error
    values = recall(record, str(file))
    figures = "".join(f"{values[name]:8.1f}" for name in COLUMNS)
    return f"{file.parent!s:48.48} {record['learning_rate']:8g} {figures} {record['cost']['seconds']:7.0f}"


def table(folders: Iterable[Path]) -> str:
    """Return one row for each run below the folders.

    Raises:
        LoricaError: there is none in one of them, or one is not of a retention bed.
    """
    lines = [f"{'run':48} {'rate':>8} {''.join(f'{name:>8}' for name in COLUMNS)} {'s':>7}"]
    for folder in folders:
        found = sorted(folder.rglob("run.json"))
        if not found:
            raise LoricaError(f"{folder}: no run.json below it")
        lines += map(line, found)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dirs", type=Path, nargs="+", help="what --output_dir of lorica run was")
    run_script(parser, lambda arguments: print(table(arguments.output_dirs)))


if __name__ == "__main__":
    main()
