"""One truncated second moment, against dense float64 matrices.

Shape suffixes: D the dimension, R kept directions.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorica.errors import LoricaError
from lorica.subspace.factor import Factor
from tests.builders import matrix

EYE = torch.eye(4, dtype=torch.float64)


def moment_of(dim: int, rank: int, seed: int, fall: float = 0.0) -> Tensor:
    """Return a random second moment of a given rank, its standard deviations spread over so many decades."""
    rotation = torch.linalg.qr(matrix(dim, dim, seed, torch.float64))[0][:, :rank]
    return rotation * 10.0 ** torch.linspace(0, -2 * fall, rank, dtype=torch.float64) @ rotation.T


def dense(factor: Factor) -> Tensor:
    """Return what a factor stands for, by its definition."""
    v = factor.vectors_DR.double()
    rest = torch.eye(len(v), dtype=torch.float64) - v @ v.T
    return v @ torch.diag(factor.energies_R) @ v.T + factor.floor * rest


def best(moment_DD: Tensor, rank: int) -> Tensor:
    """Return the best approximation whose further directions all have the same energy: by hand, from the SVD."""
    u, sigma, _ = torch.linalg.svd(moment_DD)
    cut = sigma.clone()
    cut[rank:] = sigma[rank:].mean() if rank < len(sigma) else 0
    return u * cut @ u.T


def close(a: Tensor, b: Tensor, atol: float = 1e-11) -> None:
    largest = float(b.abs().max()) if b.numel() else 0.0
    torch.testing.assert_close(a, b, rtol=0, atol=atol * max(1.0, largest))


SPECTRA = st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 5), st.sampled_from([0.0, 1.0, 4.0]))


@given(SPECTRA, st.integers(0, 11))
def test_a_factor_is_the_best_of_its_rank_with_the_right_trace(
    spectrum: tuple[int, int, int, float], rank: int
) -> None:
    dim, full, seed, fall = spectrum
    a = moment_of(dim, min(full, dim), seed, fall)
    factor = Factor.of(a, rank)
    assert factor.dim == dim
    assert factor.vectors_DR.shape == (dim, min(rank, dim))
    assert factor.trace == pytest.approx(float(a.trace()), rel=1e-12, abs=1e-14)
    assert (factor.energies_R.diff() <= 0).all()
    assert not len(factor.energies_R) or float(factor.energies_R.min()) >= factor.floor >= 0
    close(dense(factor), best(a, rank))
    close(factor.matrix(), dense(factor))
    close(Factor.of(a).matrix(), a)


@given(SPECTRA, st.integers(0, 9), st.integers(0, 9))
def test_cutting_twice_is_cutting_once(spectrum: tuple[int, int, int, float], first: int, second: int) -> None:
    dim, full, seed, fall = spectrum
    a = moment_of(dim, min(full, dim), seed, fall)
    twice, once = Factor.of(a, first).cut_to(second), Factor.of(a, min(first, second))
    assert twice.trace == pytest.approx(once.trace, abs=1e-13)
    torch.testing.assert_close(twice.energies_R, once.energies_R)
    assert twice.floor == pytest.approx(once.floor, abs=1e-13)
    assert torch.equal(twice.vectors_DR, once.vectors_DR)


@given(SPECTRA, st.integers(0, 9), st.integers(0, 9), st.sampled_from([torch.float64, torch.float32, torch.float16]))
def test_directions_are_orthonormal_and_begin_with_those_that_were_kept(
    spectrum: tuple[int, int, int, float], rank: int, k: int, dtype: torch.dtype
) -> None:
    dim, full, seed, fall = spectrum
    k = min(k, dim)
    whole = Factor.of(moment_of(dim, min(full, dim), seed, fall), rank)
    factor = Factor(whole.vectors_DR.to(dtype), whole.energies_R, whole.floor)
    found = factor.directions(k)
    assert found.shape == (dim, k)
    assert found.dtype == torch.float64
    close(found.T @ found, torch.eye(k, dtype=torch.float64), 1e-14)
    assert torch.equal(found, factor.directions(k))
    for j in range(1, min(k, len(factor.energies_R)) + 1):  # each leading span, not only the whole
        kept = whole.vectors_DR[:, :j]
        close(found[:, :j] @ found[:, :j].T, kept @ kept.T, 50 * torch.finfo(dtype).eps)


def test_what_is_drawn_beyond_the_kept_directions_is_not_one_of_them() -> None:
    factor = Factor.of(torch.diag(torch.tensor([5.0, 3.0, 1.0, 1.0])), 2)
    assert factor.floor == pytest.approx(1.0)
    found = factor.directions(3)
    close(found[:2, 2], torch.zeros(2, dtype=torch.float64))
    close(factor.directions(4) @ factor.directions(4).T, EYE)


@given(SPECTRA, st.integers(0, 9), st.integers(0, 14))
def test_filling_up_changes_nothing_but_how_much_is_written_down(
    spectrum: tuple[int, int, int, float], rank: int, wanted: int
) -> None:
    dim, full, seed, fall = spectrum
    factor = Factor.of(moment_of(dim, min(full, dim), seed, fall), rank)
    filled = factor.filled(min(wanted, dim))
    assert len(filled.energies_R) == filled.vectors_DR.shape[1] == max(min(wanted, dim), len(factor.energies_R))
    assert filled.trace == pytest.approx(factor.trace, abs=1e-13)
    close(filled.matrix(), factor.matrix())


@given(SPECTRA, SPECTRA, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_a_sum_is_the_best_of_its_rank(
    first: tuple[int, int, int, float], second: tuple[int, int, int, float], r1: int, r2: int, rank: int
) -> None:
    dim = first[0]
    one, two = (
        Factor.of(moment_of(dim, min(full, dim), seed, fall), r)
        for (_, full, seed, fall), r in ((first, r1), ((dim, *second[1:]), r2))
    )
    both = one.plus(two, rank)
    a = dense(one) + dense(two)
    v = both.vectors_DR
    assert v.shape[1] <= min(rank, dim)
    close(v.T @ v, torch.eye(v.shape[1], dtype=torch.float64), 1e-13)
    assert both.trace == pytest.approx(one.trace + two.trace, rel=1e-12, abs=1e-14)
    floors = one.floor + two.floor
    sigma = torch.linalg.eigvalsh(a).flip(0)
    kept = len(both.energies_R)
    close(both.energies_R, sigma[:kept])
    # What is left out is all of the same energy, or there was no room for it.
    assert kept == min(rank, dim) or float(sigma[kept] - floors) <= 1e-11 * float(sigma[0])
    close(v @ torch.diag(both.energies_R) @ v.T, v @ (v.T @ a @ v) @ v.T)


def test_a_sum_of_steep_spectra_stays_orthonormal() -> None:
    """Directions with a millionth of the largest standard deviation are not exact, but they are orthonormal."""
    one, two = (Factor.of(moment_of(60, 60, seed, fall=7.0), 30) for seed in (1, 2))
    v = one.plus(two, 40).vectors_DR
    assert v.shape[1] == 40
    close(v.T @ v, torch.eye(40, dtype=torch.float64), 1e-13)


def test_isotropic_moments_have_no_directions_to_add() -> None:
    one = Factor(EYE[:, :0], torch.zeros(0, dtype=torch.float64), 2.0)
    both = one.plus(one, 3)
    assert both.vectors_DR.shape == (4, 0)
    assert both.floor == 4.0
    assert both.trace == 16.0
    torch.testing.assert_close(both.plus(Factor.of(torch.diag(torch.tensor([1.0, 0, 0, 0]))), 1).matrix(),
                               torch.diag(torch.tensor([5.0, 4, 4, 4], dtype=torch.float64)))  # fmt: skip


def test_zero_stays_zero() -> None:
    zero = Factor.of(torch.zeros(4, 4), 2)
    assert zero.trace == 0.0
    assert torch.equal(zero.plus(zero, 2).matrix(), 0 * EYE)
    assert zero.directions(3).shape == (4, 3)


def test_scaling_scales() -> None:
    factor = Factor.of(torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0])), 2)
    assert factor.scaled(0.5).trace == pytest.approx(7.5)
    close(factor.scaled(0.5).matrix(), torch.diag(torch.tensor([4.0, 2.0, 0.75, 0.75], dtype=torch.float64)))
    assert factor.trace == 15.0


def test_a_floor_is_never_above_what_is_kept() -> None:
    """A sketch may have missed some of a direction that it kept; a larger floor would put the others above it."""
    factor = Factor.cut(EYE[:, :1], torch.tensor([1.0], dtype=torch.float64), trace=100.0)
    assert factor.floor == 1.0


@pytest.mark.parametrize("change", ["vectors_DR", "energies_R", "floor"])
def test_equal_means_to_the_last_bit(change: str) -> None:
    one = Factor.of(moment_of(5, 5, 1), 3)
    parts = {name: getattr(one, name) for name in ("vectors_DR", "energies_R", "floor")}
    assert one.same_as(Factor(**parts))
    assert not one.same_as(Factor(**parts | {change: parts[change] * (1 + 2**-52)}))
    assert not one.same_as(one.cut_to(2))


def test_a_side_of_another_width_is_refused() -> None:
    with pytest.raises(LoricaError, match=r"^w has a side of 5, .* has 4: it belongs to another model"):
        Factor.of(EYE).check_side("w", 5)
