"""The audit is a measurement: known leaks in, the same numbers out."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import AdamW

import lorica
from lorica.constrain.audit_report import TOLERANCE, AuditReport
from lorica.constrain.audit_weight import audit_weight, rounding_share
from lorica.constrain.audit_weight import leakage as leakage_of
from lorica.subspace.plan_entry import PlanEntry
from tests.builders import batch, free_part, leakage, matrix, protected_tiny, tiny, train, trainable


def entry(m: int, n: int, k: int, constraint: str = "two-sided") -> PlanEntry:
    return PlanEntry(name="w", shape=(m, n), k=k, constraint=constraint)


def test_a_known_leak_is_measured() -> None:
    w = torch.diag(torch.tensor([4.0, 3, 2, 1], dtype=torch.float64))
    d = torch.zeros(4, 4, dtype=torch.float64)
    d[0, 3], d[3, 1], d[3, 3] = 3.0, 4.0, 12.0  # 3 of 13 in protected outputs, 4 of 13 in protected inputs
    row = audit_weight(w, w + d, entry(4, 4, 2))
    assert (row.leak_u, row.leak_v) == pytest.approx((3 / 13, 4 / 13))
    assert row.unconstrained_u == row.unconstrained_v == pytest.approx(0.5**0.5)
    assert row.relative_change == pytest.approx(13 / 30**0.5)
    assert not row.holds


@pytest.mark.parametrize(("constraint", "u", "v"), [("input", None, 4 / 13), ("output", 3 / 13, None), ("block", 0, 0)])
def test_each_constraint_has_its_own_measure(constraint: str, u: float | None, v: float | None) -> None:
    w = torch.diag(torch.tensor([4.0, 3, 2, 1], dtype=torch.float64))
    d = torch.zeros(4, 4, dtype=torch.float64)
    d[0, 3], d[3, 1], d[3, 3] = 3.0, 4.0, 12.0
    row = audit_weight(w, w + d, entry(4, 4, 2, constraint))
    assert row.leak_u == (u if u is None else pytest.approx(u))
    assert row.leak_v == (v if v is None else pytest.approx(v))


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 50), st.data())
def test_it_agrees_with_an_independent_measurement(m: int, n: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(m, n)))
    before, after = matrix(m, n, seed), matrix(m, n, seed + 1000)
    row = audit_weight(before, after, entry(m, n, k))
    assert (row.leak_u, row.leak_v) == pytest.approx(leakage(before, after, k), abs=1e-9)


def test_no_change_is_no_leak() -> None:
    w = matrix(6, 4)
    row = audit_weight(w, w.clone(), entry(6, 4, 2))
    assert (row.leak_u, row.leak_v, row.relative_change) == (0, 0, 0)
    assert row.holds


def test_a_change_that_is_not_finite_does_not_hold() -> None:
    w = matrix(6, 4)
    broken = w.clone()
    broken[0, 0] = float("nan")
    assert not audit_weight(w, broken, entry(6, 4, 2)).holds


def rounded_change(change: float, *, constrained: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a bf16 weight, an exact change of it, and the changed weight rounded once."""
    before = matrix(96, 96, dtype=torch.bfloat16)
    d = matrix(96, 96, 1, torch.float64)
    d = change * (free_part(before, d, 48, "two-sided") if constrained else d / 2)
    return before, d, (before.double() + d).to(torch.bfloat16)


@pytest.mark.parametrize("change", [1e-3, 1e-2, 1e-1])
def test_a_constrained_change_holds_however_coarse_its_dtype(change: float) -> None:
    before, d, after = rounded_change(change)
    row = audit_weight(before, after, entry(96, 96, 48))
    assert row.leak_u > TOLERANCE
    assert row.holds
    assert row.visible == (change >= 1e-2)
    assert row.verdict == ("holds" if row.visible else "cannot be told at this dtype")
    if row.visible:
        moved = after.double() - before.double()
        assert rounding_share(before, after) == pytest.approx(((moved - d).norm() / moved.norm()).item(), rel=0.1)


@pytest.mark.parametrize("change", [1e-3, 1e-2, 1e-1])
def test_an_unconstrained_change_holds_only_where_nothing_can_be_seen(change: float) -> None:
    before, _, after = rounded_change(change, constrained=False)
    row = audit_weight(before, after, entry(96, 96, 48))
    assert row.holds != row.visible
    assert row.verdict == ("LEAKS" if row.visible else "cannot be told at this dtype")


@pytest.mark.parametrize("change", [1e-5, 1e-3, 1e-1])
def test_the_master_proves_what_the_stored_dtype_cannot_show(change: float) -> None:
    before, d, after = rounded_change(change)
    row = audit_weight(before, after, entry(96, 96, 48), master_delta_MN=d.float())
    assert max(row.master_leak_u, row.master_leak_v) == row.master_worst <= 1e-6
    assert row.verdict == ("nothing changed" if torch.equal(before, after) else "holds")
    before, d, after = rounded_change(change, constrained=False)
    row = audit_weight(before, after, entry(96, 96, 48), master_delta_MN=d.float())
    assert row.master_leak_u == pytest.approx(0.5**0.5, abs=0.1)
    assert row.verdict == "LEAKS", "whatever rounding hides"


