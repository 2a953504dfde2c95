"""Remove singular directions, score the model, put the weights back.

Shape suffixes: M output rows, N input columns, S = min(M, N), R removed directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorica.analysis.options import Side
from lorica.constrain.linear import matrix_of
from lorica.evaluation.evaluator import Score
from lorica.evaluation.generate import Progress
from lorica.subspace.ranks import share_to_count


class Removal(NamedTuple):
    """One intervention: in which layer (None: in all at once), which end of the spectrum, what share of it."""

    layer: str | None
    which: Side
    fraction: float


def short_side(weight_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Return all singular values and all singular vectors of the shorter side, largest first, float64.

    Vectors of the other side are not needed to remove directions, and the eigenvectors of the Gram matrix are
    orthonormal to rounding however small the last singular values are.

    Returns:
        ``(sigma_S, vectors_SS)``; of a square weight the right singular vectors.
    """
    w = weight_MN.detach().double()
    scale = w.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    w = w / scale  # the squares of very small or large entries would under- or overflow
    eigenvalues, vectors = torch.linalg.eigh(w @ w.T if w.shape[0] < w.shape[1] else w.T @ w)
    return eigenvalues.flip(0).clamp_min(0).sqrt() * scale, vectors.flip(1)


def without(weight_MN: Tensor, vectors_SR: Tensor) -> Tensor:
    """Return the weight with the singular values of some directions set to zero, float64.

        W - W P        or        W - P W        P = R R^T

    the first if the directions are those of the inputs (M >= N), the second if of the outputs.
    """
    w, r = weight_MN.double(), vectors_SR.double()
    return w - r @ (r.T @ w) if w.shape[0] < w.shape[1] else w - (w @ r) @ r.T


class Interventions:
    """The singular directions of a model's layers, and the removal of some of them for a while.

    Memory: the vectors take at most as much as the weights, in float32; a removal keeps a copy of the weights.

    Args:
        layers: ``nn.Linear`` or ``Conv1D`` by name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = dict(layers)
        self._sigma: dict[str, Tensor] = {}
        self._vectors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            weight = matrix_of(layer)
            self._sigma[name], vectors = short_side(weight)
            self._vectors[name] = vectors.to(torch.promote_types(weight.dtype, torch.float32))

    def chosen(self, name: str, removal: Removal) -> slice:
        """Return which directions of a layer a removal takes: at least one of them."""
        size = len(self._sigma[name])
        count = max(1, share_to_count(removal.fraction, size))
        return slice(0, count) if removal.which == "top" else slice(size - count, size)

    def size(self, removal: Removal) -> dict[str, Any]:
        """Return what a removal takes away: ``directions``, how many; ``squared_share``, of the squared spectra."""
        names = self._names(removal)
        parts = [self._sigma[name][self.chosen(name, removal)] for name in names]
        taken = sum(part.square().sum().item() for part in parts)
        total = sum(self._sigma[name].square().sum().item() for name in names)
        return {"directions": sum(map(len, parts)), "squared_share": taken / total if total else None}

    @contextmanager
    def removed(self, removal: Removal) -> Iterator[None]:
        """Work in here with a model that lacks some directions. Afterwards every bit of its weights is as before."""
        weights = {name: matrix_of(self.layers[name]).detach() for name in self._names(removal)}
        before = {name: weight.clone() for name, weight in weights.items()}
        try:
            for name, weight in weights.items():
                weight.copy_(without(weight, self._vectors[name][:, self.chosen(name, removal)]))
            yield
        finally:
            for name, weight in weights.items():
                weight.copy_(before[name])

    def _names(self, removal: Removal) -> list[str]:
        return list(self.layers) if removal.layer is None else [removal.layer]


def removals(
    layers: Iterable[str], fractions: Sequence[float], which: Sequence[Side], *, per_layer: bool
) -> list[Removal]:
    """Return what is to be tried: every end and fraction in all layers at once, then in one layer at a time."""
    places = [None, *layers] if per_layer else [None]
    return [Removal(place, side, fraction) for place in places for side in which for fraction in fractions]


def score_removals(
    interventions: Interventions,
    wanted: Sequence[Removal],
    score: Callable[[], Score],
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Score the model under every removal, one after the other.

    Returns:
        One row each: the removal's fields, its size, and what ``score`` returned.
    """
    rows = []
    for done, removal in enumerate(wanted, start=1):
        with interventions.removed(removal):
            scores = score()
        rows.append(removal._asdict() | interventions.size(removal) | scores)
        if progress is not None:
            progress(removal.layer or "all layers", done, len(wanted))
    return rows
