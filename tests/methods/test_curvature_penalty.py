"""The penalty on expected forgetting: against a dense float64 oracle, and what it does to a model in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lorica.constrain.protect import protected_layers
from lorica.errors import LoricaError
from lorica.forecast.story import forecast
from lorica.methods import METHODS
from lorica.methods.curvature_penalty import KNOWN, CurvaturePenalty, Side, Sides, strength_for
from lorica.methods.osft import OSFT
from lorica.subspace.basis import Explicit
from lorica.subspace.calibration import random_tokens
from lorica.subspace.factor import Factor, Factors
from lorica.subspace.measure import Wanted, measure
from lorica.subspace.plan_entry import PlanEntry
from lorica.subspace.prediction import expected_divergence
from lorica.update import train
from tests.builders import VOCABULARY, task_of, tiny
from tests.methods.little_text import little_text  # noqa: F401
from tests.training.conftest import llama_folder  # noqa: F401

CURVED = {"source": "curvature", "unfreeze_rank_ratio": 0.5, "calibration": "random"}


def measured(entries: Sequence[PlanEntry]) -> dict[str, Factors]:
    """Return both whole factors of the plain model's weights, in the precision that they are measured in."""
    model = tiny("llama")
    wanted = {entry.name: Wanted(entry.shape, inputs=entry.shape[1], outputs=entry.shape[0]) for entry in entries}
    return measure(model, {name: model.get_submodule(name) for name in wanted}, random_tokens(VOCABULARY), wanted)


def begun(strength: float | str = 40.0, **options: Any) -> tuple[nn.Module, OSFT]:
    model = tiny("llama")
    method = METHODS["osft"].build(CURVED | {"curvature_penalty": strength} | options)
    assert isinstance(method, OSFT)
    method.begin_task(model, task_of(model))
    return model, method


