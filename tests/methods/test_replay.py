"""Experience replay: which rows are kept, what is trained on, and what the state holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lorica.data.collate import Collator
from lorica.errors import LoricaError
from lorica.methods.replay import Replay, StoredRows, joined, pack
from lorica.methods.seqft import SeqFT
from lorica.methods.task import Rows, TaskData
from tests.builders import task_of, tiny

MODEL = nn.Linear(2, 2)


def listed(rows: Rows) -> list[dict[str, Any]]:
    return [rows[index] for index in range(len(rows))]  # type: ignore[arg-type]


def task(index: int, rows: int, seed: int = 0) -> TaskData:
    """Return a task whose rows differ in length and hold their own task and number."""
    data: Any = [{"input_ids": [index, row, *range(row % 3)], "labels": [-100, index, row]} for row in range(rows)]
    return TaskData(str(index), index, 3, data, Collator(seq2seq=True, pad_token_id=0), seed)


def after(method: Replay, *tasks: TaskData) -> Replay:
    for one in tasks:
        method.end_task(MODEL, one)
    return method


@pytest.mark.parametrize(
    ("ratio", "rows", "kept"), [(0.1, 30, 3), (0.1, 4, 1), (0.5, 7, 4), (0.0, 30, 0), (1.0, 5, 5), (0.02, 100, 2)]
)
def test_how_many_rows_are_kept(ratio: float, rows: int, kept: int) -> None:
    method = after(Replay.build({"ratio": ratio}), task(0, rows))
    new = task(1, 6)
    assert len(listed(method.training_data(new))) == 6 + kept


def test_the_rows_of_the_third_task() -> None:
    first, second, third = task(0, 20), task(1, 10), task(2, 6)
    method = Replay.build({"ratio": 0.2})
    assert method.training_data(first) is first.rows
    after(method, first)
    drawn = [listed(one.rows)[i] for one in (first, second) for i in one.sample({0: 4, 1: 2}[one.index])]
    assert listed(method.training_data(second)) == listed(second.rows) + drawn[:4]
    after(method, second)
    assert listed(method.training_data(third)) == listed(third.rows) + drawn
    assert method.state_dict()["rows.task"].tolist() == [0, 0, 0, 0, 1, 1]
    assert [row["input_ids"][:2] for row in drawn] != [[0, i] for i in range(4)] + [[1, i] for i in range(2)], (
        "drawn by seed, not the first ones"
    )


def test_what_is_kept_is_kept_of_the_task_not_of_what_was_replayed() -> None:
    method = after(Replay.build({"ratio": 1.0}), task(0, 4), task(1, 3))
    assert method.state_dict()["rows.task"].tolist() == [0] * 4 + [1] * 3
    kept = listed(method.training_data(task(2, 2)))[2:]
    assert kept == listed(task(0, 4).rows) + listed(task(1, 3).rows)


def test_the_draw_is_the_seeds_alone() -> None:
    states = []
    for process_seed, seed in ((1, 0), (2, 0), (2, 5)):
        torch.manual_seed(process_seed)
        method = after(Replay.build({}), task(0, 40, seed))
        before = torch.get_rng_state()
        method.training_data(task(1, 3, seed))
        after(method, task(1, 40, seed))
        assert torch.equal(before, torch.get_rng_state())
        states.append(method.state_dict())
    same, alike, other = (state["rows.labels"].tolist() for state in states)
    assert same == alike
    assert same != other


def test_nothing_kept_is_sequential_fine_tuning() -> None:
    """The same rows object, so the same order of batches; every other hook is inherited."""
    method = after(Replay.build({"ratio": 0}), task(0, 30))
    new = task(1, 6)
    assert method.training_data(new) is new.rows
    assert method.state_dict() == {}
    assert {name for name, value in vars(Replay).items() if callable(value) and name in vars(SeqFT)} == {"end_task"}


def test_the_model_is_plain_again() -> None:
    model = tiny("llama", torch.bfloat16)
    keys, one = list(model.state_dict()), task_of(model)
    method = Replay.build({})
    method.begin_task(model, one)
    assert list(model.state_dict()) != keys
    method.end_task(model, one)
    assert list(model.state_dict()) == keys


def test_a_stream_goes_on_from_its_state(tmp_path: Path) -> None:
    method = after(Replay.build({"ratio": 0.3}), task(0, 11), task(1, 8))
    state = method.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.int32}
    save_file(state, tmp_path / "state.safetensors")
    other = Replay.build({"ratio": 0.3})
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    last = task(2, 5)
    assert listed(other.training_data(last)) == listed(method.training_data(last))
    one, two = after(method, last).state_dict(), after(other, last).state_dict()
    assert set(one) == set(two)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_state_before_any_task_is_empty(tmp_path: Path) -> None:
    save_file(Replay.build({}).state_dict(), tmp_path / "state.safetensors")
    other = Replay.build({})
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    first = task(0, 5)
    assert other.training_data(first) is first.rows


@pytest.mark.parametrize("name", ["llama", "t5", "bert-classifier"])
def test_old_and_new_rows_make_a_batch_of_the_model(name: str) -> None:
    model = tiny(name)
    method = after(Replay.build({"ratio": 0.25}), task_of(model, index=0))
    new = task_of(model, index=1)
    rows = listed(method.training_data(new))
    assert len(rows) == 12 + 3
    old = task_of(model, index=0)
    assert rows[12:] == [old.rows[index] for index in old.sample(3)]
    assert model(**new.collate(rows)).loss.isfinite()


Field = st.lists(st.lists(st.integers(-100, 200_000), max_size=5), min_size=6, max_size=6)


@given(Field, Field, st.lists(st.integers(0, 9), min_size=6, max_size=6), st.integers(0, 6))
def test_rows_come_back_as_they_went_in(
    ids: list[list[int]], labels: list[list[int]], classes: list[int], cut: int
) -> None:
    rows: Any = [
        {"input_ids": i, "labels": j, "class": c} for i, j, c in zip(ids, labels, classes, strict=True)
    ]  # lists of any length, also none, and a plain number
    stored = StoredRows(joined(pack(rows[:cut], 0), pack(rows[cut:], 1)))
    assert len(stored) == 6
    assert listed(stored) == rows
    assert stored.tensors["task"].tolist() == [0] * cut + [1] * (6 - cut)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_values_out_of_range(ratio: float) -> None:
    with pytest.raises(LoricaError, match=r"ratio = .*out of range"):
        Replay.build({"ratio": ratio})
