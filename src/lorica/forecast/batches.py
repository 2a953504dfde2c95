"""The batches of a run: the largest, for memory; the mean one, for time; and how many there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from lorica.config import UpdateConfig
from lorica.data.encoder import Encoded
from lorica.forecast.dry_run import Batch
from lorica.inputs import Inputs, asked_of
from lorica.methods.own_texts import Extent, extent_of
from lorica.training.models import load_tokenizer, position_limit


@dataclass(frozen=True)
class Batches:
    """What passes through the model.

    Attributes:
        worst: the largest micro-batch there can be.
        mean: of the mean length after padding, or of the mean length where rows lie end to end.
        steps: of the whole run; None where neither data nor max_steps tells.
        scored: the largest batch of the rows that are scored before and after; None where none are.
        notes: what was assumed.
        prompt: tokens of the longest prompt that the model is to answer; 0: there is none.
        extent: of the rows; None where there is no data, or nothing is rehearsed.
    """

    worst: Batch
    mean: Batch
    steps: int | None
    scored: Batch | None
    notes: list[str]
    prompt: int = 0
    extent: Extent | None = None


def batches_of(
    settings: UpdateConfig,
    arguments: TrainingArguments,
    model_config: Any,
    inputs: Inputs | None = None,
    longest: int = 0,
) -> Batches:
    """Return the batches of a run: of its data, read and checked as the run does, else of the longest rows allowed.

    Args:
        longest: see ``extent_of``.

    Raises:
        LoricaError: something is wrong with the data.
    """
    limit, seq2seq = position_limit(model_config), bool(model_config.is_encoder_decoder)
    most = arguments.max_steps if arguments.max_steps > 0 else None
    size = arguments.per_device_train_batch_size
    if inputs is None and settings.source_of_rows:
        inputs = Inputs(settings, load_tokenizer(settings), seq2seq=seq2seq, position_limit=limit)
    if inputs is None:
        length = min(settings.max_length, limit or settings.max_length)
        prompts = asked_of(settings, seq2seq=seq2seq, max_length=length)
        whole = Batch(size, length, length if seq2seq else None)
        whole = _flat(settings, size * length) if settings.padding_free else whole
        note = f"no data given: every batch is taken to be {size} rows of {length} tokens"
        return Batches(whole, whole, most, None, [note], _longest(prompts))
    rows = inputs.train.examples
    size = min(size, len(rows))
    if settings.padding_free:
        lengths = sorted((len(row.input_ids) for row in rows), reverse=True)
        worst, mean = _flat(settings, sum(lengths[:size])), _flat(settings, size * sum(lengths) / len(rows))
    else:
        worst, mean = _largest(rows, size, seq2seq), _mean_padded(rows, size, seq2seq, arguments.seed)
    per_epoch = math.ceil(math.ceil(len(rows) / size) / arguments.gradient_accumulation_steps)
    held_out = [row for data in (inputs.eval, *inputs.retention.values()) if data for row in data.examples]
    return Batches(
        worst=worst,
        mean=mean,
        steps=most or math.ceil(per_epoch * arguments.num_train_epochs),
        scored=_largest(held_out, arguments.per_device_eval_batch_size, seq2seq) if held_out else None,
        notes=[],
        prompt=_longest(inputs.prompts),
        extent=extent_of(inputs.train, longest) if settings.rehearse else None,
    )


def _longest(prompts: Sequence[Sequence[int]] | None) -> int:
    return max(map(len, prompts or []), default=0)


def _flat(settings: UpdateConfig, tokens: float) -> Batch:
    """Return a micro-batch of rows that lie end to end; FlashAttention needs no mask to keep them apart."""
    return Batch(1, math.ceil(tokens), masked=not (settings.attn_implementation or "").startswith("flash"))


def _largest(rows: Sequence[Encoded], size: int, seq2seq: bool) -> Batch:
    labels = max(len(row.labels) for row in rows) if seq2seq else None
    return Batch(min(size, len(rows)), max(len(row.input_ids) for row in rows), labels)


def _mean_padded(rows: Sequence[Encoded], size: int, seq2seq: bool, seed: int) -> Batch:
    """Return the batch of the mean length of inputs and of labels after padding, over one shuffled epoch."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    batches = [[rows[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
    inputs = [max(len(row.input_ids) for row in batch) for batch in batches]
    labels = [max(len(row.labels) for row in batch) for batch in batches]
    mean_labels = math.ceil(sum(labels) / len(labels)) if seq2seq else None
    return Batch(size, math.ceil(sum(inputs) / len(inputs)), mean_labels)
