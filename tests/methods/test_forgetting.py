"""Forgetting foreseen and measured: against dense matrices and whole distributions, and what OSFT makes of it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lorica
from lorica.config import build_config
from lorica.constrain.kept import BASES, KeptBases, write_bases
from lorica.constrain.linear import matrix_of
from lorica.errors import LoricaError
from lorica.methods import forgetting
from lorica.methods.forgetting import ASIDE, Forgetting
from lorica.methods.predicted import KEPT
from lorica.report import write_report
from lorica.subspace.calibration import own_text
from lorica.subspace.factor import Factors
from lorica.subspace.measure import Wanted, measure
from lorica.subspace.prediction import kind_of
from lorica.update import train
from tests.builders import task_of, tiny
from tests.experiments.conftest import Write, run, write  # noqa: F401
from tests.methods.little_text import little_text  # noqa: F401
from tests.methods.test_between_tasks import begin_and_train, osft
from tests.training.conftest import llama_folder, rows, t5_folder  # noqa: F401

ASKED = {"unfreeze_rank_ratio": 0.5, "predict_forgetting": True}


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "TOKENS", 600)


def learned(model: Any, index: int = 0, **options: Any) -> Forgetting:
    method = osft(**ASKED | options)
    begin_and_train(method, model, index)
    method.end_task(model, task_of(model, index))
    assert method.forgetting is not None
    return method.forgetting


def whole_divergence(before: Any, after: Any) -> float:
    """Return the mean of KL(p || q) over all tokens of the vocabulary, text by text, without padding."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in own_text(before, tokens=forgetting.TOKENS, seed=ASIDE):
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                text = ids[mask.bool()][None]
                p, q = (model(text).logits[0, :-1].double().log_softmax(-1) for model in (before, after))
                total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
                count += len(p)
    return total / count


def literal(before: Any, after: Any) -> dict[str, float]:
    """Return sum tr(B D A D^T) / 2 by kind of layer, from dense matrices of all directions."""
    texts = own_text(before)
    names = list(lorica.plan(before).names())
    layers = {name: before.get_submodule(name) for name in names}
    wanted = {name: Wanted(tuple(one.weight.shape), *one.weight.shape[::-1]) for name, one in layers.items()}
    found: dict[str, Factors] = measure(before, layers, texts, wanted)
    sums: dict[str, float] = {}
    for name in names:
        a, b = found[name].inputs, found[name].outputs
        assert a is not None
        assert b is not None
        d = (matrix_of(after.get_submodule(name)) - matrix_of(layers[name])).detach().double()
        part = float((b.matrix() @ d @ a.matrix() @ d.T).trace()) / 2
        sums[kind_of(name)] = sums.get(kind_of(name), 0.0) + part
    return sums


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"source": "curvature"},
        {"source": "activation", "calibration": "random"},
        {"constraint": "block"},
        {"memory_mode": "lean"},
        {"unfreeze_rank_ratio": 1.0},
    ],
    ids=str,
)
def test_both_figures_are_those_of_dense_matrices_and_whole_distributions(options: dict[str, Any]) -> None:
    model = tiny("llama", torch.float64)  # in which the weights take so much that all directions are kept
    assert model.config.vocab_size <= KEPT
    before = copy.deepcopy(model).eval()
    found = learned(model, **options)
    model.eval()
    expected = literal(before, model)
    assert found.by_kind == pytest.approx(expected, rel=2e-3)
    assert found.predicted == pytest.approx(sum(expected.values()), rel=2e-3)
    assert found.measured == pytest.approx(whole_divergence(before, model), rel=1e-3)
    assert found.tokens >= 0.9 * forgetting.TOKENS
    assert 0.2 < found.measured / found.predicted < 5


def test_curvature_forgets_less_than_the_weights_own_directions_and_both_knew_it_before() -> None:
    weight, curvature = (learned(tiny("llama"), source=source) for source in ("weight", "curvature"))
    assert curvature.shares["expected"] < weight.shares["expected"]
    inputs = curvature.shares["inputs"]
    assert inputs["protected"] == pytest.approx(inputs["best"], rel=0.02)
    assert weight.shares["inputs"]["protected"] < inputs["protected"]


