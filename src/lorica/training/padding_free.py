"""Models that take rows laid end to end: which of them keep the rows apart is tried, not looked up."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from lorica.data.collate import FlatCollator
from lorica.errors import LoricaError
from lorica.processes import reshard

PROBE = ([1, 2, 3, 4, 5], [6, 7, 8])
"""Token ids of the rows that are tried; a smaller vocabulary wraps around."""

TOLERANCE = 0.05
"""How far the logits of a row may be from those of the row alone, as a share of their length: rounding in bfloat16."""


def flat_collator(model: Any) -> FlatCollator:
    """Return the collator that lays rows end to end for a model, with what its attention wants to know."""
    return FlatCollator(boundaries="flash" in (model.config._attn_implementation or ""))


def check_keeps_rows_apart(model: Any) -> None:
    """Try on a plain model whether a row that lies behind another is what it is alone.

    Nothing may come from the first row to the second: the gradient of the second row's logits with respect to the
    embeddings of the first is exactly 0, since attention outside of a row is. And the positions begin anew: the
    logits are those of the row alone.

    Args:
        model: with its weights, on its device. Parameters, gradients, mode and random states stay as they are.

    Raises:
        LoricaError: the model takes no positions, or does not keep the rows apart.
    """
    kind = type(model).__name__
    refused = f"--padding_free: {kind} {{}}, so rows laid end to end would change what is learned; leave it out"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise LoricaError(refused.format("takes no position_ids"))
    training = model.training
    crossing, difference = _tried(model.eval())
    model.train(training)
    reshard(model)
    if crossing > 0:
        raise LoricaError(refused.format("lets a row see the one before it"))
    if not difference <= TOLERANCE:
        raise LoricaError(refused.format("does not begin the positions of each row anew"))


def _tried(model: Any) -> tuple[float, float]:
    """Return what reaches the second row from the first, and how far its logits are from those of the row alone."""
    embedded: list[Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: embedded.append(output.requires_grad_())
    )
    start = len(PROBE[0])
    try:
        behind = _logits(model, PROBE)[:, start:]
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(behind.float().square().sum(), embedded[0])
    behind = behind.detach()
    with torch.no_grad():
        alone = _logits(model, PROBE[1:])
    difference = torch.linalg.vector_norm((behind - alone).float()) / torch.linalg.vector_norm(alone.float())
    return float(gradient[:, :start].abs().max()), float(difference)


def _logits(model: Any, rows: tuple[list[int], ...]) -> Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    wrapped = [[token % vocabulary for token in row] for row in rows]
    batch = flat_collator(model)([{"input_ids": row, "labels": row} for row in wrapped])
    inputs = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    logits: Tensor = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return logits
