"""The recipes that come with the project can be read, and ask for what exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorica.benchmarks import find_stream
from lorica.experiments.chosen import chosen_settings
from lorica.experiments.config import RunConfig, build_run_config
from lorica.methods import METHODS
from lorica.training.arguments import check_arguments
from lorica.values import read_config

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "benchmarks" / "recipes"
STREAMS = {"architectures": "cl-standard", "cl-standard": "cl-standard", "cl-long": "cl-long", "trace": "trace"}
AVAILABLE = {
    "cl-standard": ["dbpedia", "amazon", "agnews"],
    "cl-long": ["mnli", "cb", "wic", "copa", "boolqa", "rte", "amazon", "sst2", "dbpedia", "agnews"],
    "trace": ["C-STANCE", "ScienceQA", "NumGLUE-cm", "20Minuten"],
}


def recipe(name: str) -> RunConfig:
    given = {"stream": STREAMS[name], "model_name_or_path": "MODEL", "output_dir": "OUT"}
    return build_run_config(read_config(RECIPES / f"{name}.yaml") | given)


@pytest.mark.parametrize("name", STREAMS)
def test_a_recipe_asks_for_what_exists(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = recipe(name)
    check_arguments(config.training)
    stream = find_stream(config.stream).only(config.tasks)
    settings = chosen_settings(config, stream)
    assert set(settings) == set(METHODS), "every method runs"
    for one in settings.values():
        METHODS[one.method].build(one.options)


@pytest.mark.parametrize("name", STREAMS)
def test_a_recipe_takes_the_tasks_in_the_benchmarks_order(name: str) -> None:
    config = recipe(name)
    stream = find_stream(config.stream).only(config.tasks)
    found = [[task.name for task in stream.in_order(order)] for order in config.orders]
    assert found[0] == AVAILABLE[config.stream]
    assert len({tuple(order) for order in found}) == len(found), "no order stands for two"
