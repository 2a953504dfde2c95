"""How much a model writes before a task, where that is left to the task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorica
from lorica.config import build_config
from lorica.errors import LoricaError
from lorica.forecast.batches import batches_of
from lorica.forecast.measuring import shown
from lorica.forecast.options import build_forecast_config
from lorica.forecast.protection import measured
from lorica.forecast.story import forecast
from lorica.inputs import Inputs
from lorica.memory import load_memory, load_one
from lorica.methods import METHODS, own_texts
from lorica.methods.own_texts import FEWEST, LONGEST, MOST, SHORTEST, TIMES, Extent, amount_for, extent_of
from lorica.methods.rehearsal import Rehearsal
from lorica.subspace.calibration import TOGETHER, WRITTEN_TOGETHER, written_together
from lorica.training.arguments import training_arguments
from lorica.training.models import load_model_config, load_tokenizer
from lorica.update import train
from tests.builders import BatchRows, task_of, tiny
from tests.training.conftest import llama_folder, rows  # noqa: F401

NEEDED = {"model_name_or_path": "m", "train_file": "t", "output_dir": "o"}
SETTLED = {"rehearse": 0.5, "rehearse_tokens": 200, "rehearse_length": 20}


def asked(**options: Any) -> Any:
    every = {"rehearse_tokens": "auto", "rehearse_length": "auto", "calibration": None, "calibration_tokens": None}
    return SimpleNamespace(**every | options)


def tokens_for(options: Any, tokens: int) -> int:
    return amount_for(options, Extent(tokens, 0)).tokens


class Rows(list[int]):
    """Rows of some lengths, that note which of them are looked at."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__(lengths)
        self.seen: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.seen.append(index)
        tokens = [0] * super().__getitem__(index)
        return {"input_ids": tokens, "labels": tokens}


@given(st.integers(0, 10 * MOST), st.integers(0, 10 * MOST), st.integers(0, 2 * MOST))
def test_more_rows_want_more_text_within_bounds(some: int, more: int, at_least: int) -> None:
    fewer, many = tokens_for(asked(), some), tokens_for(asked(), some + more)
    assert FEWEST <= fewer <= many <= MOST == amount_for(asked(), None).tokens
    assert fewer in (FEWEST, TIMES * some, MOST)
    beside = {"calibration_tokens": at_least}
    for own in ({}, {"calibration": "self"}):
        assert tokens_for(asked(**beside, **own), some) == max(fewer, at_least), "what calibrates is among them"
    assert tokens_for(asked(**beside, calibration="random"), some) == fewer
    assert tokens_for(asked(rehearse_tokens=17, **beside), some) == 17, "a number is a number"


@given(st.integers(0, 2 * LONGEST))
def test_texts_are_as_long_as_rows_within_bounds(longest: int) -> None:
    length = amount_for(asked(), Extent(0, longest)).length
    assert SHORTEST <= length <= LONGEST == amount_for(asked(), None).length
    assert length in (SHORTEST, longest, LONGEST)
    assert amount_for(asked(rehearse_length=17), Extent(0, longest)).length == 17, "a number is a number"


