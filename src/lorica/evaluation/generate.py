"""Greedy generation in batches of similar length."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from lorica import processes
from lorica.data.parts import in_parts
from lorica.data.positions import position_limit

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


class Written(NamedTuple):
    """What a model wrote after a prompt, and whether it ended there by itself."""

    text: str
    ended: bool


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return indices in batches of similar length, the longest first so that a lack of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def batch_count(rows: int, batch_size: int) -> int:
    """Return how many batches ``batches_by_length`` makes."""
    return -(-rows // batch_size)


def counting(progress: Progress | None, name: str, total: int) -> Callable[[], None]:
    """Return what to call after each batch; where several processes share them, each counts for all."""
    done = itertools.count(processes.size(), processes.size())
    return lambda: progress(name, min(next(done), total), total) if progress is not None else None


@torch.no_grad()
def greedy_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[Written]:
    """Return what the model writes after each prompt: always its likeliest token, nothing else.

    The model's own generation configuration is set aside, for what it adds (penalties, sampling, n-gram bans,
    forced, suppressed or least numbers of tokens) is no knowledge of the model, and was not there in training.
    Of it stay the tokens that end a text, beside the tokenizer's EOS, and the decoder's first token.

    Args:
        prompts: token ids. An empty prompt becomes the tokenizer's first token (BOS, else EOS).
        max_new_tokens: for all prompts, or for each. A batch goes on for the largest of its prompts'; none goes
            beyond the model's positions. What has not ended by then is cut.
        batch_size: prompts at a time; they are padded on the left (encoder-decoder: on the right). Where memory runs
            out, halves of them.
        progress: told of every batch.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    filled = [list(prompt) or [start] for prompt in prompts]
    lengths = [len(prompt) for prompt in filled]
    wanted = [max_new_tokens] * len(filled) if isinstance(max_new_tokens, int) else max_new_tokens
    settings = _settings(model, tokenizer)
    tell = counting(progress, "answers", batch_count(len(filled), batch_size))
    in_step = processes.in_step(model)

    def one_batch(batch: list[int]) -> list[tuple[int, list[int]]]:
        written: list[tuple[int, list[int]]] = []
        for indices, new_tokens in _within_positions(model, batch, lengths, wanted):
            settings.max_new_tokens = new_tokens
            rows = [filled[index] for index in indices]
            ids = in_parts(partial(_generate, model, settings), rows, in_step=in_step)
            written += zip(indices, ids, strict=True)
        tell()
        return written

    given = batches_by_length(lengths, batch_size)
    if in_step:
        given = _in_step(model, given, lengths, wanted)
        if model.config.is_encoder_decoder:  # type: ignore[union-attr]
            _pass_through(model, settings)
    with _generating_by(model, settings):
        batches = processes.together(given, one_batch, in_step=in_step)
    answers = {index: _read(tokenizer, ids, settings.eos_token_id) for batch in batches for index, ids in batch}
    return [answers[index] for index in range(len(filled))]


def _settings(model: Any, tokenizer: Any) -> GenerationConfig:
    own = model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        eos_token_id=sorted({tokenizer.eos_token_id, *ends} - {None}),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
    )


@contextmanager
def _generating_by(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Exchange the model's generation configuration, from which `generate` fills in whatever it is not told."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


def _within_positions(
    model: Any, batch: list[int], lengths: Sequence[int], wanted: Sequence[int]
) -> Iterator[tuple[list[int], int]]:
    """Yield a batch and its number of new tokens; if they do not fit, the prompts of each length by themselves.

    So a prompt near the model's last position takes no room from the others of its batch.
    """
    limit = position_limit(model.config)
    most = max(wanted[index] for index in batch)

    def room(length: int) -> int:
        if limit is None:
            return most
        # The last new token is never read, so it needs no position; a decoder of its own reads no prompt.
        return limit if model.config.is_encoder_decoder else max(limit - length + 1, 1)

    if most <= room(lengths[batch[0]]):
        yield batch, most
        return
    for length, same in groupby(batch, key=lambda index: lengths[index]):
        yield list(same), min(most, room(length))


def _in_step(
    model: Any, batches: Sequence[list[int]], lengths: Sequence[int], wanted: Sequence[int]
) -> list[list[int]]:
    """Return batches by which processes that share a model take equally many passes, of which each needs all of them.

    One whose texts have ended goes on with the others, to positions that its texts do not have. Where there are none
    left, all write the same texts at the same time.
    """
    parts = [part for batch in batches for part, _ in _within_positions(model, batch, lengths, wanted)]
    limit = position_limit(model.config)
    beyond = limit is not None and not model.config.is_encoder_decoder and max(lengths) + max(wanted) - 1 > limit
    return [part for part in parts for _ in range(processes.size() if beyond else 1)]


def _pass_through(model: Any, settings: GenerationConfig) -> None:
    """Take a pass that gathers what lies outside the blocks: ``generate`` calls the encoder without the model's own."""
    ids = torch.full((1, 1), settings.pad_token_id, device=model.device)
    model(input_ids=ids, decoder_input_ids=ids)


def _generate(model: Any, settings: GenerationConfig, rows: Sequence[list[int]]) -> list[list[int]]:
    seq2seq = bool(model.config.is_encoder_decoder)
    ids, mask = _padded(rows, settings.pad_token_id, left=not seq2seq)
    output = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
    )
    written: list[list[int]] = output[:, 1 if seq2seq else ids.shape[1] :].tolist()
    return written


def _read(tokenizer: Any, ids: list[int], ends: list[int]) -> Written:
    length = next((position for position, token in enumerate(ids) if token in ends), None)
    # "Cleaning up" would delete blanks before punctuation that the model wrote.
    text = tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Written(text, length is not None)


def _padded(rows: Sequence[list[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    gaps = [[pad] * (width - len(row)) for row in rows]
    ids = [gap + row if left else row + gap for gap, row in zip(gaps, rows, strict=True)]
    mask = [
        [0] * len(gap) + [1] * len(row) if left else [1] * len(row) + [0] * len(gap)
        for gap, row in zip(gaps, rows, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)
