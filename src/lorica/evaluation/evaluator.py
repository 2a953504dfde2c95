"""The score of a model on a file of rows: loss on the answers, and exact match where there are answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorica.data.collate import Collator
from lorica.data.dataset import EncodedDataset
from lorica.evaluation.generate import batches_by_length, greedy_answers

Score = dict[str, float | int | None]


def evaluate(model: nn.Module, dataset: EncodedDataset, tokenizer: Any, *, batch_size: int = 16) -> Score:
    """Return the scores of a model on a dataset; its mode and the random state are as before.

    Returns:
        ``loss``: mean over the trained tokens of all rows, nats. ``exact_match``: percent of the rows with
        an answer for which greedy generation, blanks at both ends aside, writes that answer; None without
        such rows. ``rows``, ``answers``: how many rows, and rows with an answer, were scored.
    """
    training = model.training
    model.eval()
    try:
        loss = mean_loss(model, dataset, tokenizer, batch_size=batch_size)
        match, answers = exact_match(model, dataset, tokenizer, batch_size=batch_size)
    finally:
        model.train(training)
    return {"loss": loss, "exact_match": match, "rows": len(dataset), "answers": answers}


@torch.no_grad()
def mean_loss(model: nn.Module, dataset: EncodedDataset, tokenizer: Any, *, batch_size: int) -> float:
    """Return the cross-entropy per trained token over a whole dataset, every token weighted equally."""
    seq2seq = bool(model.config.is_encoder_decoder)  # type: ignore[union-attr]
    collate = Collator(tokenizer, seq2seq=seq2seq)
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    for indices in batches_by_length([len(row.input_ids) for row in dataset.examples], batch_size):
        batch = {key: value.to(device) for key, value in collate([dataset[index] for index in indices]).items()}
        labels = batch["labels"] if seq2seq else batch["labels"][:, 1:]
        count = int((labels != -100).sum())
        total += model(**batch).loss.item() * count
        tokens += count
    return total / tokens


def exact_match(
    model: nn.Module, dataset: EncodedDataset, tokenizer: Any, *, batch_size: int
) -> tuple[float | None, int]:
    """Return the percentage of answers that greedy generation writes exactly, and how many answers there are."""
    asked = [row for row in dataset.examples if row.answer is not None]
    if not asked:
        return None, 0
    longest = max(len(tokenizer(row.answer, add_special_tokens=False)["input_ids"]) for row in asked)
    prompts = [row.prompt_ids or [] for row in asked]
    # One token more than the longest answer: whatever has not ended by then is no exact match.
    written = greedy_answers(model, tokenizer, prompts, max_new_tokens=longest + 1, batch_size=batch_size)
    right = sum(text.strip() == (row.answer or "").strip() for text, row in zip(written, asked, strict=True))
    return 100.0 * right / len(asked), len(asked)
