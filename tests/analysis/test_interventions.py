"""Removed directions against a full SVD, and weights that come back bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorica.analysis.interventions import Interventions, Removal, removals, score_removals, short_side, without
from lorica.analysis.options import Side
from tests.builders import SHAPES, matrix


def truncated(weight: torch.Tensor, gone: slice) -> np.ndarray:
    """Return the weight with some singular values set to zero, by numpy's SVD."""
    u, s, vh = np.linalg.svd(weight.detach().double().numpy(), full_matrices=False)
    s[gone] = 0
    return (u * s) @ vh


def linear(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(n, m, dtype=dtype)
    layer.weight.data.copy_(matrix(m, n, seed=seed))
    return layer


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_removal_sets_singular_values_to_zero(shape: tuple[int, int]) -> None:
    weight = matrix(*shape).double()
    sigma, vectors = short_side(weight)
    assert sigma.numpy() == pytest.approx(np.linalg.svd(weight.numpy(), compute_uv=False))
    for gone in (slice(0, 1), slice(len(sigma) // 2, len(sigma))):
        assert without(weight, vectors[:, gone]).numpy() == pytest.approx(truncated(weight, gone), abs=1e-12)


@pytest.mark.parametrize("which", ["top", "bottom"])
@pytest.mark.parametrize(("fraction", "count"), [(0.001, 1), (0.25, 4), (0.3, 4), (0.5, 8)])
def test_a_fraction_is_rounded_down_but_never_to_nothing(which: Side, fraction: float, count: int) -> None:
    layer = linear(16, 24)
    interventions = Interventions({"layer": layer})
    removal = Removal(None, which, fraction)
    gone = slice(0, count) if which == "top" else slice(16 - count, 16)
    expected = truncated(layer.weight, gone)
    sigma = np.linalg.svd(layer.weight.detach().double().numpy(), compute_uv=False)
    with interventions.removed(removal):
        assert layer.weight.detach().numpy() == pytest.approx(expected, abs=1e-6)
    share = (sigma[gone] ** 2).sum() / (sigma**2).sum()
    assert interventions.size(removal) == {"directions": count, "squared_share": pytest.approx(share)}


def test_a_transposed_layer_loses_the_same_directions() -> None:
    plain, conv = linear(20, 12), Conv1D(20, 12)
    conv.weight.data.copy_(plain.weight.data.T)
    removal = Removal(None, "top", 0.25)
    with Interventions({"plain": plain}).removed(removal), Interventions({"conv": conv}).removed(removal):
        assert torch.equal(conv.weight.T, plain.weight)
        assert plain.weight.detach().numpy() == pytest.approx(truncated(matrix(20, 12), slice(0, 3)), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_comes_back_even_after_an_error(dtype: torch.dtype) -> None:
    layers = {"a": linear(9, 5, 1, dtype), "b": linear(5, 9, 2, dtype)}
    layers["a"].weight.data[0, 0] = -0.0
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    storage = layers["a"].weight.data_ptr()
    interventions = Interventions(layers)

    def fail() -> None:
        with interventions.removed(Removal(None, "bottom", 0.5)):
            assert not torch.equal(layers["a"].weight, before["a"])
            assert layers["a"].weight.dtype == dtype
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    bits = torch.int64 if dtype == torch.float64 else torch.int32 if dtype == torch.float32 else torch.int16
    for name, layer in layers.items():
        assert torch.equal(layer.weight.detach().view(bits), before[name].view(bits))
    assert layers["a"].weight.data_ptr() == storage
    assert layers["a"].weight.requires_grad


def test_one_layer_at_a_time() -> None:
    layers = {"a": linear(6, 6, 1), "b": linear(6, 6, 2)}
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    with Interventions(layers).removed(Removal("b", "top", 0.5)):
        assert torch.equal(layers["a"].weight, before["a"])
        assert not torch.equal(layers["b"].weight, before["b"])


def test_what_is_tried() -> None:
    assert removals(["a", "b"], [0.1, 0.5], ["bottom"], per_layer=False) == [
        (None, "bottom", 0.1), (None, "bottom", 0.5)
    ]  # fmt: skip
    found = removals(["a", "b"], [0.1, 0.5], ["top", "bottom"], per_layer=True)
    assert len(found) == len(set(found)) == 3 * 2 * 2


def test_each_row_holds_the_score_of_its_own_removal() -> None:
    layers = {"a": linear(6, 6, 1), "b": linear(6, 6, 2)}
    told: list[tuple[str, int, int]] = []
    wanted = removals(layers, [0.5], ["top", "bottom"], per_layer=True)

    def score() -> dict[str, float]:
        return {"loss": sum(layer.weight.detach().square().sum().item() for layer in layers.values())}

    rows = score_removals(Interventions(layers), wanted, score, lambda *what: told.append(what))
    energy = {name: layer.weight.detach().square().sum().item() for name, layer in layers.items()}
    for row in rows:
        touched = sum(energy[name] for name in energy if row["layer"] in (None, name))
        assert row["loss"] == pytest.approx(sum(energy.values()) - row["squared_share"] * touched, rel=1e-5)
    assert [row["directions"] for row in rows] == [6, 6, 3, 3, 3, 3]
    assert told[0] == ("all layers", 1, 6)
    assert told[-1] == ("b", 6, 6)
