"""The comparison on the knowledge beds: which cells are run, which is chosen, and what the page makes of it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.retention import compare
from benchmarks.retention.skills import SKILLS

from lorica.methods import METHODS
from lorica.values import read_config
from tests.benchmarks.pretended import call, mistake, pretend_runs

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "benchmarks" / "retention"


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    entries = {
        "plain": {"rates": [0.1, 0.2]},
        "mixed": {"stream": "mixed-5.yaml", "settings": ["plain", "held"], "rates": [0.1]},
    }
    path = tmp_path / "grid.yaml"
    path.write_text(
        yaml.safe_dump(
            {"config": "c.yaml", "model": "1m", "methods_file": "m.yaml", "entries": entries}, sort_keys=False
        )
    )
    return path


def record(everything: float) -> dict[str, Any]:
    """Return what a run leaves whose recall at the end is the same on all sets."""
    held_out = {"facts-0": [100, everything]} | {skill: [100, 50] for skill in SKILLS}
    return {
        "tasks": ["a"], "scores": [[0], [everything]], "retention": held_out, "learning_rate": 0.1, "label": "a label",
        "cost": {"seconds": 7.4}, "git_revision": "abc",
    }  # fmt: skip


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Pretend to run cells: what a cell recalls is 100 x its rate, and ``held`` diverges."""
    asked: list[tuple[str, ...]] = []

    def outcome(command: list[str]) -> dict[str, Any] | str:
        words = dict(zip(command[5::2], command[6::2], strict=True))
        asked.append(
            (Path(command[4]).name, Path(command[4]).parent.name, words["--methods"], words["--learning_rates"])
        )
        if words["--methods"] == "held":
            return "starting\nerror: the loss is nan\n"
        return record(100 * float(words["--learning_rates"]))

    pretend_runs(monkeypatch, outcome)
    return asked


