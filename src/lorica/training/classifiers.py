"""Sequence classifiers: an encoder with one class for each answer that a stream's tasks allow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from lorica.errors import LoricaError
from lorica.training.models import read_configuration, read_weights, writes_text


def read_any_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[Any, bool]:
    """Return a model's configuration and whether it is to be trained as a sequence classifier.

    A model that writes text is never one; a masked language model, a bare encoder or a classifier is.

    Raises:
        LoricaError: it cannot be found or read, or can do neither.
    """
    found = read_configuration(name, revision=revision, trust_remote_code=trust_remote_code)
    if writes_text(found, trust_remote_code=trust_remote_code):
        return found, False
    if found.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise LoricaError(f"{name} is a {found.model_type}, which neither writes text nor classifies it")
    return found, True


def read_classifier(
    name: str,
    labels: Sequence[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    allow_pickle: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[Any, list[str]]:
    """Return a model with one class for each label, and patterns of the parameters that must train for it to learn.

    These are what the folder has no weights for, and with any part of it the whole classification head: new and
    random, they would stay random where they were frozen. A folder that is already a classifier of just these labels
    keeps its head, which trains where a method is told so (``train_also``), as everything outside the blocks.

    Raises:
        LoricaError: the model cannot be loaded, or its head is of other labels and just as many.
    """
    numbers = {label: index for index, label in enumerate(labels)}
    own = read_configuration(name, revision=revision, trust_remote_code=trust_remote_code)
    _check_head(own, name, numbers)
    model, loading = read_weights(
        AutoModelForSequenceClassification, name, revision, trust_remote_code, dtype=dtype,
        attn_implementation=attn_implementation, allow_pickle=allow_pickle, num_labels=len(labels), label2id=numbers,
        id2label={index: label for label, index in numbers.items()}, ignore_mismatched_sizes=True,
    )  # fmt: skip
    inside = f"{model.base_model_prefix}."
    head = {key for key, _ in model.named_parameters() if not key.startswith(inside)}
    new = set(loading["missing_keys"]) | {key for key, *_ in loading["mismatched_keys"]}
    new |= head if new & head else set()
    return model.to(device), [f"^{re.escape(key)}$" for key in sorted(new)]


def _check_head(config: Any, name: str, numbers: dict[str, int]) -> None:
    """Refuse a head that would be kept for its size although its classes mean something else."""
    architecture = (config.architectures or [""])[0]
    kept = architecture.endswith("ForSequenceClassification") and config.num_labels == len(numbers)
    if kept and config.label2id != numbers:
        raise LoricaError(
            f"{name} classifies into {', '.join(config.label2id)}, and the stream's choices are {', '.join(numbers)}; "
            "give the model without its head (the one it was made from)"
        )
