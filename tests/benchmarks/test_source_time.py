"""What the sources that measure cost: counted and timed as told, at tiny shapes; and what the page makes of it."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.contestants import SOURCES, llama
from benchmarks.source_time import Point

import lorica
from benchmarks import calibration_time, peak_memory, source_time
from lorica.constrain.protect import plan_of, protected_layers
from lorica.subspace import observe
from lorica.subspace.calibration import random_tokens
from lorica.subspace.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
WIDTH, INNER, SHARE = 64, 176, 0.75
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": True,
}  # fmt: skip
SCRIPTS = ("speed_sources", "speed_tables", "speed_results", "speed_claims")


PEAKS = {"weight": 400, "curvature": 500, "activation": 300}


def told_peaks(name: str, _: Path, __: peak_memory.Configuration) -> dict[str, Any]:
    """Stand for a process of its own, of which alone the memory can be told."""
    return {"phases": {"train": {"peak_anonymous": PEAKS[name.split()[0]]}}}


@pytest.fixture(scope="module")
def source_rows() -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peak_memory, "in_a_process", told_peaks)
        return source_time.measure(Point(WIDTH, 1, 32, 16, (SHARE,)), budget=0.0, most=3)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Measure a model of four layers whose sums are allowed two of them at a time, and decompose one."""
    folder = tmp_path_factory.mktemp("calibration")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observe, "MOMENT_BYTES", 2 * sum_bytes("curvature"))
        calibration_time.run(SIZES, 1, 128, folder)
    found: dict[str, Any] = json.loads((folder / "calibration-time.json").read_text())
    return found


def sum_bytes(source: str) -> int:
    """Return the bytes of a layer's sums: D x D float64 of the inputs (q k v o gate up: 64, down: 96), ..."""
    inputs, outputs = [64] * 6 + [96], [64, 32, 32, 64, 96, 96, 64]
    return 8 * sum(dim**2 for dim in (inputs if source == "activation" else inputs + outputs))


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("speed_sources")
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def of_page(page: Any, **results: Any) -> dict[str, str]:
    kinds = ("steps", "peaks", "tasks", "inference", "arithmetic", "sources", "calibration")
    empty: dict[str, Any] = {kind: [] for kind in kinds} | {"split": {}}
    blocks: dict[str, str] = page.source_blocks(page.Results(**(empty | results)))
    return blocks


def made_up(page: Any, rows: list[dict[str, Any]], ratio: float) -> Any:
    told = {"ratio": {"median": ratio, "low": ratio - 0.01, "high": ratio + 0.02}, "state_ratio": 0.9,
            "peak_ratio": 1.1}  # fmt: skip
    return page.Measurement({"width": 512, "tokens": 2048}, [row | told for row in rows], {})


def cells(block: str) -> list[list[str]]:
    """Return the cells of a table's rows, without its header."""
    lines = [line for line in block.splitlines() if line.startswith("|")][2:]
    return [line.strip("| ").split(" | ") for line in lines]


@pytest.mark.parametrize(("ratio", "holds"), [(1.01, True), (1.03, False)])
def test_what_is_claimed_of_curvature_falls_with_its_step(
    page: Any, source_rows: list[dict[str, Any]], ratio: float, holds: bool
) -> None:
    of_sources = importlib.import_module("speed_claims").of_sources
    step, state = of_sources([made_up(page, source_rows, ratio)])
    assert (step.found, step.holds) == (ratio, holds)
    assert (state.found, state.holds) == (0.9, True)
    assert of_sources([]) == []


@pytest.mark.parametrize("constraint", ["two-sided", "input"])
def test_a_pair_protects_as_many_directions_of_every_side(constraint: str) -> None:
    counts = []
    for source in ("weight", "activation" if constraint == "input" else "curvature"):
        model = llama(WIDTH, 1, 64)
        SOURCES[f"{source} {constraint} {SHARE:g}"].build(model)
        plan = plan_of(model)
        assert plan is not None
        assert {(entry.source, entry.constraint) for entry in plan.entries} == {(source, constraint)}
        counts.append({entry.name: entry.protected for entry in plan.entries})
    assert counts[0] == counts[1]
    assert set(counts[0].values()) == {(48 if constraint == "two-sided" else 0, 48)}


def test_curvature_has_one_basis_of_an_input_that_layers_share() -> None:
    model = llama(WIDTH, 1, 64)
    SOURCES["curvature two-sided 0.75"].build(model)
    inputs = {name.rsplit(".", 1)[1]: id(one.exact_bases[1]) for name, one in protected_layers(model).items()}
    assert inputs["q_proj"] == inputs["k_proj"] == inputs["v_proj"]
    assert inputs["gate_proj"] == inputs["up_proj"]
    assert len(set(inputs.values())) == 4


def measured_bytes(plan: Plan) -> int:
    found = {name: plan.factors(name) for name in plan.names()}
    return calibration_time.measured_bytes({name: one for name, one in found.items() if one is not None})


