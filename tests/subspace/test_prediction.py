"""What a plan leaves open and what a change costs, against dense matrices in float64 and figures worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lorica.subspace.factor import Factor, Factors
from lorica.subspace.measure import Wanted, measure
from lorica.subspace.plan_entry import Constraint, PlanEntry
from lorica.subspace.prediction import (
    EnergyShares,
    Outlook,
    both_factors,
    energy_in,
    energy_shares,
    expected_divergence,
    kind_of,
)
from lorica.subspace.sources import Protected
from tests.builders import CONSTRAINTS, matrix

M, N = 5, 7
SEEDS = st.integers(0, 10_000)


def moment(dim: int, seed: int) -> Tensor:
    x = matrix(2 * dim, dim, seed, torch.float64) * 10.0 ** -torch.linspace(0, 2, dim, dtype=torch.float64)
    return x.T @ x


def basis(dim: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(matrix(dim, dim, seed, torch.float64))[0][:, :k]


def test_energy_of_coordinate_directions() -> None:
    factor = Factor.of(torch.diag(torch.tensor([1.0, 4.0, 2.0, 3.0])))
    assert energy_shares(factor, torch.eye(4)[:, [1, 2]]) == pytest.approx((6 / 10, 2 / 4, 7 / 10))


def test_energy_of_a_turned_direction() -> None:
    factor = Factor.of(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))  # eigenvalues 3 and 1, along (1, 1) and (1, -1)
    along, across = (torch.tensor([[1.0], [sign]]).double() / 2**0.5 for sign in (1.0, -1.0))
    assert energy_shares(factor, along) == pytest.approx((3 / 4, 1 / 2, 3 / 4))
    assert energy_shares(factor, across) == pytest.approx((1 / 4, 1 / 2, 3 / 4))


def test_energy_at_the_ends() -> None:
    factor = Factor.of(moment(5, 0))
    assert energy_shares(factor, torch.zeros(5, 0)) == (0.0, 0.0, 0.0)
    assert energy_shares(factor, torch.eye(5)) == pytest.approx((1, 1, 1))
    assert energy_shares(Factor.of(torch.zeros(5, 5)), torch.eye(5)) is None


@given(SEEDS, st.integers(1, 7), st.integers(0, 8))
def test_no_subspace_holds_more_than_the_best_and_a_basis_shares_out_everything(seed: int, k: int, rank: int) -> None:
    factor, q = Factor.of(moment(8, seed), rank), basis(8, 8, seed + 1)
    part, rest = energy_shares(factor, q[:, :k]), energy_shares(factor, q[:, k:])
    assert part is not None
    assert rest is not None
    assert 0 <= part.protected <= part.best + 1e-12
    assert part.protected + rest.protected == pytest.approx(1)
    assert part.random == k / 8


@given(SEEDS, st.integers(0, N), st.integers(0, N))
def test_energy_is_that_of_the_dense_matrix(seed: int, k: int, rank: int) -> None:
    factor, q = Factor.of(moment(N, seed), rank), basis(N, k, seed + 1)
    assert energy_in(factor, q) == pytest.approx(float((q.T @ factor.matrix() @ q).trace()), rel=1e-9, abs=1e-12)


@given(SEEDS, st.integers(0, M), st.integers(0, N))
def test_the_divergence_is_the_literal_formula(seed: int, rank_b: int, rank_a: int) -> None:
    b, a = Factor.of(moment(M, seed), rank_b), Factor.of(moment(N, seed + 1), rank_a)
    d = matrix(M, N, seed + 2, torch.float64)
    literal = float((b.matrix() @ d @ a.matrix() @ d.T).trace()) / 2
    assert expected_divergence(Factors(inputs=a, outputs=b), d) == pytest.approx(literal, rel=1e-9)
    assert expected_divergence(Factors(inputs=a, outputs=b), 3 * d.float()) == pytest.approx(9 * literal, rel=1e-5)


def free_directions(u: Tensor, v: Tensor, constraint: Constraint) -> Tensor:
    """Return an orthonormal basis of all changes that a constraint allows, the columns, each laid out in rows."""
    m, n = len(u), len(v)
    left, right = torch.eye(m).double() - u @ u.T, torch.eye(n).double() - v @ v.T
    allowed = torch.kron(left, right)
    if constraint == "block":
        allowed = torch.eye(m * n).double() - torch.kron(u @ u.T, v @ v.T)
    values, vectors = torch.linalg.eigh(allowed)
    return vectors[:, values > 0.5]


@pytest.mark.parametrize("constraint", [*CONSTRAINTS, "block"])
def test_what_is_open_is_the_curvature_along_all_free_directions(constraint: Constraint) -> None:
    a, b = Factor.of(moment(N, 1), 4), Factor.of(moment(M, 2))
    u, v = basis(M, 0 if constraint == "input" else 2, 3), basis(N, 0 if constraint == "output" else 3, 4)
    found = Outlook.of(Factors(inputs=a, outputs=b), Protected(u, v), constraint)
    q, fisher = free_directions(u, v, constraint), torch.kron(b.matrix(), a.matrix())
    assert (found.free, found.size) == (q.shape[1], M * N)
    assert found.left == pytest.approx(float((q.T @ fisher @ q).trace()))
    assert found.expected == pytest.approx(float((q.T @ fisher @ q).trace() / q.shape[1] / fisher.trace() * M * N))
    assert found.expected > 0
    assert found.inputs == energy_shares(a, v)
    assert found.outputs == energy_shares(b, u)


@given(SEEDS)
def test_the_expected_forgetting_is_that_of_random_changes_of_one_size(seed: int) -> None:
    a, b = Factor.of(moment(N, seed)), Factor.of(moment(M, seed + 1))
    factors, u, v = Factors(inputs=a, outputs=b), basis(M, 2, seed + 2), basis(N, 3, seed + 3)
    draws = torch.randn(4000, M * N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    fisher = torch.kron(b.matrix(), a.matrix())

    def mean(changes: Tensor) -> float:
        size = changes.square().sum(1, keepdim=True)
        return float(((changes @ fisher) * changes / size).sum(1).mean())

    q = free_directions(u, v, "two-sided")
    found = Outlook.of(factors, Protected(u, v), "two-sided").expected
    assert found == pytest.approx(mean(draws @ q @ q.T) / mean(draws), rel=0.15)


def test_best_directions_leave_less_open_than_random_ones_and_nothing_free_leaves_nothing() -> None:
    factors = Factors(inputs=Factor.of(moment(N, 1)), outputs=Factor.of(moment(M, 2)))
    assert factors.inputs is not None
    assert factors.outputs is not None
    best = Protected(factors.outputs.directions(2), factors.inputs.directions(3))
    found = Outlook.of(factors, best, "two-sided")
    assert found.inputs is not None
    assert found.inputs.protected == pytest.approx(found.inputs.best)
    assert found.expected < Outlook.of(factors, Protected(basis(M, 2, 8), basis(N, 3, 9)), "two-sided").expected
    everything = Outlook.of(factors, Protected(basis(M, M, 0), basis(N, N, 0)), "two-sided")
    assert (everything.free, everything.expected) == (0, 0.0)
    nothing = Outlook.of(factors, Protected(basis(M, 0, 0), basis(N, 0, 0)), "two-sided")
    assert nothing.expected == pytest.approx(1)


def test_several_weights_add_their_energies_up_and_tell_mean_shares() -> None:
    shares = EnergyShares(0.5, 0.25, 0.75)
    one = Outlook(shares, None, left=1.0, free=4, whole=10.0, size=8)
    other = Outlook(EnergyShares(1.0, 0.75, 1.0), None, left=3.0, free=4, whole=70.0, size=8)
    both = Outlook.together([one, other])
    assert both == Outlook(EnergyShares(0.75, 0.5, 0.875), None, 4.0, 8, 80.0, 16)
    assert both.expected == (4 / 8) / (80 / 16)
    assert both.to_json() == {
        "inputs": {"protected": 0.75, "random": 0.5, "best": 0.875}, "outputs": None, "expected": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.mlp.up_proj", "mlp.up_proj"),
        ("h.3.attn.c_proj", "attn.c_proj"),
        ("encoder.block.0.layer.0.SelfAttention.q", "SelfAttention.q"),
        ("blocks.3", "blocks"),
        ("head", "head"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


class Chooser(nn.Module):
    """One linear layer whose outputs are the logits."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, classes, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layer(x)
        return logits


