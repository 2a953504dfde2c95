"""The comparison on the knowledge beds: which cells are run, which is chosen, and what the page makes of it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from benchmarks.retention import compare
from benchmarks.retention.skills import SKILLS

from lorica.json_file import sealed
from lorica.methods import METHODS
from lorica.values import read_config

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

    def pretend(command: list[str], **given: Any) -> SimpleNamespace:
        words = dict(zip(command[5::2], command[6::2], strict=True))
        asked.append(
            (Path(command[4]).name, Path(command[4]).parent.name, words["--methods"], words["--learning_rates"])
        )
        if words["--methods"] == "held":
            given["stdout"].write("starting\nerror: the loss is nan\n")
            return SimpleNamespace(returncode=1)
        made = sealed(record(100 * float(words["--learning_rates"])))
        file = Path(words["--output_dir"]) / "run.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(made))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(compare.subprocess, "run", pretend)
    return asked


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["compare", *map(str, words)])
    compare.main()


def test_the_best_cell_of_each_entry_is_measured_and_nothing_runs_twice(
    grid: Path, runs: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, beds = tmp_path / "out", [tmp_path / "k0", tmp_path / "k1"]
    given = ["--grid", grid, "--output_dir", out]
    call(monkeypatch, "choose", "--beds", beds[0], *given)
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
    call(monkeypatch, "measure", "--beds", beds[1], "--chosen_on", beds[0], *given)
    assert runs == [("stream.yaml", "k1", "plain", "0.2"), ("mixed-5.yaml", "k1", "plain", "0.1")]
    call(monkeypatch, "measure", "--beds", beds[1], "--chosen_on", beds[0], *given, "--entries", "plain")
    assert len(runs) == 2

    call(monkeypatch, "collect", "--beds", *beds, *given, "--output", tmp_path / "kept" / "knowledge.json")
    kept = json.loads((tmp_path / "kept" / "knowledge.json").read_text())
    assert [(row["bed"], row["entry"], row["rate"], row["all"]) for row in kept] == [
        ("k0", "plain", 0.1, 10.0),
        ("k0", "plain", 0.2, 20.0),
        ("k1", "plain", 0.2, 20.0),
        ("k0", "mixed", 0.1, 10.0),
        ("k1", "mixed", 0.1, 10.0),
    ]
    assert kept[0]["revision"] == "abc"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["measure", "--beds", "k1", "--chosen_on", "k0"], "nothing was run there; run choose on k0"),
        (["measure", "--beds", "k1"], "--chosen_on is needed"),
        (["collect", "--beds", "k1"], "--output is needed"),
        (["choose", "--beds", "k1", "--entries", "plian"], "no entry plian; there are plain, mixed"),
    ],
)
def test_a_mistake_ends_with_one_line(
    words: list[str], told: str, grid: Path, runs: list[tuple[str, ...]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(SystemExit):
        call(monkeypatch, *words, "--grid", grid, "--output_dir", tmp_path / "out")
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not runs


FEWER = {"replay-1": 3, "replay-5": 3, "replay-20": 3, "joint": 3} | {
    "rehearse": 2, "rehearse-light": 2, "rehearse-weight": 2, "rehearse-free": 1,
}  # fmt: skip


def test_the_committed_grid_gives_every_entry_as_many_cells_and_asks_for_what_exists() -> None:
    grid = compare.Grid.read(compare.GRID, [])
    known = read_config(RECIPES / grid.methods_file)
    for name, cells in grid.entries.items():
        assert len(cells) == FEWER.get(name, 6), name
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


def test_the_committed_page_is_what_the_script_makes_of_the_results(page: Any) -> None:
    if not page.KEPT.exists():
        pytest.skip("no results are kept yet")
    found = page.entries(json.loads(page.KEPT.read_text(encoding="utf-8")))
    text = page.PAGE.read_text(encoding="utf-8")
    for table in (page.results_table(found), page.tried_table(found)):
        assert table in text
    assert page.PICTURE.read_text(encoding="utf-8") == page.picture(found)
