"""The Kronecker factors of a model's layers, against sums over positions by brute force in float64.

Shape suffixes: D the dimension of one side, R rows, V the vocabulary, S columns of a sketch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorica
from lorica.constrain.linear import matrix_of
from lorica.errors import LoricaError
from lorica.subspace import observe
from lorica.subspace.calibration import parts
from lorica.subspace.factor import Factor, Factors
from lorica.subspace.measure import Wanted, measure
from lorica.subspace.moment import Moment, from_sketch, random_basis, sketch_size
from lorica.subspace.observe import within_memory
from lorica.subspace.prediction import expected_divergence
from tests.builders import matrix, tiny
from tests.subspace.oracle import Batches, Masks, by_brute_force, everything, mean_square, planned


def measured(model: nn.Module, batches: Batches, **options: Any) -> dict[str, Factors]:
    layers = planned(model)
    return measure(model, layers, batches, everything(layers), **options)


def assert_same(found: Mapping[str, Factors], expected: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        for factor, dense in zip((found[name].inputs, found[name].outputs), pair, strict=True):
            assert factor is not None
            scale = float(dense.abs().max())
            assert scale > 0
            torch.testing.assert_close(factor.matrix(), dense, rtol=0, atol=1e-9 * scale, msg=lambda m, n=name: n + m)


def ids_of(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


RIGHT = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
LEFT = RIGHT.flip(1)
PROMPT = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0]])
"""Which positions have a label."""


def labelled(ids: Tensor, where: Tensor) -> Tensor:
    return torch.where(where.bool(), ids, -100)


def next_ones(mask: Tensor) -> Tensor:
    """Return which positions predict one that is set."""
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1).bool()


def causal_cases() -> list[tuple[dict[str, Tensor], Masks]]:
    ids = ids_of(3, 6)
    right = {"input_ids": ids, "attention_mask": RIGHT}
    left = {"input_ids": ids, "attention_mask": LEFT}
    return [
        ({"input_ids": ids}, {"main": RIGHT >= 0, "predicted": next_ones(RIGHT >= 0)}),
        (right, {"main": RIGHT.bool(), "predicted": next_ones(RIGHT)}),
        (right | {"labels": labelled(ids, PROMPT)}, {"main": RIGHT.bool(), "predicted": next_ones(PROMPT)}),
        (left, {"main": LEFT.bool(), "predicted": next_ones(LEFT) & LEFT.bool()}),
    ]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "opt", "phi3"])
def test_factors_of_a_causal_model_are_the_sums_over_its_positions(name: str) -> None:
    model = tiny(name, torch.float64)
    batches, masks = zip(*causal_cases(), strict=True)
    assert_same(measured(model, batches, seed=5), by_brute_force(model, planned(model), batches, masks, seed=5))


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_factors_are_the_sums_over_the_parts_of_large_batches(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows at a time as there is room for, at least one; labels are drawn part by part."""
    monkeypatch.setattr(observe, "rows_together", lambda model, layers, length: rows)
    model = tiny("llama", torch.float64)
    batches, masks = zip(*causal_cases(), strict=True)
    cut, cut_masks = (
        [
            {key: value[start : start + rows] for key, value in one.items()}
            for one in whole
            for start in range(0, 3, rows)
        ]
        for whole in (batches, masks)
    )
    expected = by_brute_force(model, planned(model), cut, cut_masks, seed=5)
    assert_same(measured(model, batches, seed=5), expected)


def test_a_part_takes_about_as_many_numbers_as_the_model_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    layers = planned(model)
    width = 2 * sum(sum(matrix_of(layer).shape) for layer in layers.values()) + 6 * model.config.vocab_size
    numbers = sum(parameter.numel() for parameter in model.parameters())
    for least, room in ((0, numbers), (10**7, 10**7)):
        monkeypatch.setattr(observe, "PART", least)
        assert observe.rows_together(model, layers, 5) == room // (5 * width) > 0
        assert observe.rows_together(model, layers, 10**9) == 1


