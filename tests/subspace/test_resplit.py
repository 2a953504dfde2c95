"""A weight is split from the split it had before its last task, exactly or not at all. The reference is numpy's SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorica.subspace.linalg import HalfSplit, half_split, is_split_of, whole_split
from lorica.subspace.resplit import Eigen, misfit, refreshed, symmetric_product
from tests.builders import matrix

SHAPES = [(96, 96), (200, 64), (64, 200)]


def reference(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V of the thin SVD, by numpy."""
    u, sigma, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return torch.tensor(u), torch.tensor(sigma), torch.tensor(vh.T.copy())


def grown(weight: Tensor, k: int, change: float, seed: int = 7) -> Tensor:
    """Return the weight after a task that left its top k triplets alone: W + Q_U M Q_V^T, rounded to its dtype."""
    u, s, vh = np.linalg.svd(weight.double().numpy())
    q_u, q_v = torch.tensor(u[:, k:]), torch.tensor(vh[k:].T.copy())
    delta = q_u @ matrix(q_u.shape[1], q_v.shape[1], seed, torch.float64) @ q_v.T
    return (weight.double() + delta * (change * float(np.linalg.norm(s)) / delta.norm())).to(weight.dtype)


def gram(weight: Tensor) -> Tensor:
    w = weight.double()
    return w @ w.T if w.shape[0] < w.shape[1] else w.T @ w


def resplit(before: Tensor, after: Tensor) -> Eigen | None:
    return refreshed(gram(after), half_split(before).short_SS)


def short_side(weight: Tensor) -> Tensor:
    u, _, v = reference(weight)
    return u if weight.shape[0] < weight.shape[1] else v


def angle(found: Tensor, expected: Tensor) -> float:
    """Return the sine of the largest angle between two spaces of the same dimension."""
    outside = found - expected @ (expected.T @ found)
    return float(torch.linalg.matrix_norm(outside, 2)) if found.shape[1] else 0.0


