"""Weights that no training would make: they are split as exactly as any other, or refused by their name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import AdamW

import lorica
from lorica.constrain.linear import SubspaceLayer
from lorica.constrain.protect import protected_layers
from lorica.errors import LoricaError
from lorica.subspace.linalg import split
from lorica.subspace.orthonormal import is_orthonormal
from lorica.subspace.plan_entry import PlanEntry
from lorica.subspace.store import SplitStore
from tests.builders import matrix, plan_for, tiny, trainable

Make = Callable[[int, int], Tensor]


def of_rank(rank: int, scale: float = 1.0) -> Make:
    return lambda m, n: scale * matrix(m, rank, 1, torch.float64) @ matrix(rank, n, 2, torch.float64)


def scaled(scale: float) -> Make:
    return lambda m, n: scale * matrix(m, n, dtype=torch.float64)


def without(side: int, index: int) -> Make:
    def make(m: int, n: int) -> Tensor:
        return matrix(m, n, dtype=torch.float64).index_fill_(side, torch.tensor([index]), 0.0)

    return make


WEIGHTS: dict[str, Make] = {
    "zero": torch.zeros,
    "constant": lambda m, n: torch.full((m, n), 0.7),
    "rank 1": of_rank(1),
    "rank 3": of_rank(3),
    "zero row": without(0, 0),
    "zero column": without(1, 0),
    "huge": scaled(1e30),
    "tiny": scaled(1e-30),
    "denormal": scaled(1e-39),
    "huge and of rank 1": of_rank(1, 1e30),
    "equal singular values": lambda m, n: 0.5 * torch.eye(m, n),
    "one entry": lambda m, n: torch.eye(m, n) * (torch.arange(n) == 0),
}
SHAPES = [(12, 8), (8, 12), (10, 10), (40, 6), (6, 40)]
"""The long ones have bases that are read off the weight, where that is possible."""

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
MEMORY = pytest.mark.parametrize("memory", ["fast", "lean"])


class Side(nn.Module):
    """Layers of one input each, whose loss is linear in what they give: its gradient does not depend on their size."""

    def __init__(self, weights: list[Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=dtype) for w in weights)
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight.data.copy_(weight)

    def forward(self, seed: int = 0) -> Tensor:
        losses = []
        for index, layer in enumerate(self.layers):
            m, n = layer.weight.shape
            x, target = (matrix(6, size, 100 * seed + index).to(layer.weight.dtype) for size in (n, m))
            losses.append((layer(x).float() * target.float()).sum())
        return torch.stack(losses).sum()


def trained(model: nn.Module, steps: int = 4) -> None:
    optimizer = AdamW(trainable(model), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        model(step).backward()
        optimizer.step()
        optimizer.zero_grad()


def free_bases(layer: SubspaceLayer) -> tuple[Tensor, Tensor]:
    """Return Q_U and Q_V as the fold takes them, in float64."""
    out, inp = (basis.mapped(lambda kept: kept.double()) for basis in layer.exact_bases)
    base = layer.base.double()
    identity = [torch.eye(size, dtype=torch.float64) for size in base.shape]
    return out.on(base).reduce(identity[0]), inp.on(base.T).reduce(identity[1])


def determined(sigma_S: Tensor, k: int) -> int:
    """Return how many of the top k directions are told from all others by their singular values."""
    ends = torch.cat([sigma_S.double(), torch.zeros(1, dtype=torch.float64)])
    gaps = ends[:-1] - ends[1:] > 1e-3 * ends[0]
    return max((rank for rank in range(1, k + 1) if gaps[rank - 1]), default=0)


def assert_protects(before: Tensor, layer: SubspaceLayer, k: int) -> None:
    """Assert that the top k directions of both sides are protected, whichever of equals they are."""
    w, (q_u, q_v) = before.double(), free_bases(layer)
    u, sigma_S, vh = torch.linalg.svd(w, full_matrices=False)
    next_one = float(sigma_S[k]) if k < len(sigma_S) else 0.0
    for q, seen in ((q_u, q_u.T @ w), (q_v, w @ q_v)):
        assert q.shape[1] == q.shape[0] - k
        torch.testing.assert_close(q.T @ q, torch.eye(q.shape[1], dtype=torch.float64), rtol=0, atol=2e-6)
        # No other k directions leave less of the weight: Eckart and Young.
        assert torch.linalg.matrix_norm(seen, 2) <= next_one + 2e-6 * float(sigma_S[0])
    d = layer.delta().double()
    assert d.norm() > 0
    rank = determined(sigma_S, k)
    for inside in ((u[:, :rank].T @ d), (d @ vh[:rank].T), d - q_u @ (q_u.T @ d), d - (d @ q_v) @ q_v.T):
        assert inside.norm() <= 1e-5 * d.norm()
    wide = before.float() + layer.delta()
    assert torch.equal(layer.weight, wide.to(before.dtype))


@pytest.mark.reliability("R17")
@MEMORY
@DTYPES
@pytest.mark.parametrize("name", WEIGHTS)
def test_degenerate_weights_are_protected_as_others_are(name: str, dtype: torch.dtype, memory: str) -> None:
    model = Side([WEIGHTS[name](m, n) for m, n in SHAPES], dtype)
    before = [layer.weight.detach().clone() for layer in model.layers]
    lorica.protect(model, plan_for(model, lambda m, n: min(m, n) // 2), memory=memory)
    trained(model)
    for old, layer in zip(before, model.layers, strict=True):
        assert_protects(old, layer, min(old.shape) // 2)


@pytest.mark.reliability("R17")
@given(
    m=st.integers(2, 16), n=st.integers(2, 16), rank=st.integers(0, 16), exponent=st.integers(-38, 30),
    k=st.integers(1, 15), narrow=st.booleans(), lean=st.booleans(),
)  # fmt: skip
def test_whatever_the_rank_and_the_scale(
    m: int, n: int, rank: int, exponent: int, k: int, narrow: bool, lean: bool
) -> None:
    k = min(k, min(m, n) - 1)
    model = Side([of_rank(rank, 10.0**exponent)(m, n)], torch.bfloat16 if narrow else torch.float32)
    (layer,) = model.layers
    before = layer.weight.detach().clone()
    lorica.protect(model, plan_for(model, k), memory="lean" if lean else "fast")
    trained(model, 2)
    assert_protects(before, model.layers[0], k)


@pytest.mark.reliability("R17")
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_projected_engine_holds_them_too(name: str) -> None:
    model = Side([WEIGHTS[name](m, n) for m, n in SHAPES], torch.float32)
    before = [layer.weight.detach().double() for layer in model.layers]
    constraints = lorica.block_constraints(model, plan_for(model, lambda m, n: min(m, n) // 2, "block"))
    optimizer = lorica.ConstrainedOptimizer(AdamW(trainable(model), lr=1e-2), constraints)
    for step in range(4):
        model(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    for old, layer, block in zip(before, model.layers, constraints.values(), strict=True):
        d = layer.weight.detach().double() - old
        inside = block.u.double().T @ d @ block.v.double()
        assert is_orthonormal(block.u.double(), 1e-6)
        assert inside.norm() <= 1e-5 * d.norm() + 1e-6 * old.abs().max()


class Chain(nn.Module):
    """Layers one after the other: what a weight does to its inputs, the next one's calibration sees."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        m, n = weight.shape
        self.layers = nn.ModuleList(nn.Linear(*size, bias=False, dtype=dtype) for size in ((5, n), (n, m), (m, 7)))
        for seed, layer in enumerate(self.layers):
            layer.weight.data.copy_(matrix(*layer.weight.shape, seed=seed))
        self.layers[1].weight.data.copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def calibration(model: Chain) -> list[dict[str, Tensor]]:
    return [{"x": matrix(20, 5, seed).to(model.layers[0].weight.dtype)} for seed in (7, 8)]