def test_batches_of_another_form_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time may come first there."""
    monkeypatch.setattr(observe, "PART", 0)
    layers = {"layer": nn.Linear(4, 3)}
    batch = {"x": torch.ones(6, 2, 4)}
    assert list(observe.in_parts(layers["layer"], layers, [batch])) == [batch]
    ids = {"input_ids": ids_of(6, 2)}
    assert len(list(observe.in_parts(layers["layer"], layers, [ids]))) == 6
    assert list(observe.in_parts(layers["layer"], layers, [ids], whole=True)) == [ids]


def test_what_has_no_rows_in_common_stays_whole() -> None:
    ids = ids_of(5, 4)
    assert [len(part["input_ids"]) for part in parts({"input_ids": ids, "labels": ids}, 2)] == [2, 2, 1]
    for batch in ({"input_ids": ids, "position": torch.tensor(3)}, {"input_ids": ids, "other": ids[:2]}):
        assert list(parts(batch, 2)) == [batch]


@pytest.mark.parametrize("decoded", [6, 4])
def test_factors_of_an_encoder_decoder_are_the_sums_over_each_side(decoded: int) -> None:
    """Also where encoder and decoder have the same length, which does not tell whose layer it is."""
    model = tiny("t5", torch.float64)
    ids, answers = ids_of(3, 6), ids_of(3, decoded, 1)
    attended = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
    answered = RIGHT[:, :decoded]
    asked = {"input_ids": ids, "attention_mask": attended}
    batches: list[Any] = [
        asked | {"labels": labelled(answers, answered)},
        {"input_ids": ids, "decoder_input_ids": answers},
        asked | {"decoder_input_ids": answers, "decoder_attention_mask": answered},
    ]
    every = {"encoder": attended >= 0, "main": answered >= 0, "predicted": answered >= 0}
    some = {"encoder": attended.bool(), "main": answered.bool(), "predicted": answered.bool()}
    masks = [some, every, some]
    assert_same(measured(model, batches), by_brute_force(model, planned(model), batches, masks))


def test_factors_of_an_encoder_are_the_sums_over_what_is_attended() -> None:
    model, ids = tiny("bert", torch.float64), ids_of(3, 6)
    right = {"input_ids": ids, "attention_mask": RIGHT}
    batches = [right, right | {"labels": labelled(ids, PROMPT)}]
    masks = [{"encoder": RIGHT.bool(), "predicted": mask.bool()} for mask in (RIGHT, PROMPT)]
    assert_same(measured(model, batches), by_brute_force(model, planned(model), batches, masks))


def test_factors_of_a_classifier_have_one_prediction_a_row() -> None:
    model, ids = tiny("bert-classifier", torch.float64), ids_of(3, 6)
    right = {"input_ids": ids, "attention_mask": RIGHT}
    batches = [right, right | {"labels": torch.tensor([0, 2, 1])}]
    masks = [{"encoder": RIGHT.bool(), "predicted": torch.ones(3, dtype=torch.bool)}] * 2
    assert_same(measured(model, batches), by_brute_force(model, planned(model), batches, masks))


class Twice(nn.Module):
    """A layer that is used twice, and one that follows it and writes into what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = (nn.Linear(5, size, dtype=torch.float64) for size in (5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.relu_(self.layer(x))))


def test_a_layer_that_is_used_twice_counts_twice_and_outputs_may_be_written_into() -> None:
    torch.manual_seed(0)
    model, batches = Twice(), [{"x": matrix(7, 5, seed, torch.float64)} for seed in (1, 2)]
    layers = {"layer": model.layer, "head": model.head}
    every = torch.ones(7, dtype=torch.bool)
    expected = by_brute_force(Plain(model), layers, batches, [{"main": every, "predicted": every}] * 2)
    assert_same(measure(model, layers, batches, everything(layers)), expected)


class Plain(nn.Module):
    """The same without writing into outputs, so that autograd can be asked for their gradients."""

    def __init__(self, model: Twice) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.head(self.model.layer(torch.relu(self.model.layer(x))))