def test_nothing_is_protected_nothing_is_spared() -> None:
    shares = learned(tiny("llama"), unfreeze_rank_ratio=1.0).shares
    assert shares["expected"] == pytest.approx(1)
    assert shares["inputs"] == {"protected": 0.0, "random": 0.0, "best": 0.0}


def test_learned_directions_count_as_protected() -> None:
    model, method = tiny("llama"), osft(**ASKED, protect_learned=0.1)
    shares = []
    for index in range(2):
        begin_and_train(method, model, index)
        method.end_task(model, task_of(model, index))
        assert method.forgetting is not None
        shares.append(method.forgetting.shares["inputs"]["random"])
    assert shares[0] < shares[1]


def test_the_training_is_the_same_without_it() -> None:
    with_it, without = tiny("llama", dropout=0.2), tiny("llama", dropout=0.2)
    for model, asked in ((with_it, True), (without, False)):
        torch.manual_seed(7)
        method = osft(unfreeze_rank_ratio=0.5, predict_forgetting=asked)
        begin_and_train(method, model, 0)
        method.end_task(model, task_of(model, 0))
        assert (method.forgetting is not None) == asked
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert method.state_dict() == {}
    for mine, theirs in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("options", [{"source": "curvature"}, {"constraint": "block"}], ids=str)
def test_a_task_that_goes_on_from_kept_bases_is_told_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    whole, resumed = (osft(**ASKED | options) for _ in range(2))
    one, other = tiny("llama"), tiny("llama")
    begin_and_train(whole, one, 0)
    assert whole.plan is not None
    write_bases(tmp_path / BASES, whole.plan, whole.to_keep(one))
    resumed.kept = KeptBases(tmp_path / BASES)
    begin_and_train(resumed, other, 0)
    for method, model in ((whole, one), (resumed, other)):
        method.end_task(model, task_of(model, 0))
    assert whole.forgetting is not None
    assert resumed.forgetting is not None
    assert resumed.forgetting.predicted == pytest.approx(whole.forgetting.predicted, rel=1e-6)
    assert resumed.forgetting.shares["expected"] == pytest.approx(whole.forgetting.shares["expected"], rel=1e-6)


def test_a_model_that_writes_no_text_is_refused() -> None:
    model = tiny("t5")
    with pytest.raises(LoricaError, match=r"predict_forgetting is for causal models.*leave it out"):
        osft(predict_forgetting=True).begin_task(model, task_of(model))


def test_an_update_tells_and_records_both(llama_folder: Path, rows: Callable[..., str], tmp_path: Path) -> None:
    lines: list[str] = []
    config = build_config(
        {"model_name_or_path": llama_folder, "train_file": rows("new"), "output_dir": tmp_path / "out", **ASKED,
         "max_steps": 2, "use_cpu": True, "report_to": "none", "preset": "paper"}
    )  # fmt: skip
    record = train(config, lines.append)["predicted_forgetting"]
    assert any(line.startswith("forgetting: predictions on the model's own text moved by") for line in lines)
    assert record == json.loads((tmp_path / "out" / "lorica.json").read_text())["predicted_forgetting"]
    assert math.isfinite(record["predicted"])
    assert sum(record["by_kind"].values()) == pytest.approx(record["predicted"])
    assert "## Forgetting, predicted and measured" in (tmp_path / "out" / "report.md").read_text()


def test_a_run_records_every_task_and_its_report_shows_them(write: Write, llama_folder: Path, tmp_path: Path) -> None:
    stream = write(methods={name: {"method": "osft", "learning_rate": 1e-2, "options": options} for name, options in (
        ("half", ASKED), ("untold", {}),
    )})  # fmt: skip
    records, _ = run(stream, llama_folder, tmp_path / "out", methods=["half", "untold"], max_steps=2)
    told = [record["predicted_forgetting"] for record in records]
    assert [[one["task"] for one in each] for each in told] == [["first", "second"], []]
    assert all(one["predicted"] > 0 for each in told for one in each)
    write_report([tmp_path / "out"], tmp_path)
    page = (tmp_path / "report.md").read_text()
    section = page[page.index("## Forgetting, predicted and measured") :]
    assert "2 trainings, each a point" in section
    assert "| second, seed 0 |" in section