def test_where_k_fac_is_exact_the_prediction_is_the_divergence() -> None:
    """With equal logits the gradients' second moment does not depend on the inputs; what is left is sampling."""
    model = Chooser(6, 4)
    nn.init.zeros_(model.layer.weight)
    x = matrix(20_000, 4, 1, torch.float64) * torch.tensor([3.0, 1.0, 0.3, 0.1]).double()
    entry = PlanEntry(name="layer", shape=(6, 4), k=0)
    factors = both_factors(model, [entry], [{"x": x}], nbytes=1e6)["layer"]
    d = 1e-3 * matrix(6, 4, 2, torch.float64)
    p, q = model(x).log_softmax(-1), (x @ d.T).log_softmax(-1)
    divergence = float((p.exp() * (p - q)).sum(-1).mean().detach())
    assert expected_divergence(factors, d) == pytest.approx(divergence, rel=0.03)


def test_both_sides_are_measured_whatever_the_source_and_fit_the_memory() -> None:
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5))
    entries = [PlanEntry(name="0", shape=(9, 12), k=0), PlanEntry(name="2", shape=(5, 9), k=0)]
    batches = [{"input": matrix(64, 12, seed)} for seed in range(3)]
    whole = both_factors(model, entries, batches, nbytes=1e6)
    wanted = {entry.name: Wanted(entry.shape, inputs=12, outputs=12) for entry in entries}
    exact = measure(model, {"0": model[0], "2": model[2]}, batches, wanted)
    small = both_factors(model, entries, batches, nbytes=400)
    for name in exact:
        for side in ("inputs", "outputs"):
            one, other, cut = (getattr(which[name], side) for which in (exact, whole, small))
            torch.testing.assert_close(other.matrix(), one.matrix(), rtol=2e-3, atol=2e-3 * one.trace)
            assert cut.trace == pytest.approx(one.trace, rel=1e-6)
    held = [factor for one in small.values() for factor in (one.inputs, one.outputs) if factor is not None]
    assert sum(one.vectors_DR.nbytes + one.energies_R.nbytes for one in held) <= 400
