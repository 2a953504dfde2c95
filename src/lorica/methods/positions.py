"""Where in a batch a model is trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lorica.data.example import IGNORED_LABEL


def trained_positions(model: Any, labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (tokens, vocabulary) that a batch has a loss on, and their labels (tokens).

    A causal model's logits predict the next label; an encoder-decoder's and a classifier's stand where their
    label does.

    Args:
        model: gives the architecture.
        labels: (rows, length), or (rows,) of a classifier; -100 where there is no loss.
        logits: (rows, length, vocabulary), or (rows, classes).
    """
    if labels.dim() == 2 and not model.config.is_encoder_decoder:
        labels, logits = labels[:, 1:], logits[:, :-1]
    trained = labels != IGNORED_LABEL
    return logits[trained], labels[trained]
