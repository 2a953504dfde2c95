"""How many tokens a model writes before a task, where that is left to the task."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.config import build_config
from lorica.errors import LoricaError
from lorica.forecast.batches import batches_of
from lorica.forecast.measuring import shown
from lorica.inputs import Inputs
from lorica.methods import METHODS, own_texts
from lorica.methods.own_texts import FEWEST, MOST, TIMES, tokens_for, tokens_of
from lorica.training.arguments import training_arguments
from lorica.training.models import load_model_config, load_tokenizer
from tests.builders import task_of, tiny
from tests.training.conftest import llama_folder, rows  # noqa: F401


def asked(**options: Any) -> Any:
    return SimpleNamespace(**{"rehearse_tokens": "auto", "calibration": None, "calibration_tokens": None} | options)


NEEDED = {"model_name_or_path": "m", "train_file": "t", "output_dir": "o"}


@given(st.integers(0, 10 * MOST), st.integers(0, 10 * MOST), st.integers(0, 2 * MOST))
def test_more_rows_want_more_text_within_bounds(some: int, more: int, at_least: int) -> None:
    fewer, many = tokens_for(asked(), some), tokens_for(asked(), some + more)
    assert FEWEST <= fewer <= many <= MOST == tokens_for(asked(), None)
    assert fewer in (FEWEST, TIMES * some, MOST)
    beside = {"calibration_tokens": at_least}
    for own in ({}, {"calibration": "self"}):
        assert tokens_for(asked(**beside, **own), some) == max(fewer, at_least), "what calibrates is among them"
    assert tokens_for(asked(**beside, calibration="random"), some) == fewer
    assert tokens_for(asked(rehearse_tokens=17, **beside), some) == 17, "a number is a number"


@given(st.lists(st.integers(1, MOST // 8), max_size=20))
def test_counting_ends_where_it_makes_no_difference(lengths: list[int]) -> None:
    counted: list[int] = []

    class Rows(list[int]):
        def __getitem__(self, index: Any) -> Any:
            counted.append(index)
            return {"input_ids": [0] * lengths[index]}

    found = tokens_of(Rows(lengths))  # type: ignore[arg-type]
    assert found == sum(lengths[: len(counted)])
    assert tokens_for(asked(), found) == tokens_for(asked(), sum(lengths))
    assert len(counted) == len(lengths) or TIMES * found >= MOST > TIMES * (found - lengths[len(counted) - 1])


@pytest.mark.parametrize(("fewest", "most", "wanted"), [(50, 100, 100), (50, 10**6, None), (10**4, 10**6, 10**4)])
def test_a_task_is_begun_with_as_much(fewest: int, most: int, wanted: int | None, monkeypatch: Any) -> None:
    written: list[int] = []
    write = own_texts.own_text

    def noting(*args: Any, tokens: int, **options: Any) -> Any:
        written.append(tokens)
        return write(*args, **options | {"tokens": 100})

    for name, value in {"FEWEST": fewest, "MOST": most, "own_text": noting}.items():
        monkeypatch.setattr(own_texts, name, value)
    model = tiny("llama")
    task = task_of(model)
    METHODS["osft"].build({"rehearse": 0.5, "rehearse_tokens": "auto"}).begin_task(model, task)
    every = sum(len(task.rows[index]["input_ids"]) for index in range(len(task.rows)))  # type: ignore[arg-type]
    assert written == [wanted or TIMES * every]


def test_a_forecast_counts_as_much(llama_folder: Path, rows: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(own_texts, "FEWEST", 10)
    given = {"model_name_or_path": str(llama_folder), "train_file": rows("new"), "output_dir": "o"}
    config = build_config(given | {"rehearse": 0.5, "rehearse_tokens": "auto"})
    inputs = Inputs(config, load_tokenizer(config), seq2seq=False)
    model_config = load_model_config(config)
    arguments = training_arguments({}, "", hidden_size=48, seq2seq=False)
    found = batches_of(config, arguments, model_config, inputs)
    assert found.tokens == tokens_of(inputs.train)
    method = METHODS["osft"].build({"rehearse": 0.5})
    model = tiny("llama")
    method.begin_task(model, task_of(model))
    assert method.plan is not None
    assert shown(config, method.plan, model_config, 0, found.tokens).written == TIMES * tokens_of(inputs.train)
    assert shown(config, method.plan, model_config, 0).written == MOST


@pytest.mark.parametrize("amount", ["0", 0, -3, "many", 2.5, True, "1e4"])
def test_what_is_no_amount_is_refused(amount: Any) -> None:
    with pytest.raises(LoricaError, match=r"rehearse_tokens: .*a number of tokens, 1 or more, or auto"):
        build_config(NEEDED | {"rehearse_tokens": amount})
    assert build_config(NEEDED | {"rehearse_tokens": "300"}).rehearse_tokens == 300


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rehearse_tokens": "auto"}, "rehearse_tokens has no effect without rehearse"),
        ({"rehearse": 0.5, "rehearse_tokens": "some"}, "rehearse_tokens"),
        ({"rehearse": 0.5, "rehearse_tokens": 0}, "out of range: at least 1, or 'auto'"),
    ],
)
def test_a_method_refuses_it_too(options: dict[str, Any], told: str) -> None:
    with pytest.raises(LoricaError, match=told):
        METHODS["osft"].build(options)
