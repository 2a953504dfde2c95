"""Source ``hybrid``, and what finished tasks learned beside what a source protects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorica.errors import LoricaError
from lorica.subspace.factor import Factor, Factors
from lorica.subspace.plan_entry import PlanEntry
from lorica.subspace.sources import directions_and_spectrum, extended, hybrid_inputs, protected_directions
from lorica.subspace.store import SplitStore
from tests.builders import SHAPES, matrix, top_directions

EYE = torch.eye(6, dtype=torch.float64)


def moment(n: int, seed: int = 5) -> Tensor:
    x = matrix(3 * n, n, seed, torch.float64)
    return x.T @ x


def principal(moment_NN: Tensor, k: int) -> Tensor:
    u, _, _ = torch.linalg.svd(moment_NN)
    return u[:, :k]


def seen(moment_NN: Tensor) -> Factors:
    return Factors(inputs=Factor.of(moment_NN))


def outside(vectors: Tensor, basis: Tensor) -> float:
    """Return the largest part of some unit vectors outside the span of an orthonormal basis."""
    return float((vectors - basis @ (basis.T @ vectors)).norm(dim=0).amax()) if vectors.shape[1] else 0.0


def is_orthonormal(basis: Tensor) -> bool:
    return torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=basis.dtype), atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("constraint", ["input", "two-sided"])
def test_hybrid_holds_half_of_each(shape: tuple[int, int], constraint: Any) -> None:
    m, n = shape
    w, a = matrix(m, n), moment(n)
    limit = n if constraint == "input" else min(m, n)
    for k in {0, 1, min(5, limit), limit}:
        entry = PlanEntry(name="w", shape=shape, k=k, source="hybrid", constraint=constraint)
        assert entry.limit == limit
        u, v = protected_directions(w, entry, seen(a))
        assert v.shape == (n, k)
        assert is_orthonormal(v)
        assert outside(principal(a, (k + 1) // 2), v) < 1e-9
        assert outside(top_directions(w, min(k // 2, m))[1], v) < 1e-9
        if constraint == "input":
            assert u.shape == (m, 0)
        else:
            torch.testing.assert_close(u @ u.T, top_directions(w, k)[0] @ top_directions(w, k)[0].T)


def test_hybrid_takes_the_next_singular_vector_for_one_that_is_there_already() -> None:
    # Principal inputs 0 and 1; singular vectors 1, 0, 5, 2: the first two add nothing.
    v = hybrid_inputs(EYE, EYE[:, [1, 0, 5, 2]], 4)
    assert torch.equal(v @ v.T, torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 1], dtype=torch.float64)))


def test_hybrid_goes_on_with_principal_inputs_where_the_weight_has_no_more() -> None:
    v = hybrid_inputs(EYE, EYE[:, [5]], 5)
    assert torch.equal(v @ v.T, torch.diag(torch.tensor([1.0, 1, 1, 1, 0, 1], dtype=torch.float64)))


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_hybrid_is_orthonormal_for_any_k(m: int, n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    singular = top_directions(matrix(m, n, seed=m), min(m, n))[1]
    v = hybrid_inputs(principal(moment(n), n), singular, k)
    assert v.shape == (n, k)
    assert is_orthonormal(v)


@pytest.mark.parametrize("source", ["activation", "hybrid"])
def test_a_measured_source_needs_its_inputs(source: Any) -> None:
    entry = PlanEntry(name="w", shape=(6, 4), k=2, source=source, constraint="input")
    with pytest.raises(LoricaError, match=f"w: source '{source}' needs calibration inputs, which a saved plan"):
        protected_directions(matrix(6, 4), entry)


def test_what_is_there_already_adds_nothing() -> None:
    base = EYE[:, :3]
    turned = torch.linalg.qr(matrix(3, 3, 1, torch.float64)).Q
    noise = 1e-8 * matrix(6, 3, 2, torch.float64)
    assert torch.equal(extended(base, base @ turned + noise), base)
    assert torch.equal(extended(EYE, EYE[:, :2]), EYE)
    assert torch.equal(extended(base, EYE[:, :0]), base)


@given(st.integers(1, 8), st.data())
def test_extending_spans_both(size: int, data: st.DataObject) -> None:
    first, second = data.draw(st.integers(0, size)), data.draw(st.integers(0, size))
    base = torch.linalg.qr(matrix(size, first, 1, torch.float64)).Q
    more = torch.linalg.qr(matrix(size, second, 2, torch.float64)).Q
    both = extended(base, more)
    assert torch.equal(both[:, :first], base)
    assert is_orthonormal(both)
    assert outside(more, both) < 1e-9
    assert both.shape[1] == int(torch.linalg.matrix_rank(torch.cat([base, more], dim=1)))


@pytest.mark.parametrize(
    ("constraint", "columns"), [("two-sided", (5, 5)), ("input", (0, 5)), ("output", (5, 0)), ("block", (5, 5))]
)
def test_learned_directions_join_the_sides_that_are_protected(constraint: Any, columns: tuple[int, int]) -> None:
    w = matrix(9, 8)
    p, r = (torch.linalg.qr(matrix(size, 2, 3, torch.float64)).Q for size in (9, 8))
    entry = PlanEntry(name="w", shape=(9, 8), k=3, constraint=constraint)
    directions = protected_directions(w, entry, learned=(p, r))
    assert tuple(side.shape[1] for side in directions) == columns
    for side, source, more in zip(directions, top_directions(w, 3), (p, r), strict=True):
        if side.shape[1]:
            assert is_orthonormal(side)
            assert outside(torch.cat([source, more], dim=1), side) < 1e-9


@pytest.mark.parametrize("source", ["weight", "hybrid"])
def test_directions_come_from_the_store_where_one_is_given(source: Any, tmp_path: Path) -> None:
    w = matrix(260, 256)
    a = moment(256)
    entry = PlanEntry(name="layer", shape=(260, 256), k=100, source=source, constraint="two-sided")
    plain, sigma = directions_and_spectrum(w, entry, seen(a))
    assert not list(tmp_path.iterdir())
    store = SplitStore(tmp_path)
    for _ in range(2):  # computed, then read
        kept, kept_sigma = directions_and_spectrum(w, entry, seen(a), store=store)
        assert torch.equal(kept.u_MA, plain.u_MA)
        assert torch.equal(kept.v_NB, plain.v_NB)
        assert sigma is not None
        assert kept_sigma is not None
        assert torch.equal(kept_sigma, sigma)
        assert len(list(tmp_path.iterdir())) == 2  # the split, and what "layer" was
    assert torch.equal(protected_directions(w, entry, seen(a), store=store).v_NB, plain.v_NB)


def test_a_weight_that_cannot_be_split_is_named_with_a_store_too(tmp_path: Path) -> None:
    w = matrix(6, 4)
    w[0, 0] = torch.nan
    with pytest.raises(LoricaError, match="layer: the 6 x 4 weight holds NaN or inf"):
        protected_directions(w, PlanEntry(name="layer", shape=(6, 4), k=2), store=SplitStore(tmp_path))


def test_learned_directions_that_are_not_at_hand_are_missed() -> None:
    entry = PlanEntry(name="w", shape=(6, 4), k=2, learned=(1, 1))
    with pytest.raises(LoricaError, match=r"w: the plan protects directions that finished tasks learned in.*\[0, 0\]"):
        protected_directions(matrix(6, 4), entry)
