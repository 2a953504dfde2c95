from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lorica.errors import LoricaError
from lorica.subspace import linalg
from lorica.subspace.linalg import half_split, singular_values, split, whole_split
from lorica.subspace.orthonormal import is_orthonormal, orthonormalise
from tests.builders import SHAPES, matrix, top_directions


def projector(basis: torch.Tensor) -> torch.Tensor:
    return basis @ basis.T


def with_spectrum(m: int, n: int, sigma: torch.Tensor) -> torch.Tensor:
    """Return a float64 matrix with the given singular values."""
    u = torch.linalg.qr(matrix(m, len(sigma), 1, torch.float64)).Q
    v = torch.linalg.qr(matrix(n, len(sigma), 2, torch.float64)).Q
    return u * sigma @ v.T


@pytest.mark.parametrize("method", ["gram", "svd"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_split_agrees_with_the_full_svd(shape: tuple[int, int], method: str) -> None:
    w = matrix(*shape)
    k = (min(shape) + 1) // 2
    parts = split(w, k, method=method)
    u, v = top_directions(w, k)
    torch.testing.assert_close(parts.sigma_S, torch.linalg.svdvals(w.double()), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(projector(parts.u_MK), projector(u), rtol=0, atol=1e-9)
    torch.testing.assert_close(projector(parts.v_NK), projector(v), rtol=0, atol=1e-9)
    torch.testing.assert_close((parts.u_MK * parts.sigma_S[:k]).T @ parts.u_MK, torch.diag(parts.sigma_S[:k]))


@given(m=st.integers(1, 24), n=st.integers(1, 24), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_top_k_is_the_best_approximation_of_its_rank(m: int, n: int, share: float, seed: int) -> None:
    w = matrix(m, n, seed)
    k = int(share * min(m, n))
    parts = split(w, k)
    assert is_orthonormal(parts.u_MK)
    assert is_orthonormal(parts.v_NK)
    rest = w.double() - (parts.u_MK * parts.sigma_S[:k]) @ parts.v_NK.T
    expected = parts.sigma_S[k:].square().sum().sqrt()  # Eckart-Young
    assert rest.norm().item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.reliability("R17")
def test_scale_changes_the_spectrum_alone(scale: float) -> None:
    w = matrix(12, 8, dtype=torch.float64)
    plain, scaled = split(w, 4), split(w * scale, 4)
    torch.testing.assert_close(scaled.sigma_S / scale, plain.sigma_S)
    torch.testing.assert_close(projector(scaled.v_NK), projector(plain.v_NK), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "w",
    [torch.zeros(6, 9), torch.full((6, 9), 3.0), with_spectrum(6, 9, torch.tensor([2.0, 1.0])).float()],
    ids=["zero", "constant", "rank-2"],
)
@pytest.mark.reliability("R17")
def test_more_directions_than_the_rank_are_still_orthonormal(w: torch.Tensor) -> None:
    parts = split(w, 5)
    assert is_orthonormal(parts.u_MK)
    assert is_orthonormal(parts.v_NK)
    lost = w.double() - parts.u_MK @ parts.u_MK.T @ w.double() @ parts.v_NK @ parts.v_NK.T
    assert lost.norm() <= 1e-6 * max(1.0, w.norm().item())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.reliability("R17")
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    w = matrix(4, 3)
    w[2, 1] = bad
    with pytest.raises(LoricaError, match="4 x 3 weight holds NaN or inf"):
        split(w, 2)


@pytest.mark.parametrize("k", [-1, 4])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(LoricaError, match="out of range for a 4 x 3 weight: 0 to 3"):
        split(matrix(4, 3), k)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="split method 'SVD' is unknown; known: gram, svd"):
        split(matrix(4, 3), 2, method="SVD")  # type: ignore[arg-type]


@pytest.mark.parametrize("decades", [3, 5, 7])
def test_the_fallback_keeps_ill_conditioned_weights_exact(decades: int) -> None:
    w = with_spectrum(48, 32, torch.logspace(0, -decades, 32, dtype=torch.float64))
    u, v = top_directions(w, 24)
    parts = split(w, 24)
    torch.testing.assert_close(projector(parts.u_MK), projector(u), rtol=0, atol=1e-9)
    torch.testing.assert_close(projector(parts.v_NK), projector(v), rtol=0, atol=1e-9)


def test_a_float32_gram_matrix_fails_where_this_one_does_not() -> None:
    w = with_spectrum(48, 32, torch.logspace(0, -3.5, 32, dtype=torch.float64))
    k = 30
    exact = projector(top_directions(w, k)[1])
    _, vectors = torch.linalg.eigh(w.float().T @ w.float())
    naive = projector(vectors.flip(1)[:, :k].double())
    assert (naive - exact).norm() > 1e-2
    assert (projector(split(w, k).v_NK) - exact).norm() < 1e-9


def test_the_gram_path_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "_split_svd", lambda *_: pytest.fail("a well-conditioned weight took the full SVD"))
    split(matrix(24, 16), 12)


def test_low_precision_weights_are_split_as_the_numbers_they_hold() -> None:
    w = matrix(12, 10, dtype=torch.bfloat16)
    torch.testing.assert_close(singular_values(w), torch.linalg.svdvals(w.double()))


def test_other_counts_come_from_the_same_half() -> None:
    w = matrix(30, 20)
    half = half_split(w)
    for k in (0, 7, 20):
        parts, expected = whole_split(w, half, k), split(w, k)
        assert torch.equal(parts.u_MK, expected.u_MK)
        assert torch.equal(parts.v_NK, expected.v_NK)


@pytest.mark.parametrize("shape", [(2100, 3), (3, 2100), (1024, 5), (1025, 5)])
def test_long_weights_are_split_piece_by_piece(shape: tuple[int, int]) -> None:
    w = matrix(*shape)
    parts = split(w, 3)
    u, v = top_directions(w, 3)
    torch.testing.assert_close(projector(parts.u_MK), projector(u), rtol=0, atol=1e-9)
    torch.testing.assert_close(projector(parts.v_NK), projector(v), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["gram", "svd"])
def test_the_weight_is_left_as_it_is(method: str) -> None:
    w = torch.nn.Parameter(matrix(12, 8, dtype=torch.float64))
    before = w.detach().clone()
    parts = split(w, 4, method=method)
    assert torch.equal(w, before)
    assert not any(part.requires_grad for part in (parts.u_MK, parts.sigma_S, parts.v_NK))


class LargestResult(TorchDispatchMode):
    """Sees every operation and remembers the most float64 numbers that one of them gave."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("shape", [(5000, 8), (8, 5000)])
def test_no_copy_of_the_weight_is_made_in_float64(shape: tuple[int, int]) -> None:
    w = matrix(*shape)
    with LargestResult() as seen:
        parts = whole_split(w, half_split(w), 2)
    assert seen.numbers == 5000 * 2  # the long side of the result
    assert len(parts.sigma_S) == 8


@pytest.mark.parametrize(("free", "cached", "moves"), [(10**6, 0, True), (10, 0, False), (10, 10**6, True)])
def test_the_gpu_is_used_where_it_has_room(
    monkeypatch: pytest.MonkeyPatch, free: int, cached: int, moves: bool
) -> None:
    w, moved = matrix(12, 8), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * cached)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: cached)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: moved.append(self) or self)
    split(w, 4)
    assert bool(moved) == moves


def test_a_union_drops_what_is_already_there() -> None:
    e = torch.eye(5, dtype=torch.float64)
    tilted = (e[:, :1] + e[:, 1:2]) / 2**0.5
    union = orthonormalise(e[:, :2], tilted, e[:, 4:])
    torch.testing.assert_close(projector(union), torch.diag(torch.tensor([1.0, 1, 0, 0, 1], dtype=torch.float64)))
    assert orthonormalise(e[:, :0], e[:, :0]).shape == (5, 0)
