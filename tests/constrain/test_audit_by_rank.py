"""The audit of directions that are not at hand: how many a change leaves alone, whichever they are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import AdamW

import lorica
from lorica.constrain.audit_weight import audit_by_rank, least_leakage
from lorica.errors import LoricaError
from lorica.subspace.calibration import random_tokens
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import PlanEntry
from tests.builders import VOCABULARY, batch, matrix, tiny, train, trainable


def entry(m: int, n: int, k: int, **options: Any) -> PlanEntry:
    return PlanEntry(name="w", shape=(m, n), k=k, source="curvature", **options)


def constrained(m: int, n: int, a: int, b: int, seed: int = 0) -> Tensor:
    """Return a change that leaves A output and B input directions alone."""
    u, v = (torch.linalg.qr(matrix(side, side, seed + side, torch.float64))[0] for side in (m, n))
    return u[:, a:] @ matrix(m - a, n - b, seed, torch.float64) @ v[:, b:].T


@given(st.integers(1, 14), st.integers(1, 14), st.integers(0, 30), st.data())
def test_it_is_the_least_over_all_directions(m: int, n: int, seed: int, data: st.DataObject) -> None:
    a, b = data.draw(st.integers(0, m)), data.draw(st.integers(0, n))
    change = matrix(m, n, seed, torch.float64)
    u, _, vh = torch.linalg.svd(change)  # full: the last ones are those that it leaves alone best
    best = (u[:, m - a :].T @ change).norm(), (change @ vh[n - b :].T).norm()
    assert least_leakage(change, a, b) == pytest.approx([float(x / change.norm()) for x in best], abs=1e-7)
    others = [torch.linalg.qr(matrix(side, count, seed + 1, torch.float64))[0] for side, count in ((m, a), (n, b))]
    found = (others[0].T @ change).norm() / change.norm(), (change @ others[1]).norm() / change.norm()
    assert all(x <= y + 1e-7 for x, y in zip(least_leakage(change, a, b), found, strict=True))


@given(st.integers(2, 14), st.integers(2, 14), st.integers(0, 30), st.data())
def test_a_change_that_was_constrained_leaves_as_many_alone(m: int, n: int, seed: int, data: st.DataObject) -> None:
    a, b = data.draw(st.integers(0, m - 1)), data.draw(st.integers(0, n - 1))
    assert max(least_leakage(constrained(m, n, a, b, seed), a, b)) <= 1e-7


def test_one_direction_fewer_is_seen() -> None:
    before, change = matrix(20, 20, 5, torch.float64), constrained(20, 20, 6, 6)
    assert audit_by_rank(before, before + change, entry(20, 20, 6)).holds
    row = audit_by_rank(before, before + change, entry(20, 20, 7))
    assert not row.holds
    assert min(row.leak_u or 0.0, row.leak_v or 0.0) > 1e-3


def test_of_a_long_side_that_no_change_could_fill_nothing_is_claimed() -> None:
    """A change of 8 x 30 leaves 22 input directions alone whatever it is."""
    before, after = matrix(8, 30, 1), matrix(8, 30, 2)
    row = audit_by_rank(before, after, entry(8, 30, 8, constraint="input"))
    assert (row.leak_u, row.leak_v) == (None, None)
    assert row.verdict == "cannot be told without the directions"
    both = audit_by_rank(before, after, entry(8, 30, 4))
    assert both.leak_v is None
    assert both.verdict == "LEAKS"
    assert audit_by_rank(before, after, entry(8, 30, 0)).verdict == "nothing is protected"


def test_no_change_leaks_nothing_and_no_number_does_not_hold() -> None:
    before = matrix(9, 9)
    assert audit_by_rank(before, before.clone(), entry(9, 9, 3)).verdict == "nothing changed"
    assert audit_by_rank(before, before * float("nan"), entry(9, 9, 3)).verdict == "LEAKS"


@pytest.mark.parametrize(("k", "expected"), [(64, 0.119), (128, 0.333), (192, 0.619)])
def test_what_a_random_change_would_leave_is_known(k: int, expected: float) -> None:
    """As Marchenko and Pastur's law has it for a large square matrix."""
    before = matrix(1024, 1024, 3)
    row = audit_by_rank(before, before + 1e-3 * matrix(1024, 1024, 4), entry(1024, 1024, 4 * k))
    assert row.unconstrained_u == pytest.approx(expected, abs=0.02)
    assert row.leak_u == pytest.approx(row.unconstrained_u, rel=0.1)


def test_a_change_that_was_rounded_holds_to_its_floor() -> None:
    before = matrix(64, 64, 5).bfloat16()
    for size, verdict in ((1.0, "holds"), (3e-3, "cannot be told at this dtype")):
        after = (before.double() + size * constrained(64, 64, 32, 32)).bfloat16()
        assert audit_by_rank(before, after, entry(64, 64, 32)).verdict == verdict
    assert audit_by_rank(before, matrix(64, 64, 6).bfloat16(), entry(64, 64, 32)).verdict == "LEAKS"


def updated(tmp_path: Path, **options: Any) -> tuple[Path, Path, Plan]:
    """Return the folders of a model before and after training under a plan, and the plan as it was saved."""
    model = tiny("llama")
    model.save_pretrained(tmp_path / "before")
    plan = lorica.plan(model, 0.5, calibration=random_tokens(VOCABULARY, sequences=16), **options)
    lorica.protect(model, plan)
    train(model, AdamW(trainable(model), lr=1e-2), 3, partial(batch, model))
    lorica.release(model).save_pretrained(tmp_path / "after")
    plan.save(tmp_path / "plan.json")
    return tmp_path / "before", tmp_path / "after", Plan.load(tmp_path / "plan.json")


def test_an_update_in_measured_directions_is_audited_from_folders_alone(tmp_path: Path) -> None:
    before, after, plan = updated(tmp_path, source="curvature")
    report = lorica.audit(before, after, plan)
    assert report.holds
    assert "directions measured while training are not in the weights: of 14 of 14 weights" in report.verdict()
    assert "the constraint holds in all 14 weights" in report.verdict()
    plain = tiny("llama")
    train(plain, AdamW(plain.parameters(), lr=1e-2), 3, partial(batch, plain))
    plain.save_pretrained(tmp_path / "plain")
    assert "14 of 14 weights leak" in lorica.audit(before, tmp_path / "plain", plan).verdict()


def test_the_plan_of_the_run_still_knows_its_directions(tmp_path: Path) -> None:
    model = tiny("llama")
    plan = lorica.plan(model, 0.5, source="activation", calibration="random")
    lorica.protect(model, plan)
    train(model, AdamW(trainable(model), lr=1e-2), 3, partial(batch, model))
    report = lorica.audit(tiny("llama"), model, plan)
    assert report.holds
    assert "not in the weights" not in report.verdict()


def test_a_block_shows_in_nothing_else(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "before")
    plan = lorica.plan(model, 0.5, source="curvature", constraint="block", calibration="random")
    plan.save(tmp_path / "plan.json")
    with pytest.raises(LoricaError, match=r"q_proj: the plan protects directions measured while training, which are"):
        lorica.audit(tmp_path / "before", tmp_path / "before", Plan.load(tmp_path / "plan.json"))
