"""The gradient of a sharded core: whichever bases are lent for it, it is the mean of all processes' gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import lorica
from lorica.constrain.exchange import Exchange, cheapest_exchange, exchanges
from lorica.constrain.linear import SubspaceLinear
from lorica.subspace.basis import Basis, Everything, Explicit, Reflector
from lorica.subspace.plan import Plan
from lorica.subspace.plan_entry import Constraint, PlanEntry
from tests.distributed.ranks import on_ranks
from tests.distributed.trainings import whole


def blank(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


OUT, INP = Explicit(blank(8, 3)), Reflector(blank(20, 5))  # 3 of 8 outputs and 15 of 20 inputs are free


def test_ways_by_hand() -> None:
    both, q_v, q_u = exchanges(OUT, INP)
    assert both == Exchange(True, True, lent=24 + 100, reduced=3 * 15, returned=0)
    assert q_v == Exchange(False, True, lent=100, reduced=8 * 15, returned=3 * 15)
    assert q_u == Exchange(True, False, lent=24, reduced=3 * 20, returned=3 * 15)
    assert q_u.received(9) == 24 + 60 + 5


def test_a_side_that_is_free_is_not_left_to_the_owner() -> None:
    for out, inp in ((Everything(8), INP), (OUT, Everything(20)), (Everything(8), Everything(20))):
        way = cheapest_exchange(exchanges(out, inp), 2)
        assert (way.lends_out, way.lends_inp, way.returned) == (True, True, 0)


def side(dim: int, k: int) -> Basis:
    return Reflector(blank(dim, k)) if k else Everything(dim)


@given(m=st.integers(1, 50), n=st.integers(1, 50), ranks=st.integers(2, 64), data=st.data())
def test_no_more_than_with_both_bases_nor_than_the_dense_gradient(
    m: int, n: int, ranks: int, data: st.DataObject
) -> None:
    out, inp = (side(dim, data.draw(st.integers(0, dim // 2))) for dim in (m, n))
    ways = exchanges(out, inp)
    way = cheapest_exchange(ways, ranks)
    assert way.received(ranks) <= ways[0].received(ranks)
    if m == n:
        assert way.lent + way.reduced <= m * n


@dataclass(frozen=True)
class Case:
    """A weight, and which of its bases are to be lent."""

    m: int
    n: int
    k: int
    constraint: Constraint = "two-sided"
    dtype: torch.dtype = torch.float64
    lends: tuple[bool, bool] = (True, True)

    def layer(self, mesh: DeviceMesh | None) -> tuple[nn.Sequential, SubspaceLinear]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(self.n, self.m, bias=False, dtype=self.dtype))
        if mesh is not None:
            fully_shard(model, mesh=mesh)
        entry = PlanEntry(name="0", shape=(self.m, self.n), k=self.k, constraint=self.constraint)
        lorica.protect(model, Plan(entries=[entry]))
        (layer,) = model
        assert isinstance(layer, SubspaceLinear)
        return model, layer

    def gradient(self, ranks: list[int], mesh: DeviceMesh | None = None) -> Tensor:
        """Return the gradient of the core, from the tokens of some processes."""
        model, layer = self.layer(mesh)
        loss = sum(model(tokens(rank, self)).square().sum() / len(ranks) for rank in ranks)
        assert isinstance(loss, Tensor)
        loss.backward()
        assert layer.core.grad is not None
        assert layer.core.grad.dtype == layer.core.dtype
        return whole(layer.core.grad)


def tokens(rank: int, case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(6, case.n, generator=generator, dtype=torch.float64).to(case.dtype)


CASES = [
    Case(10, 10, 7, lends=(False, True)),
    Case(23, 9, 6, lends=(False, True)),
    Case(9, 23, 6, lends=(True, False)),
    Case(9, 23, 3),
    Case(10, 10, 1),
    Case(12, 7, 5, "input"),
    Case(7, 12, 5, "input", lends=(True, False)),  # all of Q_U is nothing: the dense gradient is less than Q_V
    Case(7, 12, 5, "output"),
    Case(23, 9, 6, dtype=torch.bfloat16, lends=(False, True)),
    Case(9, 23, 6, dtype=torch.bfloat16, lends=(True, False)),
]


@pytest.mark.parametrize("shape", [(2,), (3,), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_the_mean_of_all_processes(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)

    def work(rank: int) -> list[list[list[float]]]:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        return [case.gradient([rank], mesh).tolist() for case in CASES]

    told = on_ranks(size, work)
    for index, case in enumerate(CASES):
        expected = case.gradient(list(range(size)))
        tolerance = 1e-12 if case.dtype == torch.float64 else 0.02
        for mine in told:
            error = (torch.tensor(mine[index], dtype=expected.dtype) - expected).norm()
            assert error <= tolerance * expected.norm(), case


def test_the_cases_lend_what_they_say() -> None:
    for case in CASES:
        _, layer = case.layer(None)
        way = cheapest_exchange(exchanges(*layer.exact_bases), 2)
        assert (way.lends_out, way.lends_inp) == case.lends, case
