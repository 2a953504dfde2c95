"""The score of a model on a file of rows: loss on the answers, and exact match where there are answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lorica.data.collate import Collator
from lorica.data.dataset import EncodedDataset
from lorica.data.encoder import Encoded
from lorica.data.example import IGNORED_LABEL
from lorica.data.parts import in_parts
from lorica.data.tokens import Codec
from lorica.evaluation.generate import Progress, batch_count, batches_by_length, counting, greedy_answers
from lorica.processes import in_step, reshard, together

Score = dict[str, float | int | None]


def evaluate(
    model: nn.Module,
    dataset: EncodedDataset,
    tokenizer: Any,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Score:
    """Return the scores of a model on a dataset; its mode and the random state are as before.

    Args:
        progress: told of every batch, those of the loss and those of the generation counted together.

    Returns:
        ``loss``: mean over the trained tokens of all rows, nats. ``exact_match``: see there; None without rows
        that have an answer. ``rows``, ``answers``: how many rows, and rows with an answer, were scored.
    """
    asked = sum(row.answer is not None for row in dataset.examples)
    first, second = batch_count(len(dataset), batch_size), batch_count(asked, batch_size)
    training = model.training
    model.eval()
    try:
        part = _part(progress, 0, first + second)
        loss = mean_loss(model, dataset, tokenizer, batch_size=batch_size, progress=part)
        part = _part(progress, first, first + second)
        match, answers = exact_match(model, dataset, tokenizer, batch_size=batch_size, progress=part)
    finally:
        model.train(training)
    reshard(model)
    return {"loss": loss, "exact_match": match, "rows": len(dataset), "answers": answers}


@torch.no_grad()
def mean_loss(
    model: nn.Module, dataset: EncodedDataset, tokenizer: Any, *, batch_size: int, progress: Progress | None = None
) -> float:
    """Return the cross-entropy per trained token over a whole dataset, every token weighted equally."""
    seq2seq = bool(model.config.is_encoder_decoder)  # type: ignore[union-attr]
    collate = Collator(tokenizer, seq2seq=seq2seq)
    device = next(model.parameters()).device
    lengths = [len(row.input_ids) for row in dataset.examples]

    def one_pass(indices: Sequence[int]) -> list[tuple[float, int]]:
        batch = {key: value.to(device) for key, value in collate([dataset[index] for index in indices]).items()}
        count = int((batch["labels"] if seq2seq else batch["labels"][:, 1:]).ne(IGNORED_LABEL).sum())
        return [(model(**batch).loss.item() * count, count)]

    tell = counting(progress, "loss", batch_count(len(lengths), batch_size))

    def one_batch(indices: Sequence[int]) -> list[tuple[float, int]]:
        sums = in_parts(one_pass, indices, in_step=in_step(model))
        tell()
        return sums

    batches = together(batches_by_length(lengths, batch_size), one_batch, in_step=in_step(model))
    sums = [pair for pairs in batches for pair in pairs]
    return sum(total for total, _ in sums) / sum(tokens for _, tokens in sums)


def exact_match(
    model: nn.Module, dataset: EncodedDataset, tokenizer: Any, *, batch_size: int, progress: Progress | None = None
) -> tuple[float | None, int]:
    """Return the percentage of answers that greedy generation writes exactly, and how many answers there are.

    An answer counts where the model writes it, blanks at both ends aside, and ends there. Generation goes on for
    one token more than the longest answer of a batch: what has not ended by then is no match.
    """
    asked = [row for row in dataset.examples if row.answer is not None]
    if not asked:
        return None, 0
    codec = Codec(tokenizer)
    written = greedy_answers(
        model,
        tokenizer,
        [row.prompt_ids or [] for row in asked],
        max_new_tokens=[answer_length(row, codec) + 1 for row in asked],
        batch_size=batch_size,
        progress=progress,
    )
    right = sum(
        one.ended and one.text.strip() == (row.answer or "").strip() for one, row in zip(written, asked, strict=True)
    )
    return 100.0 * right / len(asked), len(asked)


def answer_length(row: Encoded, codec: Codec) -> int:
    """Return the tokens of an answer, its end aside, in the longest way a row may spell it.

    Many tokenizers spell a word in the middle of a text with other tokens than by itself, and a chat template may
    add some of its own; what the row holds behind its prompt counts these, unless the row was cut.
    """
    answer = row.answer or ""
    held = len(row.input_ids) - len(row.prompt_ids or []) - 1
    return max(held, len(codec.plain(answer)), len(codec.continuation(answer)))


def _part(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return a callback for one part of the work, which counts on from the parts before it."""
    if progress is None:
        return None
    return lambda name, done, _: progress(name, before + done, total)