@pytest.mark.parametrize("change", [1e-5, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_resplit_is_as_exact_as_a_full_split(shape: tuple[int, int], change: float) -> None:
    before = matrix(*shape)
    size = min(shape)
    after = grown(before, 3 * size // 4, change)
    found = resplit(before, after)
    assert found is not None
    _, sigma, _ = reference(after)
    torch.testing.assert_close(found.values_S / sigma[0] ** 2, (sigma / sigma[0]).square(), rtol=0, atol=1e-14)
    expected = short_side(after)
    for k in range(1, size):  # every cut, also one through what was protected
        gap = float((sigma[k - 1].square() - sigma[k].square()) / sigma[0].square())
        assert angle(found.vectors_SS[:, :k], expected[:, :k]) < 1e-13 * size / gap


@given(m=st.integers(9, 40), n=st.integers(9, 40), share=st.floats(0, 1), log=st.floats(-7, 1), seed=st.integers(0, 99))
def test_any_shape_any_k_any_change(m: int, n: int, share: float, log: float, seed: int) -> None:
    before = matrix(m, n, seed)
    after = grown(before, int(share * min(m, n)), 10**log, seed + 1) if share < 1 else before.clone()
    half = half_split(after, half_split(before).short_SS)
    g, vectors, values = gram(after), half.short_SS, half.sigma_S.square()
    assert (g @ vectors - vectors * values).norm() <= 1e-12 * values[0]
    assert (vectors.T @ vectors - torch.eye(len(g))).norm() <= 1e-12
    assert bool((half.sigma_S.diff() <= 0).all())
    k = min(m, n) // 2
    parts = whole_split(after, half, k)
    rest = after.double() - (parts.u_MK * parts.sigma_S[:k]) @ parts.v_NK.T
    assert rest.norm().item() == pytest.approx(reference(after)[1][k:].norm().item(), rel=1e-9)  # Eckart-Young


def test_only_what_changed_is_diagonalised(monkeypatch: pytest.MonkeyPatch) -> None:
    before = matrix(160, 160)
    after = grown(before, 120, 0.01)
    old, eigh, sizes = half_split(before).short_SS, torch.linalg.eigh, []

    def counted(block: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(block))
        return eigh(block)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    half_split(after, old)
    assert 40 <= sizes[0] <= 50
    assert max(sizes) <= 50


def test_the_next_task_leaks_nothing_after_many_tasks() -> None:
    weight, k = matrix(120, 80), 60
    half = half_split(weight)
    for task in range(12):
        after = grown(weight, k, 0.02, seed=task)
        found = refreshed(gram(after), half.short_SS)
        assert found is not None
        weight, half = after, HalfSplit(found.values_S.sqrt(), found.vectors_SS)
        parts = whole_split(weight, half, k)
        free_u, free_v = (torch.eye(len(q), dtype=torch.float64) - q @ q.T for q in (parts.u_MK, parts.v_NK))
        update = free_u @ matrix(120, 80, 99, torch.float64) @ free_v
        u, _, v = reference(weight)
        assert (u[:, :k].T @ update).norm() <= 1e-9 * update.norm()
        assert (update @ v[:, :k]).norm() <= 1e-9 * update.norm()


def with_spectrum(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a 60 x 40 weight with the given singular values, and its vectors."""
    u = torch.linalg.qr(matrix(60, 40, 1, torch.float64)).Q
    v = torch.linalg.qr(matrix(40, 40, 2, torch.float64)).Q
    return u * sigma @ v.T, u, v


def test_a_free_direction_that_outgrew_the_protected_ones_comes_first() -> None:
    sigma = torch.linspace(4, 1, 40, dtype=torch.float64)
    before, u, v = with_spectrum(sigma)
    after = before + 7 * torch.outer(u[:, 38], v[:, 35])  # both among the 10 free ones
    found = resplit(before, after)
    assert found is not None
    assert found.values_S[0].sqrt() > 6
    torch.testing.assert_close(found.values_S.sqrt(), reference(after)[1])
    assert angle(found.vectors_SS[:, :30], short_side(after)[:, :30]) < 1e-10
    assert found.vectors_SS[:, 0] @ v[:, 35] != pytest.approx(0, abs=0.9)


@pytest.mark.parametrize("distance", [0.0, 1e-14, 1e-11, 1e-8, 1e-5])
def test_a_free_direction_that_meets_a_protected_one(distance: float) -> None:
    sigma = torch.linspace(4, 1, 40, dtype=torch.float64)
    before, u, v = with_spectrum(sigma)
    last = sigma[29] + distance  # the 30th is the last that is protected
    noise = 1e-8 * matrix(60, 40, 5, torch.float64)  # what rounding to float32 does
    after = before + (last - sigma[35]) * torch.outer(u[:, 35], v[:, 35]) + noise
    found = resplit(before, after)
    assert found is not None
    g = gram(after)
    assert (g @ found.vectors_SS - found.vectors_SS * found.values_S).norm() < 1e-13 * 40 * found.values_S[0]
    assert angle(found.vectors_SS[:, :31], short_side(after)[:, :31]) < 1e-10  # the pair together
    assert angle(found.vectors_SS[:, :29], short_side(after)[:, :29]) < 1e-10  # and without it


def test_equal_singular_values_are_no_obstacle() -> None:
    sigma = torch.tensor([3.0] * 15 + [2.0] * 15 + [1.0] * 10, dtype=torch.float64)
    before, u, v = with_spectrum(sigma)
    after = before + 0.3 * u[:, 30:] @ matrix(10, 10, 3, torch.float64) @ v[:, 30:].T
    found = resplit(before, after)
    assert found is not None
    torch.testing.assert_close(found.values_S.sqrt(), reference(after)[1])
    assert angle(found.vectors_SS[:, :15], short_side(after)[:, :15]) < 1e-10


@pytest.mark.parametrize(
    "after",
    [matrix(96, 96, 5), grown(matrix(96, 96), 0, 0.3), grown(matrix(96, 96, dtype=torch.bfloat16), 72, 0.01)],
    ids=["another weight", "all has changed", "bfloat16"],
)
def test_where_too_much_has_changed_the_full_split_is_taken(after: Tensor) -> None:
    before = matrix(96, 96).to(after.dtype)
    assert resplit(before, after) is None
    old, full = half_split(after, half_split(before).short_SS), half_split(after)
    assert torch.equal(old.sigma_S, full.sigma_S)
    assert torch.equal(old.short_SS, full.short_SS)


def test_a_hint_that_is_no_basis_is_not_believed() -> None:
    after = matrix(64, 64)
    exact = half_split(after).short_SS
    bent = exact + 1e-7 * matrix(64, 64, 3, torch.float64)
    for hint in (bent, 2 * exact, torch.zeros_like(exact), torch.full_like(exact, torch.nan)):
        assert refreshed(gram(after), hint) is None


@pytest.mark.parametrize("error", [1e-12, 1e-6, 1e-2])
def test_the_misfit_is_estimated_from_few_probes(error: float) -> None:
    g = gram(matrix(90, 60))
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(g))
    bent = vectors + error * matrix(60, 60, 4, torch.float64)
    residual, skewness = misfit(g.matmul, Eigen(values, bent))
    assert residual == pytest.approx(float((g @ bent - bent * values).norm() / values[0]), rel=0.5)
    assert skewness == pytest.approx(float((bent.T @ bent - torch.eye(60)).norm()), rel=0.5)


def test_a_split_is_known_from_that_of_another_weight() -> None:
    weight = matrix(50, 30)
    half = half_split(weight)
    assert is_split_of(half, weight)
    assert is_split_of(half_split(1e30 * weight.double()), 1e30 * weight.double())
    assert not is_split_of(half, matrix(50, 30, 1))
    assert not is_split_of(HalfSplit(half.sigma_S, half.short_SS.roll(1, 1)), weight)
    half.short_SS[3, 4] += 1e-6
    assert not is_split_of(half, weight)


@given(rows=st.integers(1, 30), size=st.integers(1, 30))
def test_half_of_a_symmetric_product_is_enough(rows: int, size: int) -> None:
    a = matrix(rows, size, 1, torch.float64)
    product = symmetric_product(a, a)
    assert torch.equal(product, product.T)
    torch.testing.assert_close(product, a.T @ a)