def test_what_was_measured_is_counted_once_for_what_layers_share() -> None:
    model = llama(WIDTH, 1, 64)
    plan = lorica.plan(model, effective_rank=48, source="curvature", calibration=random_tokens(50))
    inputs, outputs = 3 * WIDTH + INNER, 5 * WIDTH + 2 * INNER  # q k v, o, gate up, down; q k v o down, gate, up
    assert measured_bytes(plan) == 48 * (4 * (inputs + outputs) + 8 * 11)  # 8 bytes an energy
    assert measured_bytes(lorica.plan(model)) == 0


def test_a_row_per_source_with_the_ratios_to_weight(source_rows: list[dict[str, Any]]) -> None:
    names = [(row["source"], row["constraint"]) for row in source_rows]
    assert names == [("weight", "two-sided"), ("curvature", "two-sided"), ("weight", "input"), ("activation", "input")]
    for base, row in zip(source_rows[::2], source_rows[1::2], strict=True):
        assert row["free"] == base["free"]
        assert row["state_ratio"] == row["state_bytes"] / base["state_bytes"] < 1  # shared bases
        assert row["peak_ratio"] == PEAKS[row["source"]] / PEAKS["weight"]
        assert row["peak_bytes"] == row["phases"]["train"]["peak_anonymous"]
        assert base["ratio"]["median"] == base["state_ratio"] == base["peak_ratio"] == 1
        assert len(row["seconds"]) == 3
        pairs = sorted(mine / other for mine, other in zip(row["seconds"], base["seconds"], strict=True))
        assert row["ratio"]["median"] == pairs[1]


def test_every_pass_is_taken_down_with_its_sums(calibration: dict[str, Any]) -> None:
    activation, curvature, _ = calibration["rows"]
    assert [one["weights"] for one in curvature["passes"]] == [14, 14]
    assert [one["sum_bytes"] for one in curvature["passes"]] == [2 * sum_bytes("curvature")] * 2
    assert sum(one["weights"] for one in activation["passes"]) == 28
    assert sum(one["sum_bytes"] for one in activation["passes"]) == 4 * sum_bytes("activation")
    for row in (activation, curvature):
        assert row["model_seconds"]["passes"] == sum(one["seconds"] for one in row["passes"])
        assert all(row["model_seconds"][part] == 4 * row["seconds"][part] > 0 for part in ("factors", "bases"))


def test_what_is_kept_is_counted_for_all_layers(calibration: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = calibration_time.random_model(SIZES)
    batches = random_tokens(50, sequences=64, length=64)
    for row in calibration["rows"][:2]:
        plan = lorica.plan(model, effective_rank=0.75, source=row["source"], calibration=batches)
        assert row["model_bytes"]["factors"] == measured_bytes(plan)
        lorica.protect(model, plan)
        layers = protected_layers(model).values()
        buffers = {b.data_ptr(): b.nbytes for one in layers for basis in one.exact_bases for b in basis.buffers()}
        assert row["model_bytes"]["bases"] == sum(buffers.values())
        lorica.release(model)


def test_own_text_is_as_long_as_asked(calibration: dict[str, Any]) -> None:
    text = calibration["rows"][2]
    assert text["tokens"] == 128  # two texts, none of which ends early
    assert text["tokens_per_second"] == pytest.approx(text["tokens"] / text["seconds"])


def test_the_page_builds_without_these_results(page: Any) -> None:
    assert of_page(page) == {"sources": page.NOT_YET, "calibration": page.NOT_YET}


def test_the_page_tells_the_sources_beside_weight(page: Any, source_rows: list[dict[str, Any]]) -> None:
    one = made_up(page, source_rows, 0.98)
    told_of_both = ["0.75", "3", "0.980 (0.970-1.000)", "0.900", "1.100"]
    assert cells(of_page(page, sources=[one])["sources"]) == [
        ["512, 2k", "`curvature`", "`two-sided`", *told_of_both],
        ["512, 2k", "`activation`", "`input`", *told_of_both],
    ]


def test_the_page_tells_the_calibration(page: Any, calibration: dict[str, Any]) -> None:
    activation, curvature, text = copy.deepcopy(calibration["rows"])
    curvature |= {
        "model_seconds": {"passes": 300.0, "factors": 100.0, "bases": 50.0},
        "model_bytes": {"factors": 3.6e9, "bases": 2.8e9},
    }
    curvature["phases"]["measure"]["peak_anonymous"] = 5.1e9
    text |= {"tokens": 4096, "seconds": 64.0, "tokens_per_second": 64.0}
    one = page.Measurement(calibration["settings"], [activation, curvature, text], {"threads": 2})
    block = of_page(page, calibration=[one])["calibration"]
    assert cells(block)[1][2:] == [
        "1.1 MB",
        "5 min 00 s",
        "1 min 40 s",
        "50.0 s",
        "7 min 30 s",
        "5.1 GB",
        "3.6 GB",
        "2.8 GB",
    ]
    assert cells(block)[1][:2] == ["`curvature`, `two-sided`", "2"]
    assert "4,096 tokens of its own in 1 min 04 s, 64 a second" in block
    assert "writes its 32,768 in 8 min 32 s" in block
    assert "vocabulary cut to 50" in block