class Head(nn.Module):
    """A model whose every prediction is p = softmax(layer(x))."""

    def __init__(self, p: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(1, len(p), bias=False, dtype=torch.float64)
        self.layer.weight.data.copy_(p.log()[:, None])

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.layer(x)


def test_labels_are_sampled_from_the_model_and_not_those_given() -> None:
    """B of the predictions is then ``diag(p) - p p^T``; with the true labels y it would be ``(p - y)(p - y)^T``."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    model, rows = Head(p), 40_000
    batch = {"x": torch.ones(rows, 1, dtype=torch.float64), "labels": torch.zeros(rows, dtype=torch.long)}
    found = measure(model, {"layer": model.layer}, [batch], {"layer": Wanted((4, 1), outputs=4)})["layer"].outputs
    assert found is not None
    fisher, missed = p.diag() - torch.outer(p, p), p - torch.eye(4, dtype=torch.float64)[0]
    torch.testing.assert_close(found.matrix(), fisher, rtol=0, atol=0.01)
    assert (found.matrix() - torch.outer(missed, missed)).abs().max() > 0.1


class First(nn.Module):
    """A classifier of the first position of each text."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[:, 0]


@pytest.mark.parametrize("length", [1, 16])
def test_what_a_change_does_to_a_prediction_does_not_depend_on_how_long_its_text_is(length: int) -> None:
    """The mean KL(p || q) of the predictions, for a small change of the weight, is tr(B D A D^T) / 2."""
    torch.manual_seed(0)
    model, x = First(), matrix(1, 6, 1, torch.float64).expand(20_000, length, 6)
    wanted = {"layer": Wanted((4, 6), inputs=6, outputs=4)}
    found = measure(model, {"layer": model.layer}, [{"x": x}], wanted)["layer"]
    delta = 1e-2 * matrix(4, 6, 2, torch.float64)
    with torch.no_grad():
        before = model(x[:1]).log_softmax(-1)
        model.layer.weight += delta
        after = model(x[:1]).log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum())
    assert expected_divergence(found, delta) == pytest.approx(divergence, rel=0.03)


def test_data_that_is_known_by_heart_has_curvature_all_the_same() -> None:
    p = torch.tensor([0.99, 0.005, 0.005], dtype=torch.float64)
    model, rows = Head(p), 4000
    batch = {"x": torch.ones(rows, 1, dtype=torch.float64), "labels": torch.zeros(rows, dtype=torch.long)}
    found = measure(model, {"layer": model.layer}, [batch], {"layer": Wanted((3, 1), outputs=3)})["layer"].outputs
    assert found is not None
    true = p - torch.tensor([1.0, 0, 0])
    assert found.trace > 50 * float(true @ true)


def test_another_seed_draws_other_labels_and_each_batch_its_own() -> None:
    model = tiny("llama")
    batch = {"input_ids": ids_of(3, 6)}
    one, same, other = (measured(model, [batch], seed=seed) for seed in (0, 0, 1))
    both = measured(model, [batch, batch], seed=0)
    for name, factors in one.items():
        sides = [each[name].outputs for each in (same, other, both)]
        assert factors.outputs is not None
        assert [side is not None and side.same_as(factors.outputs) for side in sides] == [True, False, False]


