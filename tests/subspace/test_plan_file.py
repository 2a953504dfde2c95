from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorica.errors import LoricaError
from lorica.subspace.factor import Factor, Factors
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import Constraint, PlanEntry


def plan() -> Plan:
    return Plan(
        family="llama",
        entries=[
            PlanEntry(name="a", shape=(6, 4), k=3, why="by hand"),
            PlanEntry(name="b", shape=(6, 4), k=4, constraint="output"),
            PlanEntry(name="c", shape=(3, 8), k=8, source="activation", constraint="input"),
            PlanEntry(name="d", shape=(6, 4), k=1, source="hybrid", learned=(2, 1), why="by hand"),
        ],
        train_also=["norm"],
    )


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan()


def test_the_file_has_one_line_per_weight(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text(encoding="utf-8").splitlines()
    assert sum('"name"' in line for line in lines) == 4


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_degrees_of_freedom_are_the_rank_of_the_feasible_set(m: int, n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, min(m, n)))
    free = {
        c: PlanEntry(name="w", shape=(m, n), k=k, constraint=c).free for c in ("two-sided", "input", "output", "block")
    }
    assert free["two-sided"] <= min(free["input"], free["output"])
    assert free["input"] + free["output"] - free["two-sided"] == free["block"]  # inclusion and exclusion


def _edited(tmp_path: Path, edit: Any) -> Path:
    path = tmp_path / "plan.json"
    plan().save(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["entries"][0].update(kk=1), r"entries\.0\.kk: Extra inputs are not permitted"),
        (lambda d: d["entries"][0].update(k=5), r"a: k = 5 is out of range for shape \(6, 4\): 0 to 4"),
        (lambda d: d["entries"][0].update(k=-1), r"entries\.0\.k: .*greater than or equal to 0"),
        (lambda d: d["entries"][0].update(k=float("nan")), r"entries\.0\.k"),
        (lambda d: d["entries"][1].update(constraint="both"), r"entries\.1\.constraint"),
        (lambda d: d["entries"][2].update(constraint="two-sided"), "source 'activation' knows directions"),
        (lambda d: d["entries"][3].update(constraint="block"), "source 'hybrid' is for constraint 'input'"),
        (lambda d: d["entries"][3].update(k=5), r"d: k = 5 is out of range for shape \(6, 4\): 0 to 4"),
        (lambda d: d["entries"][3].update(learned=[6, 0]), r"d: learned = \[6, 0\] does not fit shape \(6, 4\)"),
        (lambda d: d["entries"][3].update(learned=[0, -1]), r"d: learned = \[0, -1\] does not fit"),
        (lambda d: d["entries"][1].update(learned=[0, 1]), r"b: learned = \[0, 1\] .* constraint 'output'"),
        (lambda d: d["entries"][2].update(learned=[1, 0]), r"c: learned = \[1, 0\] .* constraint 'input'"),
        (lambda d: d["entries"][1].update(name="a"), "a is planned twice"),
        (lambda d: d["entries"][0].pop("shape"), r"entries\.0\.shape: Field required"),
        (lambda d: d.update(schema_version=2), "schema_version"),
        (lambda d: d["entries"].clear(), "entries is empty: a plan names at least one weight"),
    ],
)
def test_a_wrong_edit_is_named(tmp_path: Path, edit: Any, message: str) -> None:
    path = _edited(tmp_path, edit)
    with pytest.raises(LoricaError, match=message) as caught:
        Plan.load(path)
    assert str(caught.value).startswith(f"{path}: not a plan: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"entries": 3}', "\x00"])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LoricaError, match="not a plan"):
        Plan.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoricaError, match=r"nothing\.json: cannot read the plan: No such file"):
        Plan.load(tmp_path / "nothing.json")


def test_the_table_has_a_row_per_weight_and_the_totals() -> None:
    text = str(plan())
    assert [line.split()[0] for line in text.splitlines()[1:5]] == ["a", "b", "c", "d"]
    assert "96 numbers, 17 free (17.7%); trained freely as well: norm" in text
    assert "by hand; learned before: 2 output, 1 input directions" in text


def test_learned_directions_are_not_free() -> None:
    free = {c: PlanEntry(name="w", shape=(6, 4), k=1, constraint=c).free for c in get_args(Constraint)}
    assert free == {"two-sided": 15, "input": 18, "output": 20, "block": 23}
    learned = {"two-sided": (2, 1), "input": (0, 1), "output": (2, 0), "block": (2, 1)}
    free = {c: PlanEntry(name="w", shape=(6, 4), k=1, constraint=c, learned=learned[c]).free for c in learned}
    assert free == {"two-sided": 3 * 2, "input": 6 * 2, "output": 3 * 4, "block": 24 - 3 * 2}


def test_an_older_file_knows_no_learned_directions(tmp_path: Path) -> None:
    path = _edited(tmp_path, lambda d: [entry.pop("learned") for entry in d["entries"]])
    assert {entry.learned for entry in Plan.load(path).entries} == {(0, 0)}


def test_what_is_measured_is_attached_to_a_copy() -> None:
    bare = plan()
    pair = torch.eye(6)[:, :5], torch.eye(4)[:, :2]
    attached = bare.with_measured(
        factors={"a": Factors(inputs=Factor.of(torch.eye(4)))}, learned={"a": pair, "b": pair}
    )
    assert [entry.learned for entry in attached.entries] == [(3, 1), (2, 0), (0, 0), (0, 0)]  # a has room for (3, 1)
    assert attached.learned("a") is pair
    assert attached.factors("a") is not None
    assert bare.learned("a") is bare.factors("a") is None
    assert bare == plan()
    again = attached.with_measured(learned={})
    assert again.factors("a") is not None
    assert again.learned("a") is None
    assert {entry.learned for entry in again.entries} == {(0, 0)}
