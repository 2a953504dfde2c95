"""What is remembered of finished tasks, against dense float64 decompositions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorica.errors import LoricaError
from lorica.subspace.learned import LearnedDirections, top_pairs
from tests.builders import SHAPES, matrix, top_directions

SIZES = st.integers(1, 9)


def of_rank(m: int, n: int, rank: int, seed: int) -> Tensor:
    """Return a random matrix of that rank with singular values between 0.1 and 1, float64."""
    u, v = (torch.linalg.qr(matrix(size, rank, seed + i, torch.float64)).Q for i, size in enumerate((m, n)))
    return u * torch.linspace(1.0, 0.1, rank, dtype=torch.float64) @ v.T


def projector(basis: Tensor) -> Tensor:
    """Return the orthogonal projector onto a column space, by the pseudo-inverse."""
    return basis.double() @ torch.linalg.pinv(basis.double(), rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_top_pairs_are_the_scaled_singular_vectors(shape: tuple[int, int]) -> None:
    x = matrix(*shape, dtype=torch.float64)
    rank = max(1, min(shape) // 2)
    f, g = top_pairs(x, rank)
    sigma = torch.linalg.svdvals(x)[:rank]
    u, v = top_directions(x, rank)
    torch.testing.assert_close(f @ f.T, u * sigma.square() @ u.T)
    torch.testing.assert_close(g @ g.T, v * sigma.square() @ v.T)
    torch.testing.assert_close(f.norm(dim=0), sigma)


def test_top_pairs_of_less_rank_than_asked_for_hold_no_noise() -> None:
    f, g = top_pairs(of_rank(8, 6, 2, seed=0), 5)
    assert f.shape == (8, 2)
    assert g.shape == (6, 2)
    assert [side.shape[1] for side in top_pairs(torch.zeros(4, 3), 3)] == [0, 0]
    assert [side.shape[1] for side in top_pairs(torch.ones(4, 3), 0)] == [0, 0]


@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("shape", [(10, 10), (9, 20), (20, 9)], ids=str)
def test_tasks_are_merged_like_the_stacked_matrices(shape: tuple[int, int], share: float) -> None:
    m, n = shape
    learned = LearnedDirections(share)
    rank = int(share * min(shape))
    rows = columns = None
    for seed in range(4):
        delta = of_rank(m, n, rank, seed=10 * seed)  # nothing is lost when the task itself is cut
        learned.add("w", delta)
        columns = delta if columns is None else cut(torch.cat([columns, delta], dim=1), rank)
        rows = delta if rows is None else cut(torch.cat([rows, delta]), rank)
    assert columns is not None
    assert rows is not None
    directions = learned.directions("w", shape)
    assert directions is not None
    u, v = directions
    assert u.shape == (m, rank)
    assert v.shape == (n, rank)
    torch.testing.assert_close(projector(u), projector(columns), atol=1e-5, rtol=0)
    torch.testing.assert_close(projector(v), projector(rows.T), atol=1e-5, rtol=0)


def cut(x: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a rank by the full SVD."""
    u, sigma, vh = torch.linalg.svd(x, full_matrices=False)
    return u[:, :rank] * sigma[:rank] @ vh[:rank]


def test_merging_orthogonal_tasks_is_the_svd_of_their_sum() -> None:
    one, two = torch.zeros(6, 6), torch.zeros(6, 6)
    one.diagonal()[:3] = torch.tensor([5.0, 3.0, 1.0])
    two.diagonal()[3:] = torch.tensor([4.0, 2.0, 6.0])
    learned = LearnedDirections(0.5)
    learned.add("w", one)
    learned.add("w", two)
    directions = learned.directions("w", (6, 6))
    assert directions is not None
    for side in directions:  # 6, 5 and 4 are the largest of the sum
        torch.testing.assert_close(side.abs(), torch.eye(6, dtype=torch.float64)[:, [5, 0, 3]])


@given(SIZES, SIZES, st.floats(0, 1), st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_what_is_kept_is_orthonormal_and_no_more_than_the_share(m: int, n: int, share: float, ranks: list[int]) -> None:
    learned = LearnedDirections(share)
    rank = int(share * min(m, n) + 1e-9)
    deltas = [of_rank(m, n, min(each, m, n), seed=7 * i) for i, each in enumerate(ranks)]
    for delta in deltas:
        learned.add("w", delta)
    directions = learned.directions("w", (m, n))
    if directions is None:
        assert rank == 0 or not any(ranks)
        return
    assert sum(tensor.numel() for tensor in learned.state_dict().values()) <= rank * (m + n)
    for side, stacked in zip(directions, (torch.cat(deltas, 1), torch.cat(deltas).T), strict=True):
        count = side.shape[1]
        torch.testing.assert_close(side.T @ side, torch.eye(count, dtype=torch.float64), atol=1e-5, rtol=0)
        assert count <= rank
        if sum(min(each, m, n) for each in ranks) <= rank:  # all fits: the span is kept exactly
            outside = stacked - side @ (side.T @ stacked)
            assert outside.norm() <= 1e-5 * stacked.norm()


def test_a_lower_share_takes_the_top_of_what_is_there() -> None:
    wide, narrow = LearnedDirections(0.5), LearnedDirections(0.25)
    wide.add("w", torch.diag(torch.arange(8.0)))
    narrow.load_state_dict(wide.state_dict())
    directions = narrow.directions("w", (8, 8))
    assert directions is not None
    torch.testing.assert_close(directions[0].abs(), torch.eye(8, dtype=torch.float64)[:, [7, 6]])


def test_what_belongs_to_another_model_is_refused() -> None:
    learned = LearnedDirections(0.5)
    learned.add("w", matrix(6, 4))
    with pytest.raises(LoricaError, match=r"w is 4 x 6, .* of 6 x 4: it belongs to another model"):
        learned.directions("w", (4, 6))
    with pytest.raises(LoricaError, match=r"w is 4 x 6"):
        learned.add("w", matrix(4, 6))


def test_a_diverged_task_is_not_remembered() -> None:
    learned = LearnedDirections(0.5)
    with pytest.raises(LoricaError, match="w: the trained weight holds NaN or inf"):
        learned.add("w", torch.tensor([[1.0, float("nan")]]))
    assert learned.directions("w", (1, 2)) is None
