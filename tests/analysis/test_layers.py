"""Energy shares and spectra against figures worked out by hand."""

from __future__ import annotations

import pytest
import torch

from lorica.analysis.layers import describe_layer, squared_share
from lorica.errors import LoricaError
from lorica.subspace.factor import Factor, Factors
from lorica.subspace.linalg import spectrum_points
from lorica.subspace.observe import InputStatistics
from lorica.subspace.plan_entry import PlanEntry
from tests.builders import matrix, top_directions


def test_squared_share() -> None:
    assert squared_share(torch.tensor([3.0, 2.0, 1.0]), 1) == pytest.approx(9 / 14)
    assert squared_share(torch.zeros(3), 2) is None


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 1000])
def test_points_are_real_singular_values_from_first_to_last(size: int) -> None:
    sigma = torch.linspace(9, 1, size, dtype=torch.float64)
    points = spectrum_points(sigma)
    assert points["index"][0] == 0
    assert points["index"][-1] == size - 1
    assert len(points["index"]) == min(size, 64)
    assert points["index"] == sorted(set(points["index"]))
    assert points["sigma"] == pytest.approx([sigma[i].item() for i in points["index"]], rel=1e-5)


@pytest.mark.parametrize("source", ["weight", "activation"])
def test_a_layer_is_described_by_the_directions_of_its_plan(source: str) -> None:
    weight, x = matrix(6, 9, seed=1), matrix(30, 9, seed=2).double()
    moment = x.T @ x
    constraint = "two-sided" if source == "weight" else "input"
    entry = PlanEntry(name="layer", shape=(6, 9), k=3, source=source, constraint=constraint)
    found = describe_layer(
        weight, entry, InputStatistics(moment, cosine=15.0, rows=30), Factors(inputs=Factor.of(moment))
    )
    v = top_directions(weight, 3)[1] if source == "weight" else torch.linalg.eigh(moment).eigenvectors[:, -3:]
    sigma = torch.linalg.svdvals(weight.double())
    p = sigma / sigma.sum()
    assert found["energy"]["protected"] == pytest.approx(((x @ v).norm() ** 2 / x.norm() ** 2).item())
    assert found["energy"]["best"] == pytest.approx((torch.linalg.svdvals(x)[:3].norm() ** 2 / x.norm() ** 2).item())
    assert found["energy"]["random"] == pytest.approx(3 / 9)
    assert found["effective_rank"] == pytest.approx(float((-(p * p.log()).sum()).exp()))
    assert found["squared_share"] == pytest.approx((sigma[:3].norm() ** 2 / sigma.norm() ** 2).item())
    assert found["similarity"] == 0.5


def test_a_broken_weight_is_named() -> None:
    entry = PlanEntry(name="blocks.3.wo", shape=(2, 2), k=1)
    with pytest.raises(LoricaError, match=r"blocks\.3\.wo: the 2 x 2 weight holds NaN"):
        describe_layer(torch.full((2, 2), float("nan")), entry, InputStatistics(torch.eye(2)))
