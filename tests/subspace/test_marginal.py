"""Ranks by marginal gain, against what the protected directions themselves leave of the dense factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lorica
from lorica.errors import LoricaError
from lorica.subspace.factor import Factor, Factors
from lorica.subspace.marginal import Greedy, within_forgetting, within_freedom
from lorica.subspace.plan_entry import PlanEntry
from tests.builders import batch, matrix, tiny

SHAPES = {"a": (5, 7), "b": (6, 4), "c": (3, 3)}


def moment(size: int, seed: int, decay: float = 0.5) -> Tensor:
    x = matrix(3 * size, size, seed, torch.float64) * decay ** torch.arange(size)
    return x.T @ x


def layers(
    constraint: Any = "two-sided",
) -> tuple[list[PlanEntry], dict[str, Factors], dict[str, tuple[Tensor, Tensor]]]:
    entries, factors, dense = [], {}, {}
    for seed, (name, (m, n)) in enumerate(SHAPES.items()):
        b, a = moment(m, seed), moment(n, 10 + seed)
        entries.append(PlanEntry(name=name, shape=(m, n), k=0, source="curvature", constraint=constraint))
        factors[name], dense[name] = Factors(Factor.of(a), Factor.of(b)), (b, a)
    return entries, factors, dense


def forgetting(counts: dict[str, tuple[int, int]], dense: dict[str, tuple[Tensor, Tensor]]) -> float:
    """Return the mean of tr(B D A D^T) over random free D of norm 1, from the projected dense matrices."""
    total, free = 0.0, 0
    for name, (b, a) in dense.items():
        traces = []
        for matrix_DD, count in zip((b, a), counts[name], strict=True):
            q = torch.linalg.eigh(matrix_DD).eigenvectors.flip(1)[:, count:]
            traces.append((float((q.T @ matrix_DD @ q).trace()), q.shape[1]))
        total += traces[0][0] * traces[1][0]
        free += traces[0][1] * traces[1][1]
    return total / max(free, 1)


MARGINAL: dict[str, Any] = {"source": "curvature", "ranks": "marginal"}
NOTHING = dict.fromkeys(SHAPES, (0, 0))


@given(st.integers(0, 68))
def test_no_more_freedom_is_left_than_asked_for_and_no_step_too_much_is_taken(free: int) -> None:
    entries, factors, dense = layers()
    greedy = Greedy(entries, factors)
    counts = within_freedom(greedy, free)
    left = sum((m - counts[name][0]) * (n - counts[name][1]) for name, (m, n) in SHAPES.items())
    assert left == greedy.free <= free
    assert greedy.free > free - max(max(shape) for shape in SHAPES.values())
    if left:
        assert greedy.forgetting_share == pytest.approx(forgetting(counts, dense) / forgetting(NOTHING, dense))


@given(st.floats(1e-4, 1))
def test_the_forgetting_asked_for_is_reached_and_one_step_before_it_was_not(share: float) -> None:
    entries, factors, dense = layers()
    counts = within_forgetting(Greedy(entries, factors), share)
    assert forgetting(counts, dense) <= share * forgetting(NOTHING, dense) * (1 + 1e-9)
    last = Greedy(entries, factors)
    seen = [last.counts()]
    for _ in last.steps():
        seen.append(last.counts())
        if last.counts() == counts:
            break
    if len(seen) > 1:
        assert forgetting(seen[-2], dense) > share * forgetting(NOTHING, dense) * (1 - 1e-9)


def test_each_step_is_the_cheapest_there_is() -> None:
    """What a step spares per degree of freedom, told from the counts before and after it alone."""
    entries, factors, dense = layers()
    greedy = Greedy(entries, factors)
    before = greedy.counts()
    for _ in zip(range(12), greedy.steps(), strict=False):
        after = greedy.counts()
        options = {}
        for name, (m, n) in SHAPES.items():
            a, b = before[name]
            for more in ((a + 1, b), (a, b + 1)):
                if more[0] <= m and more[1] <= n:
                    spared = forgetting({name: (a, b)}, {name: dense[name]}) * (m - a) * (n - b)
                    spared -= forgetting({name: more}, {name: dense[name]}) * (m - more[0]) * (n - more[1])
                    options[name, more] = spared / ((m - a) * (n - b) - (m - more[0]) * (n - more[1]))
        taken = next((name, after[name]) for name in SHAPES if after[name] != before[name])
        assert options[taken] == pytest.approx(max(options.values()))
        before = after


def test_layers_with_the_same_inputs_keep_one_basis() -> None:
    entries, factors, _ = layers()
    shared = Factors(factors["a"].inputs, Factor.of(moment(5, 99)))
    entries[1] = entries[1].model_copy(update={"shape": (5, 7)})
    greedy = Greedy(entries, factors | {"b": shared})
    counts = within_freedom(greedy, 30)
    assert counts["a"][1] == counts["b"][1] > 0
    assert greedy.free == sum((m - counts[n][0]) * (k - counts[n][1]) for n, (m, k) in
                              {"a": (5, 7), "b": (5, 7), "c": (3, 3)}.items())  # fmt: skip


@pytest.mark.parametrize("constraint", ["input", "output"])
def test_a_side_that_the_constraint_leaves_alone_is_not_protected(constraint: Any) -> None:
    entries, factors, _ = layers(constraint)
    counts = within_freedom(Greedy(entries, factors), 20)
    idle = 0 if constraint == "input" else 1
    assert {both[idle] for both in counts.values()} == {0}
    assert any(both[1 - idle] for both in counts.values())


def test_without_any_curvature_nothing_is_protected() -> None:
    entries, _, _ = layers()
    zero = {
        name: Factors(Factor.of(torch.zeros(n, n)), Factor.of(torch.zeros(m, m))) for name, (m, n) in SHAPES.items()
    }
    assert within_freedom(Greedy(entries, zero), 0) == NOTHING
    assert within_forgetting(Greedy(entries, zero), 0.0) == NOTHING


@pytest.mark.parametrize("constraint", ["two-sided", "input", "output"])
def test_a_plan_of_marginal_ranks_leaves_what_a_uniform_one_would(constraint: Any) -> None:
    model = tiny("llama")
    calibration = [batch(model, 7)]
    uniform, marginal = (
        lorica.plan(model, 0.5, source="curvature", ranks=ranks, constraint=constraint, calibration=calibration)
        for ranks in ("uniform", "marginal")
    )
    assert uniform.free - 48 * 4 < marginal.free <= uniform.free
    assert "of an unconstrained update's forgetting" in marginal.entries[0].why
    lorica.protect(model, marginal)


def test_less_forgetting_leaves_less_freedom() -> None:
    model = tiny("llama")
    plans = [
        lorica.plan(model, expected_forgetting=share, calibration=[batch(model, 7)], **MARGINAL)
        for share in (1.0, 0.1, 0.01, 0.0)
    ]
    free = [plan.free for plan in plans]
    assert free == sorted(free, reverse=True)
    assert free[0] == sum(m * n for m, n in (entry.shape for entry in plans[0].entries))
    assert free[1] > free[2] > free[3]


def test_what_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a wide model half of a side at most is handed out."""
    monkeypatch.setattr("lorica.constrain.plan_counts.LARGEST_MARGINAL", 8)
    model = tiny("llama")
    for asked in ({"unfreeze_rank_ratio": 0.1}, {"expected_forgetting": 1e-6}):
        with pytest.raises(LoricaError, match="protects at most 8 directions of a side"):
            lorica.plan(model, calibration=[batch(model, 7)], **MARGINAL, **asked)
    lorica.plan(model, 0.95, calibration=[batch(model, 7)], **MARGINAL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (MARGINAL | {"rank_pattern": {"q_proj": 0}}, "rank_pattern has no effect with ranks 'marginal'"),
        ({"source": "activation", "ranks": "marginal"}, "it needs source 'curvature', not 'activation'"),
        ({"source": "curvature", "ranks": "marginal", "constraint": "block"}, "'block' protects only both together"),
        ({"source": "curvature", "expected_forgetting": 0.1}, "expected_forgetting has no effect with ranks 'uniform'"),
        (MARGINAL | {"expected_forgetting": 2.0}, "expected_forgetting = 2.0 is out of range"),
        (
            MARGINAL | {"expected_forgetting": 0.1, "unfreeze_rank_ratio": 0.5},
            "expected_forgetting and an amount of directions both say how much",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoricaError, match=message):
        lorica.plan(tiny("llama"), calibration="random", **options)
