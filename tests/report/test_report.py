"""A report says what the record says, and a figure that was no number is a gap, never a crash."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorica.errors import LoricaError
from lorica.report import read_record, write_report

Make = Callable[..., dict[str, Any]]
Path_ = tuple[str | int, ...]


def figures(value: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Yield where the floats of a record stand; of a list only the first, the second and the last item."""
    if isinstance(value, float):
        yield at
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from figures(item, (*at, key))
    elif isinstance(value, list):
        for index in sorted({0, 1, len(value) - 1} & set(range(len(value)))):
            yield from figures(value[index], (*at, index))


def without(record: dict[str, Any], at: Path_) -> dict[str, Any]:
    changed = copy.deepcopy(record)
    place: Any = changed
    for key in at[:-1]:
        place = place[key]
    place[at[-1]] = None
    return changed


def markdown(record: dict[str, Any], folder: Path) -> str:
    assert write_report([record], folder).read_text().count("<svg") > 1
    return (folder / "report.md").read_text()


@pytest.mark.parametrize("kind", ["run", "train"])
def test_any_figure_may_be_null(kind: str, make_run: Make, make_train: Make, tmp_path: Path) -> None:
    record = make_run() if kind == "run" else make_train()
    places = [at for at in figures(record) if at[-1] != "share"]  # k / min(M, N) is always a number
    assert len(places) > 20
    for at in places:
        assert "nan" not in markdown(without(record, at), tmp_path).lower(), at


def test_all_scores_may_be_null(make_run: Make, tmp_path: Path) -> None:
    text = markdown(make_run(scores=[[None] * 5] * 6, retention={"world facts": [None] * 6}), tmp_path)
    assert "has no complete score" in text


def test_a_null_loss_is_a_gap(make_train: Make, tmp_path: Path) -> None:
    losses = [2.5, None, 1.25, None]
    curve = [{"step": step, "loss": loss, "learning_rate": 1e-3} for step, loss in enumerate(losses, 1)]
    text = markdown(make_train(loss_curve=curve), tmp_path)
    assert "over 4 steps, from 2.500 to -" in text
    assert "| 2 | - | 1.0e-03 |" in text
    assert "| 3 | 1.2500 | 1.0e-03 |" in text


def test_a_curve_without_any_number_is_said_to_be_one(make_train: Make, tmp_path: Path) -> None:
    text = markdown(make_train(loss_curve=[{"step": 1, "loss": None}]), tmp_path)
    assert "The loss was no number at any step." in text


def test_data_shows_what_says_something(make_train: Make, tmp_path: Path) -> None:
    text = markdown(make_train(), tmp_path)
    section = text.split("## The data")[1].split("##")[0]
    for cell in (
        "| path | facts.jsonl |",
        "| kept | 1800 |",
        "| rejected | 3 |",
        "| notices | no row trains the end |",
    ):
        assert cell in section
    for empty in ("duplicates", "truncated", "reasons"):
        assert empty not in section
    for name, path, rows in (("new data, scored", "facts.test.jsonl", 200), ("held out atlas", "atlas.jsonl", 100)):
        assert f"| {name}: path | {path} |" in section
        assert f"| {name}: rows | {rows} |" in section
        assert f"| {name}: sha256 | sha256 of {path} |" in section
    assert section.count("format") == 1


def test_an_update_without_evaluation_files(make_train: Make, tmp_path: Path) -> None:
    record = make_train(data={"train": {"path": "facts.jsonl"}, "eval": None, "retention": {}}, scores={})
    text = markdown(record, tmp_path)
    assert "| path | facts.jsonl |" in text
    assert "nothing was measured before and after" in text


def test_an_infinite_or_nan_literal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"schema": 1, "kind": "run", "scores": [[NaN]]}')
    with pytest.raises(LoricaError, match=r"run\.json: not a run record: NaN is no JSON number"):
        read_record(path)
