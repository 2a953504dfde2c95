"""Curvature against one backward pass per row and numpy's SVD; ranks against hand-computed ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorica.analysis.curvature import curvatures, spearman
from lorica.constrain.targets import find_targets
from tests.builders import tiny

LABELS = {"a": [-100, -100, 4, 9], "b": [-100, 8, 30, 31, 1], "c": [-100, 60]}


def row(labels: list[int], seq2seq: bool) -> dict[str, torch.Tensor]:
    ids = [7, 11] if seq2seq else [3 if label < 0 else label for label in labels]
    kept = [label for label in labels if label >= 0] if seq2seq else labels
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([kept])}


def log_likelihood(model: Any, one: dict[str, torch.Tensor], seq2seq: bool) -> torch.Tensor:
    """Return log p(answer | prompt), from the logits."""
    labels = one["labels"][0]
    logits = model(**one).logits[0]
    if not seq2seq:
        logits, labels = logits[:-1], labels[1:]
    picked = logits.log_softmax(-1)[torch.arange(len(labels)), labels.clamp_min(0)]
    return picked[labels >= 0].sum()


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_curvature_is_the_mean_square_of_each_rows_own_gradient(name: str) -> None:
    model: Any = tiny(name)
    seq2seq = model.config.is_encoder_decoder
    batches = [row(labels, seq2seq) for labels in LABELS.values()]
    layers = dict(list(find_targets(model).items())[::3])
    found = curvatures(model, layers, batches)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    expected: dict[str, list[np.ndarray]] = {layer: [] for layer in layers}
    for one in batches:
        model.zero_grad()
        log_likelihood(model, one, seq2seq).backward()
        for layer, module in layers.items():
            w, g = (x.detach().double().numpy() for x in (module.weight, module.weight.grad))
            w, g = (w.T, g.T) if name == "gpt2" else (w, g)
            u, _, vh = np.linalg.svd(w, full_matrices=False)
            expected[layer].append(np.einsum("mi,mn,in->i", u, g, vh) ** 2)
    for layer, (sigma, curvature) in found.items():
        reference = np.mean(expected[layer], axis=0)
        assert curvature.numpy() == pytest.approx(reference, rel=1e-3, abs=1e-6 * reference.max())
        w = layers[layer].weight.detach().double().numpy()
        assert sigma.numpy() == pytest.approx(np.linalg.svd(w, compute_uv=False))


def test_rows_are_not_averaged_before_squaring() -> None:
    model: Any = tiny("llama")
    layers = dict(list(find_targets(model).items())[:1])
    batches = [row(labels, False) for labels in LABELS.values()]
    single = [curvatures(model, layers, [one]) for one in batches]
    (name,) = layers
    together = curvatures(model, layers, batches)[name][1]
    assert torch.allclose(together, torch.stack([one[name][1] for one in single]).mean(0), rtol=1e-6)


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3], [10, 20, 400]) == pytest.approx(1)
    assert spearman([1, 2, 3], [0.3, 0.2, 0.1]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5, variances 4.5 and 5
    assert spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) without ties: d = 1, 1, 0, 1, 1
    assert spearman([1, 2, 3, 4, 5], [2, 1, 3, 5, 4]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([4], [7]) is None


numbers = st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=2, max_size=20)


@given(numbers)
def test_spearman_knows_order_alone(pairs: list[tuple[int, int]]) -> None:
    a, b = (np.array(values, dtype=float) for values in zip(*pairs, strict=True))
    found = spearman(a, b)
    if found is None:
        assert len(set(a)) == 1 or len(set(b)) == 1
        return
    assert -1 - 1e-12 <= found <= 1 + 1e-12
    assert spearman(b, a) == pytest.approx(found)
    assert spearman(np.exp(a / 10), b**3) == pytest.approx(found)
    assert spearman(-a, b) == pytest.approx(-found)