def test_measuring_leaves_no_trace() -> None:
    model = tiny("llama", dropout=0.3).train()
    model.model.layers[1].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.grad = torch.ones_like(weight)
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = measured(model, [{"input_ids": ids_of(3, 6)}])
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    graded = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert list(graded) == ["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(graded["model.layers.0.self_attn.q_proj.weight"], torch.ones_like(weight))
    assert not any(module._forward_hooks for module in model.modules())
    sides = [side for factors in found.values() for side in (factors.inputs, factors.outputs)]
    assert not any(side is None or side.vectors_DR.requires_grad for side in sides)
    again = measured(model, [{"input_ids": ids_of(3, 6)}])
    for name, factors in found.items():
        assert factors.outputs is not None
        assert again[name].outputs is not None
        assert factors.outputs.same_as(again[name].outputs), "dropout is off meanwhile"


def test_measuring_works_where_gradients_are_off() -> None:
    model, batch = tiny("gpt2"), {"input_ids": ids_of(3, 6)}
    with torch.no_grad():
        found = measured(model, [batch])
        assert not torch.is_grad_enabled()
    assert all(factors.outputs is not None and factors.outputs.trace > 0 for factors in found.values())


def test_only_what_is_wanted_is_measured() -> None:
    model = tiny("llama")
    layers = planned(model)
    first, second, third, *_ = layers
    wanted = {name: Wanted(matrix_of(layer).shape) for name, layer in layers.items()}
    wanted |= {first: Wanted((32, 32), inputs=3), second: Wanted((16, 32), outputs=2), third: Wanted((16, 32), 4, 5)}
    found = measure(model, layers, [{"input_ids": ids_of(2, 5)}], wanted)
    ranks = {
        name: [side and len(side.energies_R) for side in (factors.inputs, factors.outputs)]
        for name, factors in found.items()
    }
    assert ranks == {first: [3, None], second: [None, 2], third: [4, 5]}


# --- sharing, and several passes ------------------------------------------------------------------------------------


def test_layers_with_the_same_input_have_one_factor_and_protected_one_basis() -> None:
    model = tiny("llama")
    plan = lorica.plan(model, 0.5, source="activation", calibration=[{"input_ids": ids_of(4, 8)}])
    blocks = [f"model.layers.{index}" for index in range(2)]
    alike = [[f"{b}.self_attn.{x}_proj" for x in "qkv"] for b in blocks]
    alike += [[f"{b}.mlp.{x}_proj" for x in ("gate", "up")] for b in blocks]
    alone = [[f"{b}.{x}_proj"] for b in blocks for x in ("self_attn.o", "mlp.down")]
    factors = [{id(getattr(plan.factors(name), "inputs", None)) for name in group} for group in alike + alone]
    assert [len(group) for group in factors] == [1] * 8
    assert len(set.union(*factors)) == 8, "other inputs have another"
    lorica.protect(model, plan)
    bases = [{id(model.get_submodule(name).in_basis) for name in group} for group in alike + alone]
    assert [len(group) for group in bases] == [1] * 8
    assert len(set.union(*bases)) == 8


@pytest.mark.parametrize("room", [1, 3, 12])
def test_several_passes_find_what_one_finds(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, and what is one factor in one pass is one factor in several, wherever they are cut."""
    model, batches = tiny("llama"), [{"input_ids": ids_of(3, 6, seed), "attention_mask": RIGHT} for seed in (0, 1)]
    whole = measured(model, batches)
    layers = planned(model)
    needed = {name: wanted.nbytes() for name, wanted in everything(layers).items()}
    assert needed["model.layers.0.self_attn.k_proj"] == 8 * (32**2 + 16**2)
    monkeypatch.setattr("lorica.subspace.observe.MOMENT_BYTES", room * 8 * 32**2)
    assert len(list(within_memory(needed))) > 2
    parts = measured(model, batches)
    for name, factors in whole.items():
        for side in ("inputs", "outputs"):
            assert getattr(factors, side).same_as(getattr(parts[name], side))
    assert number_of_factors(parts) == number_of_factors(whole) < 2 * len(whole)


def number_of_factors(found: Mapping[str, Factors]) -> int:
    return len({id(side) for factors in found.values() for side in (factors.inputs, factors.outputs)})


# --- what finished tasks were ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("widest", [4096, 16], ids=["whole", "sketch"])
def test_each_finished_task_counts_as_much_as_the_calibration(widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorica.subspace.moment.WIDEST", widest)
    torch.manual_seed(0)
    model = Bottleneck(200, 3)
    layers, batches = {"wide": model.wide}, [{"x": matrix(50, 200, 1, torch.float64)}]
    past = Factor.of(mean_square(list(matrix(30, 200, 9, torch.float64))), 12)
    past = past.scaled(2 / past.trace)
    wanted = {"wide": Wanted((3, 200), inputs=10)}
    factor = measure(model, layers, batches, wanted, earlier={"wide": Factors(inputs=past)})["wide"].inputs
    assert factor is not None
    a = mean_square(list(batches[0]["x"]))
    both = (a + a.trace() * past.matrix()) / 3
    assert factor.vectors_DR.shape == (200, 10)
    assert factor.trace == pytest.approx(float(a.trace())), "two tasks more cost nothing more"
    best = float(torch.linalg.eigvalsh(both).flip(0)[:10].sum())
    held = float((factor.vectors_DR.T @ both @ factor.vectors_DR).trace())
    assert held >= (1 - 1e-9 if widest > 200 else 0.97) * best
    assert float((past.vectors_DR[:, :3].T @ factor.vectors_DR).norm()) > 1.5, "the past is in it"


class Bottleneck(nn.Module):
    def __init__(self, wide: int, out: int) -> None:
        super().__init__()
        self.wide = nn.Linear(wide, out, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x)


def test_what_belongs_to_another_model_is_refused() -> None:
    earlier = {"wide": Factors(inputs=Factor.of(torch.eye(7)))}
    model = Bottleneck(6, 3)
    with pytest.raises(LoricaError, match=r"^wide has a side of 6, .* has 7: it belongs to another model"):
        measure(model, {"wide": model.wide}, [{"x": torch.ones(2, 6, dtype=torch.float64)}],
                {"wide": Wanted((3, 6), inputs=2)}, earlier=earlier)  # fmt: skip


# --- wide sides -----------------------------------------------------------------------------------------------------


def falling(dim: int, fall: float, seed: int = 0) -> Tensor:
    """Return a second moment with energies ``1, 2^-fall, 3^-fall, ...``."""
    rotation = torch.linalg.qr(matrix(dim, dim, seed, torch.float64))[0]
    return rotation * torch.arange(1, dim + 1, dtype=torch.float64).pow(-fall) @ rotation.T


@pytest.mark.parametrize(("fall", "share"), [(1.0, 0.95), (1.5, 0.99), (3.0, 0.9999)])
@pytest.mark.parametrize("rank", [4, 40, 100])
def test_a_sketch_holds_nearly_the_best_energy(
    fall: float, share: float, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorica.subspace.moment.WIDEST", 64)
    a, dim = falling(400, fall), 400
    moment = Moment.empty(dim, rank, torch.device("cpu"), random_basis)
    root = torch.linalg.cholesky(a)
    for rows in root.T.split(100):
        moment.add(rows)
    assert moment.sum.shape == (dim, int(1.5 * rank) + 32), "never a whole second moment of a wide side"
    factor = moment.factor()
    v = factor.vectors_DR
    torch.testing.assert_close(v.T @ v, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    best = float(torch.linalg.eigvalsh(a).flip(0)[:rank].sum())
    assert float((v.T @ a @ v).trace()) >= share * best
    assert float(factor.energies_R.sum()) <= best / 400 * (1 + 1e-9), "never more than there is"
    assert factor.trace <= float(a.trace()) / 400 * (1 + 1e-9)


@pytest.mark.parametrize("rank", [0, 1, 20, 62])
def test_a_sketch_is_exact_up_to_its_size(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorica.subspace.moment.WIDEST", 64)
    x = matrix(200, 150, 3, torch.float64) @ torch.diag(10.0 ** torch.linspace(3, -1, 150, dtype=torch.float64))
    u, sigma, vh = torch.linalg.svd(x, full_matrices=False)
    x = u[:, :rank] * sigma[:rank] @ vh[:rank]
    moment = Moment.empty(150, 20, torch.device("cpu"), random_basis)
    assert moment.sum.shape == (150, 62)
    moment.add(x)
    factor, exact = moment.factor(), Factor.of(x.T @ x / 200, 20)
    scale = max(float(exact.trace), 1.0)
    assert factor.trace == pytest.approx(exact.trace, abs=1e-10 * scale)
    torch.testing.assert_close(factor.energies_R, exact.energies_R, rtol=0, atol=1e-10 * scale)
    top = min(rank, 20)
    leading = vh[:top].T
    torch.testing.assert_close(factor.directions(20).T @ factor.directions(20), torch.eye(20, dtype=torch.float64))
    assert float((leading - factor.vectors_DR @ (factor.vectors_DR.T @ leading)).norm()) <= 1e-6


def test_a_sketch_of_many_more_columns_than_there_is_rank() -> None:
    """Then the core matrix is singular but for the shift, which must be above its rounding."""
    for dim, size, rank in ((900, 300, 1), (900, 300, 290), (500, 400, 3)):
        x = matrix(rank, dim, rank, torch.float64)
        x[:, :3] *= 1e3
        test = random_basis(dim, size, torch.device("cpu"))
        factor = from_sketch(x.T @ (x @ test), test, float(x.square().sum()), min(rank, 100))
        expected = torch.linalg.svdvals(x).square()[: min(rank, 100)]
        torch.testing.assert_close(factor.energies_R, expected, rtol=0, atol=1e-10 * float(expected[0]))


@pytest.mark.parametrize(
    ("dim", "rank", "size"),
    [(4096, 100, 0), (4097, 100, 182), (14336, 4096, 6176), (14336, 10752, 0), (14336, 0, 32)],
)
def test_which_sides_are_sketched(dim: int, rank: int, size: int) -> None:
    assert sketch_size(dim, rank) == size


def test_layers_of_one_size_share_the_random_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorica.subspace.moment.WIDEST", 16)
    made: list[tuple[int, int]] = []

    def counted(dim: int, size: int, device: torch.device) -> Tensor:
        made.append((dim, size))
        return random_basis(dim, size, device)

    monkeypatch.setattr("lorica.subspace.measure.random_basis", counted)
    model = nn.Sequential(*(nn.Linear(100, 100) for _ in range(3)))
    layers = dict(model.named_children())
    wanted = {name: Wanted((100, 100), inputs=6, outputs=6) for name in layers}
    measure(Named(model), layers, [{"x": matrix(9, 100, seed)} for seed in (1, 2)], wanted)
    assert made == [(100, 41)]


class Named(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.reliability("R17")
def test_the_layer_that_gets_nan_is_named() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(LoricaError, match=r"^model\.layers\.1\.self_attn\.q_proj: the calibration inputs reach it as"):
        measured(model, [{"input_ids": ids_of(2, 5)}])


def test_predictions_that_are_nan_are_told() -> None:
    model = tiny("llama")
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(LoricaError, match="what the model predicts on the calibration inputs is NaN or inf"):
        measured(model, [{"input_ids": ids_of(2, 5)}])


class Idle(nn.Module):
    """One layer that is never used, and one whose output decides nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.vain = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + self.vain(x).detach()


def test_layers_that_are_not_reached_are_told_and_by_what() -> None:
    model, batches = Idle(), [{"x": torch.ones(3, 4)}]
    for name, wanted in (("unused", Wanted((4, 4), inputs=2)), ("unused", Wanted((4, 4), inputs=2, outputs=2))):
        with pytest.raises(LoricaError, match=r"calibration inputs never reached unused \(1 of 1 layers\)"):
            measure(model, {name: model.unused}, batches, {name: wanted})
    layers = {"used": model.used, "vain": model.vain}
    with pytest.raises(LoricaError, match=r"gradients of the model's predictions never reached vain \(1 of 2 layers\)"):
        measure(model, layers, batches, everything(layers))
    with pytest.raises(LoricaError, match="never reached used"):
        measure(model, layers, [], everything(layers))


def test_a_model_without_predictions_is_refused_for_its_gradients_alone() -> None:
    model = tiny("llama").model
    layers = {"q": model.layers[0].self_attn.q_proj}
    batches = [{"input_ids": ids_of(2, 5)}]
    assert measure(model, layers, batches, {"q": Wanted((32, 32), inputs=4)})["q"].inputs is not None
    with pytest.raises(LoricaError, match=r"^LlamaModel predicts nothing \(no logits\)"):
        measure(model, layers, batches, everything(layers))