def test_the_best_cell_of_each_entry_is_measured_and_nothing_runs_twice(
    grid: Path, runs: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, beds = tmp_path / "out", [tmp_path / "k0", tmp_path / "k1"]
    given = ["--grid", grid, "--output_dir", out]
    call(monkeypatch, compare, "choose", "--beds", beds[0], *given)
    assert runs == [
        ("stream.yaml", "k0", "plain", "0.1"),
        ("stream.yaml", "k0", "plain", "0.2"),
        ("mixed-5.yaml", "k0", "plain", "0.1"),
        ("mixed-5.yaml", "k0", "held", "0.1"),
    ]
    told = capsys.readouterr().out
    assert "held-0.1: ended with 1: error: the loss is nan" in told
    assert "all 20.0  learned 20.0  base 20.0  skills 50.0" in told

    runs.clear()
    call(monkeypatch, compare, "measure", "--beds", beds[1], "--chosen_on", beds[0], *given)
    assert runs == [("stream.yaml", "k1", "plain", "0.2"), ("mixed-5.yaml", "k1", "plain", "0.1")]
    call(monkeypatch, compare, "measure", "--beds", beds[1], "--chosen_on", beds[0], *given, "--entries", "plain")
    assert len(runs) == 2

    call(monkeypatch, compare, "collect", "--beds", *beds, *given, "--output", tmp_path / "kept" / "knowledge.json")
    kept = json.loads((tmp_path / "kept" / "knowledge.json").read_text())
    assert [(row["bed"], row["entry"], row["rate"], row["all"]) for row in kept] == [
        ("k0", "plain", 0.1, 10.0),
        ("k0", "plain", 0.2, 20.0),
        ("k1", "plain", 0.2, 20.0),
        ("k0", "mixed", 0.1, 10.0),
        ("k1", "mixed", 0.1, 10.0),
    ]
    assert kept[0]["revision"] == "abc"


def test_what_an_earlier_collect_holds_is_not_run_again(
    grid: Path, runs: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beds, file = [tmp_path / "k0", tmp_path / "k1"], tmp_path / "kept.json"
    there = ["--grid", grid, "--entries", "plain"]
    call(monkeypatch, compare, "choose", "--beds", beds[0], *there, "--output_dir", tmp_path / "there")
    call(monkeypatch, compare, "collect", "--beds", beds[0], *there, "--output_dir", tmp_path / "there",
         "--output", file)  # fmt: skip
    runs.clear()
    here = ["--grid", grid, "--output_dir", tmp_path / "here", "--kept", file]
    call(monkeypatch, compare, "choose", "--beds", beds[0], *here)
    assert [run[2:] for run in runs] == [("plain", "0.1"), ("held", "0.1")], "of the other entry alone"
    runs.clear()
    call(monkeypatch, compare, "measure", "--beds", beds[1], "--chosen_on", beds[0], *here, "--entries", "plain")
    assert runs == [("stream.yaml", "k1", "plain", "0.2")], "the best of what was kept"
    call(monkeypatch, compare, "collect", "--beds", *beds, *here, "--output", file)
    assert [(row["bed"], row["entry"], row["all"]) for row in json.loads(file.read_text())] == [
        ("k0", "plain", 10.0), ("k0", "plain", 20.0), ("k1", "plain", 20.0), ("k0", "mixed", 10.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["measure", "--beds", "k1", "--chosen_on", "k0"], "nothing was run there; run choose on k0"),
        (["measure", "--beds", "k1"], "--chosen_on is needed"),
        (["collect", "--beds", "k1"], "--output is needed"),
        (["choose", "--beds", "k1", "--entries", "plian"], "no entry plian; there are plain, mixed"),
        (["choose", "--beds", "k1", "--kept", "none.json"], "none.json"),
    ],
)
def test_a_mistake_ends_with_one_line(
    words: list[str], told: str, grid: Path, runs: list[tuple[str, ...]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert told in mistake(monkeypatch, capsys, compare, *words, "--grid", grid, "--output_dir", tmp_path / "out")
    assert not runs


PRESETS = {"everything": 1, "retain": 1, "not-remembering": 1}
FEWER = {"replay-1": 3, "replay-5": 3, "replay-20": 3, "joint": 3} | PRESETS | {
    "rehearse": 2, "held-rehearse": 2, "rehearse-light": 2, "rehearse-weight": 2, "rehearse-free": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "fewer"),
    [
        ("knowledge-grid.yaml", FEWER),
        ("many-grid.yaml", {"replay-5": 3, "held": 3, "held-rehearse": 1} | PRESETS),
    ],
)
def test_the_committed_grids_give_every_entry_as_many_cells_and_ask_for_what_exists(
    file: str, fewer: dict[str, int]
) -> None:
    grid = compare.Grid.read(RECIPES / file, [])
    known = read_config(RECIPES / grid.methods_file)
    for name, cells in grid.entries.items():
        assert len(cells) == fewer.get(name, 6), name
        for cell in cells:
            METHODS[known[cell.setting]["method"]].build(known[cell.setting].get("options", {}))


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("retention_page")


def cell(entry: str, bed: str, everything: float, rate: float = 0.1) -> dict[str, Any]:
    return {
        "bed": bed, "entry": entry, "stream": "stream.yaml", "setting": entry, "rate": rate, "all": everything,
        "learned": 90.0, "base": 10.0, "skills": 50.0, "label": entry, "seconds": 60, "revision": "abc",
    }  # fmt: skip


def test_the_page_shows_the_beds_that_nothing_was_chosen_on(page: Any) -> None:
    found = page.entries(
        [cell("worse", "k0", 99), cell("worse", "k1", 20), cell("worse", "k2", 40), cell("better", "k0", 50, 0.1),
         cell("better", "k0", 60, 0.2), cell("better", "k1", 50), cell("better", "k2", 54), cell("tried", "k0", 1)]
    )  # fmt: skip
    assert [one.name for one in found] == ["better", "worse"], "an entry that was only tried has no result"
    table = page.results_table(found)
    assert "52.0 ± 2.8" in table, "the standard deviation of 50 and 54"
    assert "30.0 ± 14.1" in table
    tried = [line for line in page.tried_table(found).splitlines() if "chosen" in line]
    assert len(tried) == 2
    assert "0.2" in tried[0]
    assert page.picture(found).count("<title>") >= 4


def test_the_committed_pages_are_what_the_script_makes_of_the_results(page: Any) -> None:
    made = page.files()
    assert len(made) > 1, "the page and a picture"
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, path.name


def test_the_text_tables_tell_the_chosen_setting_and_every_seed(page: Any) -> None:
    tables = importlib.import_module("retention_text")
    tried = [
        {"what": "tried", "entry": entry, "setting": entry, "rate": rate, "all": score, "learned": 50.0}
        for entry, rate, score in [("good", 0.1, 60.0), ("good", 0.2, None), ("bad", 0.1, 20.0), ("bad", 0.2, 30.0)]
    ]
    beside = {"label": "a name", "carried": 0, "seconds": 9, "learned": 70.0}
    measured = [
        {"what": "measured", "entry": entry, "setting": entry, "rate": 0.1, "seed": seed, "all": score} | beside
        for entry, seed, score in [("bad", 0, 20.0), ("good", 0, 60.0), ("good", 1, 64.0)]
    ]
    first, second = tables.measured_table([*tried, *measured]).splitlines()[2:]
    assert "62.0 ± 2.8" in first, "the standard deviation of 60 and 64"
    assert "| 20.0 |" in second
    chosen = [line for line in tables.validated_table([*tried, *measured]).splitlines() if "chosen" in line]
    assert len(chosen) == 2
    assert "60.0" in chosen[0]
    assert "30.0" in chosen[1]