@given(st.lists(st.integers(1, MOST // 8), max_size=20), st.integers(0, 2 * LONGEST))
def test_looking_ends_where_it_makes_no_difference(lengths: list[int], before: int) -> None:
    rows = Rows(lengths)
    found = extent_of(rows, before)  # type: ignore[arg-type]
    looked = lengths[: len(rows.seen)]
    assert found == Extent(sum(looked), max([before, *looked]))
    assert amount_for(asked(), found) == amount_for(asked(), Extent(sum(lengths), max([before, *lengths])))
    enough = TIMES * sum(looked) >= MOST and found.longest >= LONGEST
    assert enough or looked == lengths


@pytest.mark.parametrize(("fewest", "most", "wanted"), [(50, 100, 100), (50, 10**6, None), (10**4, 10**6, 10**4)])
@pytest.mark.parametrize(("shortest", "longest", "length"), [(4, 6, 6), (4, 512, None), (20, 512, 20)])
def test_a_task_is_begun_with_as_much(
    fewest: int, most: int, wanted: int | None, shortest: int, longest: int, length: int | None, monkeypatch: Any
) -> None:
    noted: list[tuple[int, int]] = []
    write = own_texts.own_text

    def noting(*args: Any, tokens: int, length: int, **options: Any) -> Any:
        noted.append((tokens, length))
        return write(*args, **options | {"tokens": 100})

    bounds = {"FEWEST": fewest, "MOST": most, "SHORTEST": shortest, "LONGEST": longest}
    for name, value in (bounds | {"own_text": noting}).items():
        monkeypatch.setattr(own_texts, name, value)
    model = tiny("llama")
    task = task_of(model)
    METHODS["osft"].build({"rehearse": 0.5, "rehearse_tokens": "auto", "rehearse_length": "auto"}).begin_task(
        model, task
    )
    rows = [len(task.rows[index]["input_ids"]) for index in range(len(task.rows))]  # type: ignore[arg-type]
    assert noted == [(wanted or TIMES * sum(rows), length or max(rows))]


@pytest.mark.parametrize("options", [{"rehearse_length": "auto"}, {"remember_tasks": True, "source": "curvature"}])
def test_texts_stay_as_long_as_what_was_taught_before(options: dict[str, Any], monkeypatch: Any) -> None:
    """A task of short rows does not cut off what a task of long ones ended with; that goes with the memory."""
    monkeypatch.setattr(own_texts, "SHORTEST", 2)
    model = tiny("llama")
    first = METHODS["osft"].build(SETTLED | options)
    long, short = (
        replace(task_of(model, index, 3), rows=BatchRows(model, seed=index, rows=4, length=length))
        for index, length in ((0, 19), (1, 7))
    )
    first.begin_task(model, long)
    first.end_task(model, long)
    assert int(first.state_dict()["longest"]) == 19
    second = METHODS["osft"].build(SETTLED | options | {"rehearse_length": "auto"})
    assert second.amount(short) == (200, 7)
    second.load_state_dict(first.state_dict())
    assert second.amount(short) == (200, 19)
    second.begin_task(model, short)
    assert max(len(text.ids) for text in second.rehearsal.texts) > 7
    second.end_task(model, short)
    assert int(second.state_dict()["longest"]) == 19


def test_nothing_is_carried_of_it_where_a_number_was_given() -> None:
    model, method = tiny("llama"), METHODS["osft"].build(SETTLED)
    task = task_of(model)
    method.begin_task(model, task)
    method.end_task(model, task)
    assert method.state_dict() == {}


def test_an_answer_and_a_text_end_at_their_length() -> None:
    model = tiny("llama")
    model.generation_config.eos_token_id = None
    method = METHODS["osft"].build(SETTLED | {"prompts": [[3, 9, 14], [21]]})
    method.begin_task(model, task_of(model, 0, 1))
    held = zip(method.rehearsal.texts, method.rehearsal.told, strict=True)
    sizes = {(len(text.ids), len(told.rest_T)) for text, told in held}
    assert sizes == {(20, 19), (23, 20), (21, 20)}, "a text from BOS, and an answer behind each prompt"


@given(st.integers(1, 10_000))
def test_long_texts_are_written_fewer_at_a_time(length: int) -> None:
    rows = written_together(length)
    assert 1 <= rows <= WRITTEN_TOGETHER
    assert rows * length <= TOGETHER or rows == 1
    assert (rows + 1) * length > TOGETHER or rows == WRITTEN_TOGETHER


@pytest.fixture
def update(llama_folder: Path, rows: Any) -> dict[str, Any]:
    given = {"model_name_or_path": str(llama_folder), "train_file": rows("new"), "output_dir": "o"}
    return given | {"rehearse": 0.5, "rehearse_tokens": "auto", "rehearse_length": "auto"}


def test_a_forecast_counts_as_much(update: dict[str, Any], monkeypatch: Any) -> None:
    for name, value in {"FEWEST": 10, "SHORTEST": 2}.items():
        monkeypatch.setattr(own_texts, name, value)
    config = build_config(update)
    inputs = Inputs(config, load_tokenizer(config), seq2seq=False)
    model_config = load_model_config(config)
    arguments = training_arguments({}, "", hidden_size=48, seq2seq=False)
    found = batches_of(config, arguments, model_config, inputs)
    longest = max(len(row.input_ids) for row in inputs.train.examples)
    assert found.extent == Extent(sum(len(row.input_ids) for row in inputs.train.examples), longest)
    assert batches_of(config, arguments, model_config, inputs, 99).extent == found.extent._replace(longest=99)
    plain = build_config({name: update[name] for name in NEEDED})
    assert batches_of(plain, arguments, model_config, inputs).extent is None
    plan = lorica.plan(tiny("llama"))
    assert shown(config, plan, model_config, 0, found.extent).written == (TIMES * found.extent.tokens, longest)
    assert shown(config, plan, model_config, 0).written == (MOST, LONGEST)


@pytest.mark.parametrize("amount", ["0", 0, -3, "many", 2.5, True, "1e4"])
@pytest.mark.parametrize(("name", "least"), [("rehearse_tokens", 1), ("rehearse_length", 2)])
def test_what_is_no_amount_is_refused(name: str, least: int, amount: Any) -> None:
    with pytest.raises(LoricaError, match=rf"{name}: .*a number of tokens, {least} or more, or auto"):
        build_config(NEEDED | {name: amount})
    with pytest.raises(LoricaError, match=rf"{name}: .*a number of tokens, {least} or more, or auto"):
        build_config(NEEDED | {name: least - 1})
    assert getattr(build_config(NEEDED | {name: "300"}), name) == 300


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rehearse_tokens": "auto"}, "rehearse_tokens has no effect without rehearse"),
        ({"rehearse_length": "auto"}, "rehearse_length has no effect without rehearse"),
        ({"rehearse": 0.5, "rehearse_tokens": "some"}, "rehearse_tokens"),
        ({"rehearse": 0.5, "rehearse_tokens": 0}, "out of range: at least 1, or 'auto'"),
        ({"rehearse": 0.5, "rehearse_length": 1}, "out of range: at least 2, or 'auto'"),
    ],
)
def test_a_method_refuses_it_too(options: dict[str, Any], told: str) -> None:
    with pytest.raises(LoricaError, match=told):
        METHODS["osft"].build(options)


def test_the_next_update_and_what_foretells_it_go_on_with_the_length(
    update: dict[str, Any],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    for name, value in {"FEWEST": 100, "MOST": 200, "SHORTEST": 2}.items():
        monkeypatch.setattr(own_texts, name, value)
    settings = update | {"preset": "paper", "max_steps": 2, "source": "curvature", "use_cpu": True}
    (tmp_path / "short.jsonl").write_text('{"text": "ab"}\n' * 4)
    short = {"train_file": str(tmp_path / "short.jsonl")}
    one, two, alone = (str(tmp_path / name) for name in ("one", "two", "alone"))
    first = train(settings | {"output_dir": one}, say=lambda _: None)
    again = settings | short | {"model_name_or_path": one, "output_dir": two}
    seen: list[int] = []
    blank, write = Rehearsal.blank, own_texts.own_text
    monkeypatch.setattr(Rehearsal, "blank", lambda *args: seen.append(args[2]) or blank(*args))
    monkeypatch.setattr(
        own_texts, "own_text", lambda *args, **told: seen.append(told["length"]) or write(*args, **told)
    )
    forecast(build_forecast_config({name: value for name, value in again.items() if name != "output_dir"}))
    assert len(seen) > 1
    measured(build_forecast_config(again | {"measure": True}))
    second = train(again, say=lambda _: None)
    assert {*seen, second["rehearse_length"]} == {first["rehearse_length"]}
    other = train(settings | short | {"output_dir": alone}, say=lambda _: None)
    assert 2 <= other["rehearse_length"] < first["rehearse_length"]


def test_a_memory_that_cannot_be_read_is_named(update: dict[str, Any], tmp_path: Path) -> None:
    one = str(tmp_path / "one")
    train(update | {"output_dir": one, "max_steps": 1, "rehearse_tokens": 100, "preset": "paper"}, say=lambda _: None)
    memory = tmp_path / "one" / "memory" / "lorica-memory.safetensors"
    assert load_one(memory, "longest") == load_memory(memory)["longest"]
    assert load_one(memory, "shortest") is None
    memory.write_bytes(b"no tensors")
    with pytest.raises(LoricaError, match=r"lorica-memory.safetensors: cannot read what the method remembers"):
        forecast(build_forecast_config(update | {"model_name_or_path": one}))
