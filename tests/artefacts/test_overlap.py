"""The overlap of two changes against what it is by hand, and against the spaces by ``torch.linalg.svd``."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorica.artefacts.overlap import TOLERANCE, Overlap, overlap
from lorica.constrain.audit_weight import rounding_share
from tests.builders import matrix


def unit(angle: float) -> Tensor:
    return torch.tensor([math.cos(angle), math.sin(angle), 0.0], dtype=torch.float64)


@given(st.floats(0, math.pi), st.floats(0, math.pi))
def test_for_changes_of_one_direction_it_is_the_cosine(reads: float, writes: float) -> None:
    d = torch.outer(unit(0), unit(0))
    e = -7 * torch.outer(unit(writes), unit(reads))
    found = overlap(d, e)
    assert found.inputs == pytest.approx(abs(math.cos(reads)), abs=1e-9)
    assert found.outputs == pytest.approx(abs(math.cos(writes)), abs=1e-9)
    assert found.value == min(found.inputs, found.outputs)


def test_by_hand() -> None:
    # D reads e1 twice as strongly as e2, E reads e1 alone: |D E^T| = 2, |D D^T| = sqrt(17), |E E^T| = 1.
    d = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    e = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    found = overlap(d, e)
    assert found.inputs == pytest.approx(2 / 17**0.25)
    assert found.outputs == pytest.approx(1 / 17**0.25)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (16, 16), (3, 6, 20)])
def test_it_is_the_formula(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    d, e = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    found = overlap(d, e)
    full = [torch.block_diag(*x.reshape(-1, *shape[-2:])) for x in (d, e)]
    for value, (a, b) in [(found.inputs, full), (found.outputs, [x.T for x in full])]:
        expected = (a @ b.T).norm() / ((a @ a.T).norm() * (b @ b.T).norm()).sqrt()
        assert value == pytest.approx(expected.item())


@given(st.integers(0, 50), st.sampled_from([(6, 20), (20, 6), (12, 12)]))
def test_it_lies_between_0_and_the_largest_cosine_between_the_spaces(seed: int, shape: tuple[int, int]) -> None:
    m, n = shape
    d, e = (matrix(m, 3, seed + i, torch.float64) @ matrix(3, n, seed + 7 + i, torch.float64) for i in (0, 20))
    found, back = overlap(d, e), overlap(0.01 * e, d)
    _, _, rows_d = torch.linalg.svd(d, full_matrices=False)
    _, _, rows_e = torch.linalg.svd(e, full_matrices=False)
    cosine = torch.linalg.matrix_norm(rows_d[:3] @ rows_e[:3].T, 2).item()
    assert 0 < found.inputs <= cosine + 1e-9
    assert (back.inputs, back.outputs) == (pytest.approx(found.inputs), pytest.approx(found.outputs))


def test_a_change_overlaps_with_itself_entirely() -> None:
    d = matrix(9, 5, dtype=torch.float64)
    assert overlap(d, -3 * d).value == pytest.approx(1)


def test_vectors_overlap_where_both_move_the_same_entries() -> None:
    first, second, both = (torch.tensor(x, dtype=torch.float64) for x in ([1, 2, 0, 0], [0, 0, 3, 4], [1, -1, 1, -1]))
    assert overlap(first, second) == Overlap(0.0, 0.0)
    assert overlap(both, both.abs()).value == pytest.approx(1)
    expected = math.sqrt((1 + 4) / (math.sqrt(1 + 16) * 2))
    assert overlap(first, both).value == pytest.approx(expected)
    diagonal = overlap(torch.diag(first), torch.diag(both))
    assert diagonal.inputs == pytest.approx(expected)


def test_no_change_overlaps_with_nothing() -> None:
    d = matrix(4, 4, dtype=torch.float64)
    assert overlap(d, torch.zeros_like(d)) == Overlap(0.0, 0.0)


def disjoint(dtype: torch.dtype, size: float, n: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight and it with two changes that read orthogonal halves of the inputs, in a dtype."""
    torch.manual_seed(1)
    basis, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    weight = matrix(n, n, dtype=dtype)
    changes = (torch.randn(n, n // 2, dtype=torch.float64) @ half.T for half in basis.split(n // 2, dim=1))
    moved = [(weight.double() + size * 0.3 * d / d.square().mean().sqrt()).to(dtype) for d in changes]
    return weight, *moved


@pytest.mark.parametrize("size", [0.1, 0.01, 0.001])
def test_rounding_of_float32_stays_far_below_the_tolerance(size: float) -> None:
    weight, *moved = disjoint(torch.float32, size)
    found = overlap(*(x.double() - weight.double() for x in moved))
    assert found.inputs < TOLERANCE / 20
    assert found.outputs > 0.5  # they write to the same outputs


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 0.01), (torch.float16, 0.02), (torch.bfloat16, 0.05)])
def test_what_rounding_causes_is_foretold(dtype: torch.dtype, size: float) -> None:
    weight, *moved = disjoint(dtype, size)
    deltas = [x.double() - weight.double() for x in moved]
    found = overlap(deltas[0], deltas[1], (rounding_share(weight, moved[0]), rounding_share(weight, moved[1])))
    assert found.rounding == pytest.approx(found.inputs, rel=0.2)
    turned = overlap(deltas[0].T, deltas[1].T, (rounding_share(weight, moved[0]), rounding_share(weight, moved[1])))
    assert turned.rounding == pytest.approx(turned.outputs, rel=0.2)
