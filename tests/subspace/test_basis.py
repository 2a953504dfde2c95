from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorica.subspace.basis import Basis, Everything, Explicit, Reflector
from lorica.subspace.free_basis import free_basis
from lorica.subspace.orthonormal import complement, polar, reflector
from tests.builders import matrix

EYE = 1e-12


def orthonormal(d: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(matrix(d, max(k, 1), seed, torch.float64)).Q[:, :k]


def eye(d: int) -> torch.Tensor:
    return torch.eye(d, dtype=torch.float64)


@st.composite
def sides(draw: st.DrawFn) -> tuple[int, int, int]:
    d = draw(st.integers(1, 30))
    return d, draw(st.integers(0, d)), draw(st.integers(0, 99))


@given(sides())
def test_the_complement_is_orthonormal_and_orthogonal(side: tuple[int, int, int]) -> None:
    d, k, seed = side
    u = orthonormal(d, k, seed)
    q = complement(u)
    assert q.shape == (d, d - k)
    torch.testing.assert_close(u @ u.T + q @ q.T, eye(d), rtol=0, atol=EYE)
    torch.testing.assert_close(q.T @ q, eye(d - k), rtol=0, atol=EYE)
    torch.testing.assert_close(u.T @ q, torch.zeros(k, d - k, dtype=torch.float64), rtol=0, atol=EYE)


@given(sides())
def test_the_reflector_is_a_reflection(side: tuple[int, int, int]) -> None:
    d, k, seed = side
    u = orthonormal(d, k, seed)
    z = reflector(u)
    h = eye(d) - 2 * z @ z.T
    torch.testing.assert_close(z.T @ z, eye(k), rtol=0, atol=EYE)
    torch.testing.assert_close(h @ h, eye(d), rtol=0, atol=EYE)
    torch.testing.assert_close((h @ u)[k:], torch.zeros(d - k, k, dtype=torch.float64), rtol=0, atol=EYE)


@pytest.mark.parametrize(("d", "k"), [(9, 3), (9, 6), (5, 1), (4, 4)])
def test_the_basis_depends_on_the_subspace_alone(d: int, k: int) -> None:
    u = orthonormal(d, k)
    flipped = u * torch.tensor([(-1.0) ** i for i in range(k)], dtype=torch.float64)
    rotated = u @ orthonormal(k, k, seed=5)
    for other in (flipped, rotated, u.flip(1)):
        torch.testing.assert_close(complement(other), complement(u), rtol=0, atol=1e-11)


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-6, 1e-9, 0.0])
def test_the_polar_form_is_the_svds(smallest: float) -> None:
    x, y = orthonormal(12, 12), orthonormal(12, 12, seed=3)
    sigma = torch.linspace(1, 0.1, 12, dtype=torch.float64)
    sigma[-1] = smallest
    a = (x * sigma) @ y.T
    p, stretch = polar(a)
    torch.testing.assert_close(p.T @ p, eye(12), rtol=0, atol=EYE)
    torch.testing.assert_close(p @ stretch, a, rtol=0, atol=EYE)
    torch.testing.assert_close(stretch, (y * sigma) @ y.T, rtol=0, atol=EYE)
    if smallest > 1e-6:
        torch.testing.assert_close(p, x @ y.T, rtol=0, atol=1e-9)


def test_protected_directions_without_a_top_block_still_have_a_complement() -> None:
    u = eye(6)[:, 3:5]  # the top 2 x 2 block, whose polar form is taken, is zero
    q = complement(u)
    torch.testing.assert_close(q @ q.T, eye(6) - u @ u.T)


def bases() -> list[Basis]:
    u = orthonormal(9, 4)
    return [Everything(9), Explicit(complement(u)), Reflector(reflector(u)), Reflector(reflector(orthonormal(9, 8)))]


@pytest.mark.parametrize("basis", bases(), ids=lambda basis: f"{type(basis).__name__}-{basis.free}")
def test_reduce_and_expand_are_the_dense_matrix(basis: Basis) -> None:
    q = basis.matrix().double()
    assert q.shape == (basis.dim, basis.free)
    rows, reduced = matrix(7, basis.dim, 3, torch.float64), matrix(7, basis.free, 4, torch.float64)
    torch.testing.assert_close(basis.reduce(rows), rows @ q)
    torch.testing.assert_close(basis.expand(reduced), reduced @ q.T)
    torch.testing.assert_close(basis.reduce_columns(rows.T), q.T @ rows.T)
    torch.testing.assert_close(basis.expand_columns(reduced.T), q @ reduced.T)
    batched = rows.reshape(1, 7, basis.dim)
    torch.testing.assert_close(basis.reduce(batched), (rows @ q)[None])
    assert basis.reduce(rows.float()).dtype == torch.float32


@given(sides())
def test_the_cheapest_basis_spans_the_complement(side: tuple[int, int, int]) -> None:
    d, k, seed = side
    u = orthonormal(d, k, seed)
    basis = free_basis(u, torch.float64)
    q = basis.matrix().double()
    torch.testing.assert_close(q @ q.T, eye(d) - u @ u.T, rtol=0, atol=EYE)
    stored = sum(buffer.numel() for buffer in basis.buffers())
    assert stored == (0 if k == 0 else d * min(k, d - k))


@pytest.mark.parametrize("k", [2, 6], ids=["reflector", "explicit"])
def test_storing_in_float32_costs_its_rounding_and_no_more(k: int) -> None:
    u = orthonormal(8, k)
    q = free_basis(u, torch.float32).matrix().double()
    assert (u.T @ q).abs().max() < 2e-7
