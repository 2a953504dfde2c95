"""The comparison on real text: what is run with which seed, what it is chosen by, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.retention import compare_text

from lorica.methods import METHODS
from lorica.values import read_config
from tests.benchmarks.pretended import call, mistake, pretend_runs

RECIPES = Path(__file__).resolve().parents[2] / "benchmarks" / "retention"
GRIDS = sorted(RECIPES.glob("text-*-grid.yaml"))

VALIDATION = {("loose", 0.1): 30.0, ("loose", 0.2): 50.0, ("tight", 0.1): 60.0, ("tight", 0.2): 40.0}
"""Of each setting and rate of the pretended runs."""


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    entries = {"both": {"settings": ["loose", "tight"], "rates": [0.1, 0.2]}, "broken": {"rates": [0.1, 0.2]}}
    path = tmp_path / "grid.yaml"
    names = {"stream": "s.yaml", "config": "c.yaml", "methods_file": "m.yaml", "seeds": [0, 1, 2]}
    path.write_text(yaml.safe_dump(names | {"entries": entries}, sort_keys=False))
    return path


def record(setting: str, rates: list[float], seed: int) -> dict[str, Any]:
    """Return what a run leaves: with seed s the two tasks end at 10 s and 10 s + 20."""
    told = {f"{rate:g}": {"average_accuracy": VALIDATION[setting, rate], "learning_accuracy": 70.0} for rate in rates}
    best = max(rates, key=lambda rate: VALIDATION[setting, rate])
    sweep = {"selected": best, "selected_by": "average_accuracy", "validation": told}
    ends = [10.0 * seed, 10.0 * seed + 20]
    return {
        "tasks": ["a", "b"], "scores": [[4, 8], [80, 0], ends], "learning_rate": best, "label": setting,
        "sweep": sweep if len(rates) > 1 else None, "cost": {"seconds": 7.4}, "carried_bytes": [0, 12],
        "git_revision": "abc",
    }  # fmt: skip


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Pretend to run; the entry ``broken`` leaves nothing."""
    asked: list[tuple[str, str, str]] = []

    def outcome(command: list[str]) -> dict[str, Any] | str:
        at = command.index("--learning_rates")
        rates = command[at + 1 : command.index("--seeds")]
        setting, seed = command[at - 1], command[command.index("--seeds") + 1]
        asked.append((setting, " ".join(rates), seed))
        return "error: out of luck\n" if setting == "broken" else record(setting, list(map(float, rates)), int(seed))

    pretend_runs(monkeypatch, outcome)
    return asked


def test_what_validates_best_is_run_with_the_other_seeds_and_nothing_runs_twice(
    grid: Path, runs: list[tuple[str, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = ["--grid", grid, "--output_dir", tmp_path / "out"]
    words = ["run", "--data_dir", "d", "--model", "m", *given]
    call(monkeypatch, compare_text, *words)
    assert runs == [
        ("loose", "0.1 0.2", "0"),
        ("tight", "0.1 0.2", "0"),
        ("tight", "0.1", "1"),
        ("tight", "0.1", "2"),
        ("broken", "0.1 0.2", "0"),
    ]
    told = capsys.readouterr().out
    assert "broken: ended with 1: error: out of luck" in told
    assert "broken           no record" in told
    runs.clear()
    call(monkeypatch, compare_text, *words, "--entries", "both")
    assert not runs

    call(monkeypatch, compare_text, "collect", *given, "--output", tmp_path / "kept.json")
    rows = json.loads((tmp_path / "kept.json").read_text())
    measured = [row for row in rows if row["what"] == "measured"]
    assert [(row["seed"], row["setting"], row["rate"], row["all"]) for row in measured] == [
        (0, "tight", 0.1, 10.0), (1, "tight", 0.1, 20.0), (2, "tight", 0.1, 30.0),
    ]  # fmt: skip
    assert measured[1] | {"learned": 55.0, "before": 6.0, "carried": 12, "revision": "abc"} == measured[1]
    tried = {(row["setting"], row["rate"]): row["all"] for row in rows if row["what"] == "tried"}
    assert tried == VALIDATION


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "--data_dir", "d"], "--model is needed to run"),
        (["collect"], "--output is needed to collect"),
        (["collect", "--output", "x", "--entries", "bth"], "no entry bth; there are both, broken"),
    ],
)
def test_a_mistake_ends_with_one_line(
    words: list[str], told: str, grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert told in mistake(monkeypatch, capsys, compare_text, *words, "--grid", grid, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_committed_grids_give_every_entry_as_many_cells_and_ask_for_what_exists(path: Path) -> None:
    grid = compare_text.TextGrid.read(path)
    known = read_config(RECIPES / grid.methods_file)
    assert len(grid.seeds) == 3
    assert (RECIPES / grid.config).exists()
    for entry in grid.entries:
        assert len(entry.settings) * len(entry.rates) == 6, entry.name
        for setting in entry.settings:
            METHODS[known[setting]["method"]].build(known[setting].get("options", {}))
