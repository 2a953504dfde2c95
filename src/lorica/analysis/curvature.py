"""Whether the loss is flat along the small singular directions: curvature, and its rank correlation with size.

Shape suffixes: M output rows, N input columns, S = min(M, N).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lorica.constrain.linear import WRAPPERS, matrix_of
from lorica.data.example import IGNORED_LABEL
from lorica.evaluation.generate import Progress
from lorica.subspace.calibration import Batch
from lorica.subspace.linalg import Split, split

LARGEST_MODEL = 200_000_000
"""Parameters of the largest model whose curvature is measured: both bases and a gradient of every weight are held."""


def curvatures(
    model: nn.Module, layers: Mapping[str, nn.Module], rows: Sequence[Batch], progress: Progress | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the singular values of each layer and the curvature of the loss along each singular direction.

        c_i = E[(u_i^T G v_i)^2]        G = d(-log p(answer | prompt)) / dW of one row

    That is the diagonal of the empirical Fisher matrix for the change ``W + t u_i v_i^T``: the mean over rows of the
    squared gradient of each row by itself (the square of a batch's mean gradient would be another quantity). The
    answers are those given, the loss is the sum over a row's trained tokens, in nats.

    Args:
        model: put in evaluation mode for this and back afterwards. Its gradients are not touched.
        layers: ``nn.Linear`` or ``Conv1D`` by name, with weights that require gradients.
        rows: batches of one row each, with labels.
        progress: told of every row.

    Returns:
        ``{name: (sigma_S, c_S)}``, both float64, largest singular value first.
    """
    parts = {name: _narrowed(layer) for name, layer in layers.items()}
    weights = [layer.get_parameter("weight") for layer in layers.values()]
    total = {name: torch.zeros_like(part.sigma_S) for name, part in parts.items()}
    training = model.training
    model.eval()
    try:
        for done, row in enumerate(rows, start=1):
            gradients = torch.autograd.grad(_row_loss(model, row), weights, materialize_grads=True)
            for (name, layer), gradient in zip(layers.items(), gradients, strict=True):
                g_MN = gradient.T if WRAPPERS[type(layer)].transposed else gradient
                total[name] += _along(g_MN, parts[name]).double().square()
            if progress is not None:
                progress("curvature", done, len(rows))
    finally:
        model.train(training)
    return {name: (part.sigma_S, total[name] / len(rows)) for name, part in parts.items()}


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float | None:
    """Return the rank correlation of two lists in [-1, 1], ties given their mean rank.

    The correlation coefficient of the ranks. None where one of the lists is constant, so that it has no order.
    """
    x, y = (_centred_ranks(np.asarray(values, dtype=float)) for values in (a, b))
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else None


def _centred_ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: npt.NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks - ranks.mean()


def _narrowed(layer: nn.Module) -> Split:
    """Return all singular triplets of a layer, the vectors in the dtype that gradients are multiplied in."""
    weight = matrix_of(layer)
    part = split(weight, min(weight.shape))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return Split(part.u_MK.to(dtype), part.sigma_S, part.v_NK.to(dtype))


def _along(g_MN: Tensor, part: Split) -> Tensor:
    """Return ``u_i^T G v_i`` for every i."""
    return ((g_MN.to(part.v_NK.dtype) @ part.v_NK) * part.u_MK).sum(0)


def _row_loss(model: Any, row: Batch) -> Tensor:
    inputs = {key: value.to(model.device) for key, value in row.items()}
    labels = inputs["labels"] if model.config.is_encoder_decoder else inputs["labels"][:, 1:]
    loss: Tensor = model(**inputs).loss
    return loss * (labels != IGNORED_LABEL).sum()
