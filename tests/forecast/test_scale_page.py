"""docs/scale.md is what its script makes of shapes and of the kept counts, and what it says in words holds."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorica.forecast.communication import Layout, received_sharded

ROOT = Path(__file__).parents[2]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("scale_page")
    for name in [name for name in sys.modules if name.startswith(("scale_", "speed_"))]:
        del sys.modules[name]


def ratio(page: Any, name: str, gpus: int, share: float = 0.75) -> float:
    model, layout = page.MODELS[name], Layout(gpus)
    ours, plain = (received_sharded(page.sizes(model, one), layout).total() for one in (share, 0.0))
    return ours / plain


def test_the_page_is_what_the_script_makes(page: Any) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text, page.blocks()) == text
    assert text.count("<!-- end -->") == len(page.blocks())


def test_less_than_plain_fine_tuning_from_the_number_on_that_the_page_names(page: Any) -> None:
    assert max(ratio(page, "8 B", gpus) for gpus in page.GPUS[1:]) < 1
    for name in page.MODELS:
        assert ratio(page, name, 2) < 1.04
        assert max(ratio(page, name, gpus) for gpus in page.GPUS[2:]) < 0.92


def test_what_dominates(page: Any) -> None:
    for gpus, kind in ((2, "weights to processes"), (8, "gradients")):
        count = received_sharded(page.sizes(page.MODELS["8 B"], 0.75), Layout(gpus))
        own = {kind: count[kind] for kind in page.TRAFFIC if "gather" not in kind}
        assert max(own, key=own.__getitem__) == kind


def test_the_models_have_their_sizes(page: Any) -> None:
    """Of Llama 3.1, as its model cards round them."""
    assert [round(model.parameters / 1e9) for model in page.MODELS.values()] == [8, 71, 406]


def test_the_counts_are_of_the_shapes(page: Any) -> None:
    kept = json.loads(page.RESULTS.read_text(encoding="utf-8"))
    for row in kept["rows"]:
        if row["setup"] != "DDP":  # with the buffers that the page speaks of
            assert row["counted"] == pytest.approx(row["computed"], rel=0.01)


def test_a_step_of_one_gpu_by_hand(page: Any) -> None:
    given, model = page.ASSUMED, page.MODELS["8 B"]
    tokens, length = given.tokens, given.length
    blocks = 4 * 2 * tokens * (model.parameters - 2 * 4096 * 128256)  # forward twice, dX, dW
    head, attention = 3 * 2 * tokens * 4096 * 128256, 4 * 32 * 2 * tokens * length * 4096
    expected = (blocks + head + attention) / (given.flops * given.utilisation)
    assert page.seconds(model, 0.0, 1) == pytest.approx(expected)
    by_hand = (blocks + head + attention) / 1e15
    rates = replace(given, flops=1e15, utilisation=1.0)
    assert page.seconds(model, 0.0, 1, rates) == pytest.approx(by_hand)


def test_links_and_overlap(page: Any) -> None:
    given, model = page.ASSUMED, page.MODELS["8 B"]
    alone = page.seconds(model, 0.0, 1)
    count = received_sharded(page.sizes(model, 0.0), Layout(8)).total()
    still = replace(given, overlap=0.5, latency=0.0, inside=count / 4)  # 4 s, of which 2 can be hidden
    assert page.seconds(model, 0.0, 8, still) == pytest.approx(4 - min(2, alone) + alone)
    slow = replace(given, overlap=0.5, latency=0.0, inside=count / 40)  # 40 s; arithmetic hides no more than it takes
    assert page.seconds(model, 0.0, 8, slow) == pytest.approx(40)
    assert page.seconds(model, 0.75, 16, replace(given, port=given.port / 10)) > page.seconds(model, 0.75, 16)
    assert page.seconds(model, 0.75, 8, replace(given, port=given.port / 10)) == page.seconds(model, 0.75, 8)