@pytest.mark.parametrize("constraint", ["two-sided", "input", "output", "block"])
def test_the_master_is_measured_as_the_stored_weight_is(constraint: str) -> None:
    w, d = matrix(9, 7, 0, torch.float64), matrix(9, 7, 1, torch.float64)
    row = audit_weight(w, w + d, entry(9, 7, 3, constraint), master_delta_MN=d)
    assert row.master_leak_u == (None if row.leak_u is None else pytest.approx(row.leak_u))
    assert row.master_leak_v == (None if row.leak_v is None else pytest.approx(row.leak_v))
    without = audit_weight(w, w + d, entry(9, 7, 3, constraint))
    assert without.master_leak_u is without.master_leak_v is without.master_worst is None


@pytest.mark.parametrize("constraint", ["two-sided", "input", "output", "block"])
def test_where_nothing_is_protected_nothing_can_leak(constraint: str) -> None:
    w = matrix(6, 4)
    row = audit_weight(w, w + 1, entry(6, 4, 0, constraint), master_delta_MN=torch.ones(6, 4))
    sides = (row.leak_u, row.leak_v, row.master_leak_u, row.master_leak_v, row.unconstrained_u, row.floor_v)
    assert set(sides) == {None}
    assert row.relative_change > 0
    assert (row.holds, row.verdict) == (True, "nothing is protected")


def test_the_verdict_counts_each_kind_and_claims_no_more() -> None:
    w = matrix(6, 4)
    rows = {
        "LEAKS": audit_weight(w, w + 1, entry(6, 4, 2)),
        "holds": audit_weight(w, w + free_part(w, matrix(6, 4, 1), 2, "two-sided").float(), entry(6, 4, 2)),
        "nothing changed": audit_weight(w, w, entry(6, 4, 2)),
        "nothing is protected": audit_weight(w, w + 1, entry(6, 4, 0)),
    }
    assert {kind: row.verdict for kind, row in rows.items()} == {kind: kind for kind in rows}
    everything = AuditReport([*rows.values(), rows["nothing changed"]])
    assert not everything.holds
    assert everything.verdict().startswith(
        "1 of 5 weights leak, the constraint holds in 1 of 5 weights, nothing changed in 2 of 5 weights, "
        "nothing is protected in 1 of 5 weights; worst leakage"
    )
    assert AuditReport([rows["holds"]]).verdict().startswith("the constraint holds in all 1 weights; worst leakage")
    assert AuditReport([rows["nothing changed"]]).verdict() == "nothing changed in 1 of 1 weights"
    assert AuditReport([rows["nothing is protected"]]).verdict() == "nothing is protected in 1 of 1 weights"
    assert AuditReport([]).verdict() == "nothing is protected"
    assert [record["verdict"] for record in everything.to_records()] == [*rows, "nothing changed"]


def test_a_model_against_itself_and_a_plan_that_protects_nothing_are_told() -> None:
    model, moved = tiny("llama"), tiny("llama")
    same = lorica.audit(model, model)
    assert same.holds
    assert "nothing changed in 14 of 14 weights" in same.verdict()
    assert "holds" not in same.verdict()
    train(moved, AdamW(moved.parameters(), lr=1e-3), 1, partial(batch, moved))
    free = lorica.audit(model, moved, lorica.plan(model, 1.0))
    assert free.holds
    assert free.verdict() == "nothing is protected in 14 of 14 weights"


def trained(name: str, optimizer_of: type[AdamW] = AdamW) -> tuple[nn.Module, lorica.Plan]:
    model = tiny(name)
    plan = lorica.plan(model, 0.5)
    lorica.protect(model, plan)
    train(model, optimizer_of(trainable(model), lr=1e-2), 3, partial(batch, model))
    return model, plan


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_models_and_folders_give_the_same_audit(tmp_path: Path, name: str) -> None:
    model, plan = trained(name)
    while_protected = lorica.audit(tiny(name), model, plan)
    lorica.release(model)
    model.save_pretrained(tmp_path / "after")
    tiny(name).save_pretrained(tmp_path / "before")
    from_folders = lorica.audit(tmp_path / "before", tmp_path / "after", plan)
    assert from_folders.to_records() == while_protected.to_records()
    assert while_protected.holds
    assert while_protected.worst <= 1e-5
    assert not while_protected.elsewhere
    assert f"the constraint holds in all {len(plan)} weights" in str(from_folders)


def test_plain_training_is_caught_and_what_moved_elsewhere_is_listed(tmp_path: Path) -> None:
    model = tiny("llama")
    train(model, AdamW(model.parameters(), lr=1e-3), 3, partial(batch, model))
    tiny("llama").save_pretrained(tmp_path / "before")
    model.save_pretrained(tmp_path / "after")
    report = lorica.audit(tmp_path / "before", tmp_path / "after", unfreeze_rank_ratio=0.5)
    assert len(report.rows) == 14
    assert not any(row.holds for row in report.rows)
    assert report.worst == pytest.approx(0.7, abs=0.25)
    assert "model.embed_tokens.weight" in report.elsewhere
    assert "14 of 14 weights leak" in report.verdict()
    assert "as if the top 50% were protected" in report.verdict()


def test_a_stale_core_is_folded_before_it_is_audited() -> None:
    model = protected_tiny()
    for layer in model.modules():
        if hasattr(layer, "core"):
            layer.core.data.fill_(0.1)
    assert all(
        row.relative_change > 0 for row in lorica.audit(tiny("llama"), model, lorica.plan(tiny("llama"), 0.5)).rows
    )


def test_the_leakage_function_checks_its_shapes() -> None:
    with pytest.raises(ValueError, match="bases do not fit"):
        leakage_of(torch.ones(3, 2), torch.ones(2, 1), torch.ones(2, 1))
