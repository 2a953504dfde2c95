"""Algorithm 1: what is looked at, what is kept of it, and what it forbids afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lorica.errors import LoricaError
from lorica.methods.base import METHODS
from lorica.methods.osft_gradient import OSFTGradient
from lorica.methods.snapshots import TopGradients
from tests.builders import batch, matrix, task_of, tiny, top_directions, train, trainable
from tests.methods.learning import adamw, assert_orthonormal, assert_same_weights, begun, learn, parameters_of

WIDE = torch.float64


def algorithm(**options: object) -> OSFTGradient:
    return METHODS["osft-gradient"].build(options)  # type: ignore[return-value]


def sides(method: OSFTGradient, name: str) -> tuple[Tensor, Tensor]:
    state = method.state_dict()
    return state[f"{name}.u"].double(), state[f"{name}.v"].double()


def names(method: OSFTGradient) -> list[str]:
    return sorted(key.removesuffix(".u") for key in method.state_dict() if key.endswith(".u"))


def as_out_in(family: str, stored: Tensor) -> Tensor:
    return (stored.T if family == "gpt2" else stored).double()


def same_span(a: Tensor, b: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(a @ a.T, b @ b.T, atol=atol, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_snapshots_are_raw_gradients_of_every_mth_step(family: str) -> None:
    model, method = tiny(family), algorithm(k=2, refresh=2)
    optimizer = begun(method, model, task_of(model), lambda weights: SGD(weights, lr=0.1), max_grad_norm=1e-3)
    assert method.clips  # so that the Trainer does not, before they are looked at
    seen: list[dict[str, Tensor]] = []
    for step in range(5):
        model(**batch(model, step)).loss.backward()
        if step in (0, 2, 4):
            seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        norm = torch.stack([p.grad.norm() for p in trainable(model)]).norm().item()
        assert norm == pytest.approx(1e-3, rel=1e-3)
        optimizer.zero_grad()
    method.end_task(model, task_of(model))
    assert len(names(method)) == len(seen[0])
    for name in names(method):
        mean = as_out_in(family, sum(snapshot[f"{name}.weight"] for snapshot in seen))
        for side, expected in zip(sides(method, name), top_directions(mean, 2), strict=True):
            same_span(side, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("k", [3, 0.1])
def test_a_delta_is_what_the_task_changed(family: str, k: float) -> None:
    model, method = tiny(family), algorithm(k=k, snapshot="delta")
    before = parameters_of(model)
    learn(method, model)
    for name in names(method):
        change = as_out_in(family, model.get_parameter(f"{name}.weight").detach() - before[f"{name}.weight"])
        expected = top_directions(change, k if isinstance(k, int) else int(0.1 * min(change.shape)))
        for side, directions in zip(sides(method, name), expected, strict=True):
            same_span(side, directions)


def leaks(method: OSFTGradient, name: str, change: Tensor) -> dict[str, float]:
    u, v = sides(method, name)
    values = {"output": u.T @ change, "input": change @ v, "block": u.T @ change @ v}
    return {side: (value.norm() / change.norm()).item() for side, value in values.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("constraint", ["two-sided", "input", "output", "block"])
def test_the_constraint_holds_under_adamw_and_the_audit_says_so(family: str, constraint: str) -> None:
    model, method = tiny(family), algorithm(k=4, refresh=1, constraint=constraint)
    learn(method, model)
    assert method.audit(model) is None
    before, task = parameters_of(model), task_of(model, 1)
    optimizer = begun(method, model, task, adamw())
    train(model, optimizer, 4, lambda step: batch(model, 50 + step))
    report = method.audit(model)
    assert report is not None
    assert {row.verdict for row in report.rows} == {"holds"}
    assert {row.constraint for row in report.rows} == {constraint}
    held = {"two-sided": {"input", "output", "block"}, "input": {"input", "block"}, "output": {"output", "block"}}
    for name in names(method):
        weight = model.get_parameter(f"{name}.weight").detach()
        change = as_out_in(family, weight - before[f"{name}.weight"])
        for side, leak in leaks(method, name, change).items():
            if side in held.get(constraint, {"block"}):
                assert leak < 1e-5, (name, side)
            else:
                assert leak > 1e-2, (name, side)
    method.end_task(model, task)


def test_bases_grow_orthonormal_and_keep_the_old() -> None:
    model, method = tiny("llama"), algorithm(k=3)
    learn(method, model)
    first = method.state_dict()
    learn(method, model, 1)
    for key, basis in method.state_dict().items():
        assert_orthonormal(basis)
        assert torch.equal(basis[:, :3], first[key])
        assert basis.shape[1] == 6


def test_old_losses_do_not_change_to_first_order() -> None:
    """The whole gradient of one row of the old task is rank 1 in a layer that saw one token: all of it is kept."""
    model, method = tiny("llama"), algorithm(k=8, refresh=1, target_modules=["mlp.*down_proj"])
    old = batch(model, 7, rows=1, length=5)
    task = task_of(model)
    optimizer = begun(method, model, task, lambda weights: SGD(weights, lr=1e-12))
    train(model, optimizer, 1, lambda step: old)
    method.end_task(model, task)
    loss = model(**old).loss
    weights = [model.get_parameter(f"{name}.weight") for name in names(method)]
    gradients = dict(zip(names(method), torch.autograd.grad(loss, weights), strict=True))
    before = parameters_of(model)
    learn(method, model, 1)
    for name, gradient in gradients.items():
        change = model.get_parameter(f"{name}.weight").detach() - before[f"{name}.weight"]
        assert change.norm() > 0.01
        assert abs(float((gradient * change).sum())) < 1e-4 * float(gradient.norm() * change.norm())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_flat_keeps_the_top_directions_of_all_weights_together(family: str) -> None:
    model, method = tiny(family), algorithm(form="flat", k=3, refresh=1)
    optimizer = begun(method, model, task_of(model), lambda weights: SGD(weights, lr=0.1))
    seen = []
    for step in range(3):
        model(**batch(model, step)).loss.backward()
        seen.append(torch.cat([p.grad.flatten() for p in trainable(model)]).double())
        optimizer.step()
        optimizer.zero_grad()
    order = [name for name, p in model.named_parameters() if p.requires_grad]
    method.end_task(model, task_of(model))
    basis = torch.cat([method.state_dict()[name] for name in order], dim=1).double().T
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=WIDE), atol=1e-5, rtol=0)
    snapshots = torch.stack(seen, dim=1)
    torch.testing.assert_close(
        basis @ (basis.T @ snapshots), snapshots, atol=1e-4 * snapshots.abs().max().item(), rtol=0
    )
    before = parameters_of(model)
    learn(method, model, 1)
    change = torch.cat([(model.get_parameter(n).detach() - before[n]).flatten() for n in order]).double()
    assert change.norm() > 0.1
    assert (basis.T @ change).norm() < 1e-5 * change.norm()
    assert {len(part) for part in method.state_dict().values()} == {6}
    assert method.audit(model) is None


def test_flat_with_deltas_keeps_the_change_of_each_task() -> None:
    model, method = tiny("llama"), algorithm(form="flat", snapshot="delta")
    before = parameters_of(model)
    learn(method, model)
    for name, part in method.state_dict().items():
        change = (model.get_parameter(name).detach() - before[name]).flatten()
        torch.testing.assert_close(part[0] * change.norm(), change * part[0].norm())
        assert len(part) == 1


def test_the_sketch_is_the_svd_while_nothing_is_cut_and_close_to_it_after() -> None:
    parameters = {"a": nn.Parameter(torch.zeros(3, 4)), "b": nn.Parameter(torch.zeros(5))}
    common = matrix(17, 2, 9, WIDE)
    columns = [common @ matrix(2, 1, i, WIDE)[:, 0] + 1e-3 * matrix(17, 1, 20 + i, WIDE)[:, 0] for i in range(8)]
    sketch = TopGradients(parameters, 1, 3)
    assert sketch.vectors() == []
    for count, column in enumerate(columns, start=1):
        sketch.take({"a": column[:12].view(3, 4).float(), "b": column[12:].float()})
        found = torch.stack([torch.cat([v["a"], v["b"]]).double() for v in sketch.vectors()], dim=1)
        u, s, _ = torch.linalg.svd(torch.stack(columns[:count], dim=1), full_matrices=False)
        if count <= 3:
            torch.testing.assert_close(found.norm(dim=0), s, atol=1e-5, rtol=1e-4)
        found = found / found.norm(dim=0)
        torch.testing.assert_close(
            found[:, :2] @ found[:, :2].T, u[:, :2] @ u[:, :2].T, atol=1e-2, rtol=0
        ) if count > 1 else None
    assert found.shape == (17, 3)


@pytest.mark.parametrize("options", [{}, {"k": 0}, {"k": 0, "snapshot": "delta"}, {"k": 0, "form": "flat"}, {"k": 0.0}])
def test_nothing_stored_is_seqft_bitwise(options: dict[str, object]) -> None:
    ours, plain = tiny("llama"), tiny("llama")
    method, seqft = algorithm(**options), METHODS["seqft"].build({})
    for index in range(2 if options else 1):
        learn(method, ours, index)
        learn(seqft, plain, index)
    assert_same_weights(ours, plain)


@pytest.mark.parametrize("constraint", ["two-sided", "input", "output", "block"])
def test_with_every_direction_stored_nothing_moves(constraint: str) -> None:
    model, method = (
        tiny("llama"),
        algorithm(k=1.0, snapshot="delta", constraint=constraint, target_modules=["[qo]_proj"]),
    )
    for index in range(2):  # a change has no rank beyond its noise
        learn(method, model, index, steps=8)
    assert {basis.shape for basis in method.state_dict().values()} == {(32, 32)}
    before = parameters_of(model)
    learn(method, model, 2)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], atol=1e-6, rtol=1e-5)


def test_flat_is_refused_where_it_would_not_fit() -> None:
    model = tiny("llama")
    with pytest.raises(LoricaError, match=r"osft-gradient would store 16 vectors of .* lower k"):
        algorithm(form="flat", max_bytes=10_000).begin_task(model, task_of(model))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"snapshot": "weights"}, "snapshot"),
        ({"form": "tensor"}, "form"),
        ({"snapshot": "delta", "refresh": 5}, "refresh has no effect with snapshot 'delta'"),
        ({"refresh": 0}, "refresh = 0 is out of range"),
        ({"form": "flat", "constraint": "input"}, "constraint has no effect with form 'flat'"),
        ({"max_bytes": 10}, "max_bytes has no effect with form 'matrix'"),
        ({"k": -1}, "k = -1 is out of range"),
        ({"k": 1.5}, "k = 1.5 is out of range"),
        ({"k": 0.5, "form": "flat"}, "k = 0.5 is out of range"),
    ],
)
def test_options_out_of_range(given: dict[str, object], said: str) -> None:
    with pytest.raises(LoricaError, match=said):
        algorithm(**given)


def test_options_from_the_command_line() -> None:
    assert algorithm(k="4").options.k == 4
    assert isinstance(algorithm(k="4").options.k, int)
    assert algorithm(k="0.25").options.k == 0.25