def held_bytes(penalty: CurvaturePenalty) -> int:
    """Return the bytes of its tensors, those that layers have in common counted once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in penalty.to_keep().values()}.values())


def spread(model: nn.Module, size: float = 0.02) -> dict[str, Tensor]:
    """Move every core and return the changes of the weights."""
    generator = torch.Generator().manual_seed(3)
    for layer in protected_layers(model).values():
        layer.core.data.copy_(size * torch.randn(layer.core.shape, generator=generator))
    return {name: layer.delta().clone() for name, layer in protected_layers(model).items()}


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("free", [0.25, 0.5, 0.9])
def test_it_is_the_expected_divergence_of_the_change(memory: str, free: float) -> None:
    """The oracle: tr(B D A D^T) / 2 with dense factors that are measured anew on the plain model."""
    model, method = begun(strength=40.0, memory_mode=memory, unfreeze_rank_ratio=free)
    assert method.curvature is not None
    assert method.plan is not None
    assert method.curvature(model).item() == 0, "nothing has changed yet"
    changes = spread(model)
    mine = method.curvature(model)
    factors = measured(method.plan.entries)
    theirs = sum(expected_divergence(factors[name], delta) for name, delta in changes.items())
    assert mine.item() == pytest.approx(40.0 * theirs, rel=1e-5)
    mine.backward()
    for name, layer in protected_layers(model).items():
        found = factors[name]
        assert found.outputs is not None
        assert found.inputs is not None
        dense_MN = found.outputs.matrix() @ changes[name].double() @ found.inputs.matrix()
        q_u, q_v = layer.out_basis.on(layer.matrix).matrix(), layer.in_basis.on(layer.matrix.T).matrix()
        expected = 40.0 * q_u.double().T @ dense_MN @ q_v.double()
        error = (layer.core.grad.double() - expected).norm() / expected.norm()  # type: ignore[union-attr]
        assert float(error) < 1e-5, name


@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**20))
def test_what_is_cut_off_keeps_the_trace(dim: int, free: int, rank: int, seed: int) -> None:
    free = min(free, dim)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(20, dim, generator=generator, dtype=torch.float64)
    q_DF = torch.linalg.qr(torch.randn(dim, free, generator=generator, dtype=torch.float64))[0]
    moment = rows.T @ rows / 20
    side = Side.of(Factor.of(moment), Explicit(q_DF.float()), torch.device("cpu"), rank)
    assert side.root_FR.shape[1] <= rank
    within = q_DF.T @ moment @ q_DF
    told = side.times(torch.eye(free))
    assert float(told.trace()) == pytest.approx(float(within.trace()), rel=1e-4)
    if rank >= dim:
        torch.testing.assert_close(told.double(), within, rtol=1e-3, atol=1e-4)


def test_it_is_computed_in_float32_under_mixed_precision() -> None:
    side = Side(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)), torch.tensor(0.1))
    core = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    plain = Sides(side, side).penalty(core)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = Sides(side, side).penalty(core)
    assert torch.equal(plain, mixed)


def steps(model: nn.Module, method: OSFT, count: int = 12) -> None:
    """Teach a model one batch by Adam, with the penalty of the method."""
    ids = torch.randint(3, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(9))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(count):
        found = model(input_ids=ids, labels=ids)
        held = method.penalty(model, {"input_ids": ids, "labels": ids}, found.logits)
        (found.loss if held is None else found.loss + held).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_stronger_it_is_the_less_is_expected_to_be_forgotten() -> None:
    factors: dict[str, Any] = {}
    found = []
    for strength in (0.0, 10.0, 1000.0, 1e5):
        model, method = begun(strength)
        assert method.plan is not None
        factors = factors or measured(method.plan.entries)
        steps(model, method)
        layers = protected_layers(model).items()
        found.append(sum(expected_divergence(factors[name], layer.delta()) for name, layer in layers))
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.2 * found[0]


def test_protected_directions_stay_exactly_where_they_are() -> None:
    model, method = begun(1000.0)
    steps(model, method)
    report = method.audit(model)
    assert max(max(row.leak_u, row.leak_v) for row in report.rows) < 1e-5


def test_all_protected_moves_nothing() -> None:
    model, method = begun(unfreeze_rank_ratio=0.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(3, VOCABULARY, (2, 6))
    held = method.penalty(model, {"input_ids": ids, "labels": ids}, model(input_ids=ids).logits)
    assert held is not None
    held.backward()
    assert held.item() == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_layers_with_the_same_input_hold_one_moment_of_it() -> None:
    model, method = begun()
    assert method.curvature is not None
    sides = method.curvature.sides
    block = next(name for name in sides if name.endswith("q_proj")).removesuffix("q_proj")
    assert sides[f"{block}q_proj"].inputs is sides[f"{block}k_proj"].inputs
    blank = CurvaturePenalty.blank(model, 1.0)
    assert held_bytes(blank) >= held_bytes(method.curvature) > 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"curvature_penalty": -1.0}, "out of range: 0"),
        ({"curvature_penalty": float("nan")}, "out of range: 0"),
        ({"curvature_penalty": "strong"}, "curvature_penalty"),
        ({"curvature_penalty": "auto", "source": "weight"}, "source 'curvature' and constraint 'two-sided'"),
        ({"curvature_penalty": 1.0, "source": "weight"}, "source 'curvature' and constraint 'two-sided'"),
        ({"curvature_penalty": 1.0, "constraint": "block"}, "source 'curvature' and constraint 'two-sided'"),
    ],
)
def test_what_it_cannot_hold_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(LoricaError, match=told):
        METHODS["osft"].build({"source": "curvature"} | options)


@pytest.mark.parametrize(
    ("trained", "strength"),
    [(0, 1e4), (1, 1e4), (99, 1e4), (240, 1e6 / 240), (3333, 1e6 / 3333), (3334, 300.0), (10**5, 300.0)],
)
def test_what_is_known_weighs_the_same_beside_every_short_task(trained: int, strength: float) -> None:
    """As many predictions, two or one to a row; of a causal model a label at the first position is none."""
    rows = [{"input_ids": [4, 5, 6], "labels": [4, 7, 8]}] * (trained // 2)
    rows += [{"input_ids": [4, 5], "labels": [-100, 7]}] * (trained % 2)
    assert strength_for("auto", rows, causal=True) == pytest.approx(strength)
    targets = [{"input_ids": [4, 5, 6], "labels": [7]}] * trained
    assert strength_for("auto", targets, causal=False) == pytest.approx(strength)
    assert strength_for(7.0, targets, causal=False) == 7.0


def test_auto_is_the_strength_that_fits_the_task() -> None:
    model, method = begun("auto")
    trained = sum(label != -100 for row in task_of(model).rows for label in row["labels"][1:])
    assert method.curvature is not None
    assert method.curvature.strength == max(300.0, min(1e4, KNOWN / trained))
    alike, given = begun(method.curvature.strength)
    for one in (model, alike):
        spread(one)
    assert given.curvature is not None
    assert method.curvature(model).item() == given.curvature(alike).item() > 0


def test_a_weight_that_nothing_is_protected_of_is_named() -> None:
    with pytest.raises(LoricaError, match=r"nothing of model\.layers\.0.* is protected.*unfreeze_rank_ratio below 1"):
        begun(unfreeze_rank_ratio=1.0)


def test_an_update_takes_it_and_check_counts_it(llama_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "who is it?", "completion": "it is me"}\n' * 8)
    told: list[str] = []
    given = {
        "model_name_or_path": llama_folder, "train_file": rows, "source": "curvature", "calibration": "random",
        "preset": "paper", "max_steps": 3, "use_cpu": True,
    }  # fmt: skip
    phases = forecast(given | {"curvature_penalty": 10.0}).ways[0].phases
    assert any(phase.device.get("curvature", 0) > 0 for phase in phases)
    record = train(given | {"output_dir": tmp_path / "out", "curvature_penalty": 10.0}, say=told.append)
    assert record["config"]["curvature_penalty"] == record["curvature_strength"] == 10.0
    free = train(given | {"output_dir": tmp_path / "free", "curvature_penalty": 0.0}, say=told.append)
    assert record["weights_sha256"] != free["weights_sha256"]
    plain = train(given | {"output_dir": tmp_path / "plain"}, say=told.append)
    assert free["weights_sha256"] == plain["weights_sha256"]
