"""The long-side basis that is read off the weight, against the one that is stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lorica.subspace.basis import Explicit, Reflector
from lorica.subspace.derived import Derived
from lorica.subspace.free_basis import free_basis
from lorica.subspace.linalg import split
from tests.builders import matrix

F64 = torch.float64


def singular(weight: Tensor, k: int) -> Tensor:
    return torch.linalg.svd(weight.double(), full_matrices=False).U[:, :k]


@given(st.integers(1, 12), st.integers(1, 40), st.data())
def test_it_is_the_stored_reflector(short: int, extra: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, short))
    weight = matrix(short + k + extra, short, 3, F64)
    u = singular(weight, k)
    derived, stored = free_basis(u, F64, weight), free_basis(u, F64)
    assert isinstance(derived, Derived)
    assert isinstance(stored, Reflector)
    q = derived.on(weight).matrix()
    torch.testing.assert_close(q, stored.matrix(), rtol=0, atol=1e-9)
    torch.testing.assert_close(q @ q.T, torch.eye(len(q), dtype=F64) - u @ u.T, rtol=0, atol=1e-9)
    assert sum(b.numel() for b in derived.buffers()) == k * (k + short) < sum(b.numel() for b in stored.buffers())


def test_products_are_those_of_the_dense_matrix() -> None:
    weight = matrix(30, 8, 0, F64)
    basis = free_basis(singular(weight, 6), F64, weight).on(weight)
    q = basis.matrix()
    rows, reduced = matrix(7, 30, 1, F64), matrix(7, 24, 2, F64)
    torch.testing.assert_close(basis.reduce(rows), rows @ q)
    torch.testing.assert_close(basis.expand(reduced), reduced @ q.T)
    torch.testing.assert_close(basis.reduce_columns(rows.T), q.T @ rows.T)
    torch.testing.assert_close(basis.expand_columns(reduced.T), q @ reduced.T)
    torch.testing.assert_close(basis.reduce(rows[None]), (rows @ q)[None])
    assert basis.reduce(rows.float()).dtype == torch.float32
    products = ((basis.reduce, rows), (basis.expand, reduced))
    for product, seven in (*products, (basis.reduce_columns, rows.T), (basis.expand_columns, reduced.T)):
        with FlopCounterMode(display=False) as counter:
            product(seven)
        assert counter.get_total_flops() == 7 * basis.flops()


def test_any_weight_that_the_constraint_allows_gives_the_same_basis() -> None:
    weight = matrix(30, 8, 0, F64)
    parts = split(weight, 6)
    basis = free_basis(parts.u_MK, F64, weight)
    left, right = free_basis(parts.u_MK, F64).matrix(), free_basis(parts.v_NK, F64).matrix()
    moved = weight + 3 * left @ matrix(24, 2, 4, F64) @ right.T
    assert (moved - weight).norm() > weight.norm()
    torch.testing.assert_close(basis.on(moved).matrix(), basis.on(weight).matrix(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("dim", "short", "k", "kind"),
    [(8, 8, 6, Explicit), (8, 8, 3, Reflector), (14, 8, 6, Reflector), (15, 8, 6, Derived), (15, 8, 0, None)],
)
def test_it_is_taken_only_where_it_is_smaller(dim: int, short: int, k: int, kind: type | None) -> None:
    weight = matrix(dim, short, 5, F64)
    chosen = free_basis(singular(weight, k), F64, weight)
    assert kind is None or type(chosen) is kind
    assert sum(b.numel() for b in chosen.buffers()) <= dim * min(k, dim - k)


def test_directions_of_tiny_singular_values_are_stored_not_read_off() -> None:
    left, right = torch.linalg.qr(matrix(30, 8, 0, F64)).Q, torch.linalg.qr(matrix(8, 8, 1, F64)).Q
    for smallest, kind in ((1e-1, Derived), (1e-7, Reflector), (0.0, Reflector)):
        sigma = torch.tensor([1, 1, 1, 1, 1, smallest, 0, 0], dtype=F64)
        weight = ((left * sigma) @ right.T).float()
        assert type(free_basis(left[:, :6], torch.float32, weight)) is kind, smallest


def test_directions_that_are_not_the_weights_own_are_stored() -> None:
    weight = matrix(30, 8, 0, F64)
    foreign = torch.linalg.qr(matrix(30, 6, 9, F64)).Q
    assert isinstance(free_basis(foreign, F64, weight), Reflector)


@pytest.mark.parametrize(("dim", "k", "short"), [(30, 6, 8), (30, 20, 25), (30, 6, 30), (30, 0, 8)])
def test_without_values_it_has_the_same_form(dim: int, k: int, short: int) -> None:
    weight = matrix(dim, short, 0, F64)
    real = free_basis(singular(weight, k), torch.float32, weight)
    blank = free_basis(torch.empty(dim, k, dtype=F64, device="meta"), torch.float32, weight.to("meta"))
    assert type(blank) is type(real)
    assert [(b.shape, b.dtype) for b in blank.buffers()] == [(b.shape, b.dtype) for b in real.buffers()]
    assert all(b.is_meta for b in blank.buffers())
