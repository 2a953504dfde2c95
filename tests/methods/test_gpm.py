"""GPM: bases by hand, and what old inputs become after real optimizer steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorica.errors import LoricaError
from lorica.methods.base import METHODS
from lorica.methods.gpm import GPM, new_directions
from lorica.subspace.observe import within_memory
from tests.builders import BatchRows, matrix, task_of, tiny
from tests.methods.learning import (
    adamw,
    assert_orthonormal,
    assert_same_weights,
    begun,
    learn,
    parameters_of,
)

WIDE = torch.float64
AXES = torch.eye(3, dtype=WIDE)
NONE = torch.zeros(3, 0, dtype=WIDE)


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=WIDE))


@pytest.mark.parametrize(
    ("energies", "old", "energy", "expected"),
    [
        ((9.0, 0.9, 0.1), NONE, 0.90, [0]),  # exactly what is asked for
        ((9.0, 0.9, 0.1), NONE, 0.91, [0, 1]),
        ((9.0, 0.9, 0.1), NONE, 1.00, [0, 1, 2]),
        ((9.0, 1.0, 0.0), NONE, 1.00, [0, 1]),  # nothing where there is nothing
        ((1.0, 1.0, 8.0), AXES[:, :2], 0.2, []),  # the old ones hold it
        ((1.0, 1.0, 8.0), AXES[:, :2], 0.9, [2]),
        ((3.0, 5.0, 2.0), AXES[:, :1], 0.8, [1]),  # 3 + 5 of 10
        ((3.0, 5.0, 2.0), AXES[:, :1], 0.81, [1, 2]),
        ((0.0, 0.0, 0.0), NONE, 0.97, []),
        ((1.0, 2.0, 3.0), AXES, 1.0, []),
    ],
)
def test_the_fewest_directions_by_hand(
    energies: tuple[float, ...], old: Tensor, energy: float, expected: list[int]
) -> None:
    directions, values = new_directions(diagonal(*energies), old, energy)
    torch.testing.assert_close(directions @ directions.T, AXES[:, expected] @ AXES[:, expected].T)
    torch.testing.assert_close(values, torch.tensor([energies[i] for i in expected], dtype=WIDE))


def test_the_rule_is_the_svd_of_the_inputs_outside_the_old_basis() -> None:
    x = matrix(8, 30, 1, WIDE) * torch.logspace(0, -2, 8, dtype=WIDE)[:, None]  # columns are inputs, as in the paper
    old = torch.linalg.qr(matrix(8, 2, 2, WIDE)).Q
    u, s, _ = torch.linalg.svd(x - old @ (old.T @ x))
    total = x.square().sum()
    held, count = total - s.square().sum(), 0
    while held < 0.97 * total:
        held, count = held + s[count].square(), count + 1
    directions, values = new_directions(x @ x.T, old, 0.97)
    assert 1 < count == directions.shape[1] < 6
    torch.testing.assert_close(directions @ directions.T, u[:, :count] @ u[:, :count].T)
    torch.testing.assert_close(values, s[:count].square())


def gpm(**options: object) -> GPM:
    return METHODS["gpm"].build(options)  # type: ignore[return-value]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "t5-gated"])
def test_old_rows_give_the_same_outputs_after_steps_of_adamw(family: str) -> None:
    model, method = tiny(family), gpm(energy=1.0, rows=2)
    learn(method, model)
    before = parameters_of(model)
    (old,) = task_of(model).batches(2)
    (other,) = task_of(model, 3).batches(2)
    logits, others = model(**old).logits.detach(), model(**other).logits.detach()
    learn(method, model, 1)
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    torch.testing.assert_close(model(**old).logits, logits, atol=1e-5, rtol=1e-5)
    assert (model(**other).logits - others).abs().max() > 0.01
    # Without the constraint the old rows' outputs do move.
    model.load_state_dict(before, strict=False)
    learn(METHODS["seqft"].build({}), model, 1)
    assert (model(**old).logits - logits).abs().max() > 0.01


def test_the_bases_stay_orthonormal_and_keep_what_they_hold() -> None:
    model, method = tiny("llama"), gpm(rows=3)
    learn(method, model)
    first = dict(method.bases)
    learn(method, model, 1)
    for name, basis in method.bases.items():
        assert_orthonormal(basis)
        assert torch.equal(basis[:, : first[name].shape[1]], first[name])
    assert sum(basis.shape[1] for basis in method.bases.values()) > sum(basis.shape[1] for basis in first.values())


def test_the_threshold_rises_with_the_tasks_to_one() -> None:
    asked: list[float] = []

    class Spy(GPM):
        def extend(self, name: str, moment_NN: Tensor, energy: float) -> None:
            asked.append(energy)

    model, method = (
        tiny("llama"),
        Spy(GPM.options_type(energy=0.9, energy_step=0.06, target_modules=["layers.0.*q_proj"])),
    )
    for index in range(3):
        learn(method, model, index, steps=0)
    assert asked == pytest.approx([0.9, 0.96, 1.0])


def test_nothing_stored_is_seqft_bitwise() -> None:
    ours, plain = tiny("llama"), tiny("llama")
    method = gpm()
    optimizer = begun(method, ours, task_of(ours), adamw(), max_grad_norm=1.0)
    assert type(optimizer) is torch.optim.AdamW  # the Trainer's own, which the Trainer clips
    assert not method.clips
    assert method.audit(ours) is None
    method.end_task(ours, task_of(ours))
    ours = tiny("llama")
    learn(gpm(), ours)
    learn(METHODS["seqft"].build({}), plain)
    assert_same_weights(ours, plain)


def test_with_every_direction_stored_nothing_moves() -> None:
    model, method = tiny("llama"), gpm(energy=1.0)
    learn(method, model)
    assert {basis.shape[1] for basis in method.bases.values()} == {32, 48}
    before = parameters_of(model)
    learn(method, model, 1)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], atol=1e-7, rtol=1e-6)


def test_the_audit_proves_it() -> None:
    model, method = tiny("gpt2"), gpm(rows=2)
    learn(method, model)
    optimizer = begun(method, model, task_of(model, 1), adamw())
    for step in range(3):
        rows = BatchRows(model, step).whole
        model(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    report = method.audit(model)
    assert report is not None
    assert {row.verdict for row in report.rows} == {"holds"}
    assert report.worst <= 1e-5
    assert {row.constraint for row in report.rows} == {"input"}
    layer = model.transformer.h[0].mlp.c_fc
    with torch.no_grad():
        layer.weight += 1e-3 * matrix(*layer.weight.shape)
    report = method.audit(model)
    assert [row.name for row in report.rows if row.verdict == "LEAKS"] == ["transformer.h.0.mlp.c_fc"]


def test_the_plan_tells_how_many_directions_are_held() -> None:
    model, method = tiny("llama"), gpm(rows=2)
    learn(method, model)
    method.begin_task(model, task_of(model, 1))
    for entry in method.plan.entries:
        held = method.bases[entry.name].shape[1]
        assert (entry.k, entry.learned, entry.constraint) == (0, (0, held), "input")
        assert entry.free == entry.shape[0] * (entry.shape[1] - held)


def test_looking_at_few_layers_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole, parts = tiny("llama"), gpm(), gpm()
    learn(whole, model, steps=0)
    monkeypatch.setattr("lorica.subspace.observe.MOMENT_BYTES", 3 * 8 * 32**2)
    groups = list(within_memory({str(i): 8 * n**2 for i, n in enumerate((32, 32, 48, 8))}))
    assert groups == [["0", "1"], ["2", "3"]]
    learn(parts, model, steps=0)
    assert all(torch.equal(whole.bases[name], basis) for name, basis in parts.bases.items())
    assert len(whole.bases) == len(parts.bases) == 14


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"energy": 0.0}, "energy = 0.0 is out of range"),
        ({"energy": 1.1}, "energy = 1.1 is out of range"),
        ({"energy_step": -0.1}, "energy_step = -0.1 is out of range"),
        ({"rows": 0}, "rows = 0 is out of range"),
        ({"enrgy": 0.9}, "Did you mean 'energy'"),
    ],
)
def test_options_out_of_range(given: dict[str, object], said: str) -> None:
    with pytest.raises(LoricaError, match=said):
        gpm(**given)