@pytest.mark.reliability("R17")
@MEMORY
@DTYPES
@pytest.mark.parametrize("source", ["activation", "hybrid"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_so_are_directions_of_the_inputs(name: str, source: Any, dtype: torch.dtype, memory: str) -> None:
    model = Chain(WEIGHTS[name](8, 10), dtype)
    plan = lorica.plan(model, 0.5, source=source, calibration=calibration(model))
    inputs = {entry.name: plan.factors(entry.name).inputs for entry in plan.entries}
    before = {entry.name: model.get_submodule(entry.name).weight.detach().clone() for entry in plan.entries}
    lorica.protect(model, plan, memory=memory)
    size = max(1.0, float(before["layers.1"].abs().max()))
    optimizer = AdamW(trainable(model), lr=1e-2, eps=1e-30)
    for seed in range(4):
        (model(matrix(9, 5, 20 + seed).to(dtype)).float() / size).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for entry in plan.entries:
        layer, factor = protected_layers(model)[entry.name], inputs[entry.name]
        _, q_v = free_bases(layer)
        d = layer.delta().double()
        torch.testing.assert_close(q_v.T @ q_v, torch.eye(q_v.shape[1], dtype=torch.float64), rtol=0, atol=2e-6)
        assert (d - (d @ q_v) @ q_v.T).norm() <= 1e-5 * d.norm()
        if source == "activation":
            rank = determined(factor.energies_R, entry.k)
            assert (d @ factor.vectors_DR[:, :rank].double()).norm() <= 1e-5 * d.norm()


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.reliability("R17")
@MEMORY
@DTYPES
@pytest.mark.parametrize("source", ["weight", "activation", "hybrid"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_entry_that_is_no_number_is_refused_by_the_weight_s_name(
    value: float, source: Any, dtype: torch.dtype, memory: str
) -> None:
    model = Chain(matrix(8, 10), dtype)
    model.layers[1].weight.data[3, 2] = value
    given = {} if source == "weight" else {"source": source, "calibration": calibration(model)}
    with pytest.raises(LoricaError, match=r"^layers\.1(\.weight)?[ :].*holds NaN or inf"):
        lorica.protect(model, lorica.plan(model, 0.5, **given), memory=memory)
    assert not protected_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.reliability("R17")
@pytest.mark.parametrize("given", [{"source": "activation"}, {"ranks": "importance"}], ids=str)
@pytest.mark.parametrize("calibration", ["self", "random"])
def test_a_model_that_computes_no_numbers_is_not_calibrated(calibration: str, given: dict[str, Any]) -> None:
    model = tiny("llama")
    model.model.norm.weight.data[0] = float("inf")
    with pytest.raises(LoricaError, match=r"^model\.norm\.weight holds NaN or inf"):
        lorica.plan(model, calibration=calibration, **given)


@pytest.mark.reliability("R17")
def test_inputs_that_overflow_name_the_layer_that_gets_them() -> None:
    model = Chain(scaled(1e38)(8, 10), torch.float32)
    model.layers[2].weight.data.mul_(1e5)
    with pytest.raises(LoricaError, match=r"^layers\.2: the calibration inputs reach it as NaN or inf"):
        lorica.plan(model, 0.5, source="activation", calibration=[{"x": 1e5 * matrix(20, 5)}])


@pytest.mark.reliability("R17")
@pytest.mark.parametrize("ranks", ["energy", "effective-rank"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_ranks_that_are_read_off_the_spectrum_are_counts(name: str, ranks: str) -> None:
    model = Side([WEIGHTS[name](m, n) for m, n in SHAPES], torch.float32)
    plan = lorica.plan(model, ranks=ranks)
    for entry in plan.entries:
        assert 0 <= entry.k <= min(entry.shape)
        if name in ("rank 1", "constant", "one entry", "huge and of rank 1"):
            assert entry.k == 1
        if name == "zero":
            assert entry.k == 0
    lorica.protect(model, plan)
    trained(model, 2)


@pytest.mark.reliability("R17")
@pytest.mark.parametrize("name", ["zero", "constant", "rank 3", "equal singular values", "tiny", "denormal", "huge"])
def test_the_cache_of_splits_gives_back_what_it_was_given(name: str, tmp_path: Path) -> None:
    weight = WEIGHTS[name](260, 256).float()
    first, again = (SplitStore(tmp_path).split(weight, 100, "w") for _ in range(2))
    expected = split(weight, 100)
    for one in (first, again):
        assert torch.equal(one.sigma_S, expected.sigma_S)
        assert torch.equal(one.u_MK, expected.u_MK)
        assert torch.equal(one.v_NK, expected.v_NK)
    other = SplitStore(tmp_path).split(weight + matrix(260, 256, 5) * weight.abs().max(), 100, "w")  # re-split
    assert is_orthonormal(other.u_MK)
    assert is_orthonormal(other.v_NK)


@pytest.mark.reliability("R17")
def test_a_plan_for_a_zero_weight_can_be_audited() -> None:
    before, after = (Side([torch.zeros(8, 10)], torch.float32) for _ in range(2))
    plan = lorica.Plan(entries=[PlanEntry(name="layers.0", shape=(8, 10), k=4)])
    lorica.protect(after, plan)
    lorica.release(after)
    report = lorica.audit(before, after, plan)
    assert report.holds
