"""Greedy generation in batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield indices in batches of similar length, the longest first so that a lack of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@torch.no_grad()
def greedy_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    """Return what the model writes after each prompt, one beam, no sampling, special tokens left out.

    Args:
        prompts: token ids. An empty prompt becomes the tokenizer's first token (BOS, else EOS).
        max_new_tokens: an answer that has not ended by then is cut.
        batch_size: prompts at a time; they are padded on the left (encoder-decoder: on the right).
    """
    seq2seq = bool(model.config.is_encoder_decoder)  # type: ignore[union-attr]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    filled = [list(prompt) or [start] for prompt in prompts]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = next(model.parameters()).device
    answers = [""] * len(filled)
    for indices in batches_by_length([len(prompt) for prompt in filled], batch_size):
        ids, mask = _padded([filled[index] for index in indices], pad, left=not seq2seq)
        output = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
        written = output if seq2seq else output[:, ids.shape[1] :]
        for index, text in zip(indices, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            answers[index] = text
    return answers


def _padded(rows: Sequence[list[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    gaps = [[pad] * (width - len(row)) for row in rows]
    ids = [gap + row if left else row + gap for gap, row in zip(gaps, rows, strict=True)]
    mask = [
        [0] * len(gap) + [1] * len(row) if left else [1] * len(row) + [0] * len(gap)
        for gap, row in zip(gaps, rows, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)
