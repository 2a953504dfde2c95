"""What a model answers to prompts by itself: calibration inputs that need prompts, and no answer to them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lorica.errors import LoricaError
from lorica.subspace.calibration import (
    LENGTH,
    TOKENS,
    WRITING,
    Progress,
    decodes,
    end_tokens,
    evaluating,
    generates,
    own_random,
    sampling,
    until_end,
    written_together,
)
from lorica.subspace.observe import IGNORED_LABEL

ROUNDS = 16
"""How often each prompt is answered at most: more answers to a few prompts say little more."""


def room_for_answer(limit: int) -> int:
    """Return how many tokens a prompt has to leave to its answer, where they may have ``limit`` together."""
    return min(LENGTH, limit // 2)


@torch.no_grad()
def own_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int = TOKENS,
    length: int = LENGTH,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Tensor]]:
    """Return batches of prompts with the answers that a model writes by itself: what it does when it is asked.

    Each answer is sampled from the model's own distribution, temperature 1, nothing cut off, as ``own_text`` is, up to
    and with the token that ends it or ``length`` tokens. The prompts come in random order, and again in another
    one for other answers, ``ROUNDS`` times at most. The random state of the process, the model's mode and its
    configuration are as before.

    Args:
        model: causal, or an encoder-decoder.
        prompts: token ids of each, one or more; what the model has positions for, with an answer behind.
        tokens: sample until the answers hold so many together.
        length: tokens of an answer, at most; fewer where the model's positions end behind the longest prompt.
        batch_size: prompts at a time; None: as ``written_together`` says.
        progress: is told, as ``WRITING``, how many tokens the answers have, and how many they may.

    Returns:
        Rows as they are trained on, on the CPU and padded on the right: ``input_ids`` (prompt and answer; of an
        encoder-decoder the prompt), ``attention_mask``, and ``labels``, the answer and nothing else.

    Raises:
        LoricaError: the model writes no text.
    """
    if not generates(model):
        raise LoricaError("prompts_file is for models that write text, and this one does not; leave it out")
    ends, device = end_tokens(model), next(model.parameters()).device
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None:
        length = min(length, limit - (0 if decodes(model) else max(map(len, prompts))))
    batch_size = batch_size or written_together(length)
    batches: list[dict[str, Tensor]] = []
    rows, counted = max(1, min(batch_size, tokens // length)), 0
    with evaluating(model), sampling(model, ends, 0, length), own_random(device, seed):
        rounds = (torch.randperm(len(prompts)).tolist() for _ in range(ROUNDS))
        order = chain.from_iterable(rounds)
        while counted < tokens and (drawn := list(islice(order, rows))):
            asked = [torch.tensor(prompts[index]) for index in drawn]
            answers = _answers(model, asked, ends)
            batches.append(_rows(asked, answers, apart=decodes(model)))
            found = sum(map(len, answers))
            counted += found
            if progress:
                progress(WRITING, min(counted, tokens), tokens)
            rows = max(1, min(batch_size, (tokens - counted) * len(drawn) // found))
    return batches


def _answers(model: Any, asked: list[Tensor], ends: list[int]) -> list[Tensor]:
    """Return an answer to each prompt, with its end where it has one."""
    apart = decodes(model)  # else the answers have to begin at one column
    ids, mask = (
        pad_sequence(rows, batch_first=True, padding_side="right" if apart else "left").to(model.device)
        for rows in (asked, [torch.ones_like(prompt) for prompt in asked])
    )
    written = model.generate(ids, attention_mask=mask)[:, 1 if apart else ids.shape[1] :]
    return [row[kept].cpu() for row, kept in zip(written, until_end(written, ends).bool(), strict=True)]


def _rows(asked: list[Tensor], answers: list[Tensor], *, apart: bool) -> dict[str, Tensor]:
    ids, labels = asked, answers
    if not apart:
        pairs = list(zip(asked, answers, strict=True))
        ids = [torch.cat(pair) for pair in pairs]
        labels = [torch.cat([torch.full_like(prompt, IGNORED_LABEL), answer]) for prompt, answer in pairs]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }
