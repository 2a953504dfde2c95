from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorica.errors import LoricaError
from lorica.subspace.ranks import effective_rank, energy_rank, importance_shares, share_to_count


@pytest.mark.parametrize(
    ("share", "size", "count"),
    [
        (0.0, 8, 0),
        (1.0, 8, 8),
        (0.75, 8, 6),
        (1 - 0.9, 10, 1),
        (1 - 0.7, 10, 3),
        (0.99, 10, 9),
        (-0.5, 8, 0),
        (1.4, 8, 8),
    ],
)
def test_a_share_is_floored_and_clamped(share: float, size: int, count: int) -> None:
    assert share_to_count(share, size) == count


@given(st.integers(1, 20000), st.integers(0, 100))
def test_whole_percentages_are_immune_to_float_error(size: int, percent: int) -> None:
    assert share_to_count(1 - percent / 100, size) == (100 - percent) * size // 100


def test_energy_counts_squares() -> None:
    sigma = torch.tensor([4.0, 2.0, 2.0, 1.0])  # squares 16, 4, 4, 1 of 25
    expected = {0.0: 0, 0.5: 1, 0.64: 1, 0.65: 2, 0.8: 2, 0.81: 3, 0.96: 3, 0.97: 4, 1.0: 4}
    assert {share: energy_rank(sigma.double(), share) for share in expected} == expected


def test_all_the_energy_means_every_direction() -> None:
    assert energy_rank(torch.tensor([3.0, 0.0, 0.0]), 1.0) == 3
    assert energy_rank(torch.zeros(4), 1.0) == 4
    assert energy_rank(torch.zeros(4), 0.9) == 0


def test_effective_rank_by_hand() -> None:
    assert effective_rank(torch.full((8,), 0.3, dtype=torch.float64)) == pytest.approx(8)
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    # p = 1/2, 1/4, 1/4: entropy 1.5 log 2
    assert effective_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(2**1.5)


def test_the_importance_rule_by_hand() -> None:
    shares = importance_shares({"a": 0.2, "b": 0.4, "c": 0.6, "d": 0.0}, mrr=0.1, trr=0.8)
    # mean 0.3, I = 2/3, 4/3, 2, 0
    assert shares == pytest.approx({"a": 0.1 + 0.7 * 2 / 3, "b": 0.1 + 0.7 * 4 / 3, "c": 1.5, "d": 0.1})
    assert [share_to_count(share, 10) for share in shares.values()] == [5, 10, 10, 1]


def test_a_negative_importance_is_clamped_to_nothing_protected() -> None:
    shares = importance_shares({"a": -0.4, "b": 1.0}, mrr=0.1, trr=0.8)
    assert share_to_count(shares["a"], 10) == 0
    assert share_to_count(shares["b"], 10) == 10


@pytest.mark.parametrize("values", [{"a": 0.5, "b": -0.5}, {"a": -0.1}, {"a": float("nan")}])
def test_an_undefined_importance_says_what_to_do(values: dict[str, float]) -> None:
    with pytest.raises(LoricaError, match="use ranks 'uniform' or 'energy'"):
        importance_shares(values, 0.1, 0.8)


def test_importance_is_refused_where_the_layers_cancel_out() -> None:
    """As measured on a small model: a mean of 0.0016 over layers between -0.03 and 0.02 made shares of -15 and 10."""
    with pytest.raises(LoricaError, match=r"mean cosine 0\.00\d+ over the 4 weights, single ones up to 0\.03"):
        importance_shares({"a": -0.03, "b": 0.02, "c": 0.01, "d": 0.006}, 0.1, 0.8)
