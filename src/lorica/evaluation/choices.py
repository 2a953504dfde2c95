"""Which of several given answers a model holds likeliest: constrained-choice scoring."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lorica.data.collate import Collator
from lorica.data.parts import in_parts
from lorica.data.positions import position_limit
from lorica.data.tokens import Codec
from lorica.errors import LoricaError, did_you_mean
from lorica.evaluation.generate import Progress, batch_count, batches_by_length, counting
from lorica.processes import in_step, together

Normalise = Literal["none", "tokens", "characters"]


def choose(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[str]],
    *,
    batch_size: int = 16,
    normalise: Normalise = "none",
    progress: Progress | None = None,
) -> list[int]:
    """Return, for each prompt, the index of its likeliest choice; the first of several equally likely ones.

    See `choice_scores` for the arguments, the score and the errors.
    """
    scores = choice_scores(
        model, tokenizer, prompts, choices, batch_size=batch_size, normalise=normalise, progress=progress
    )
    return [max(range(len(row)), key=row.__getitem__) for row in scores]


@torch.no_grad()
def choice_scores(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[str]],
    *,
    batch_size: int = 16,
    normalise: Normalise = "none",
    progress: Progress | None = None,
) -> list[list[float]]:
    """Return the log-probability (nats) of every choice as the continuation of its prompt.

        score(c) = sum_i log p(c_i | prompt, c_1 .. c_{i-1}), by default not divided

    A choice gets the tokens it has in training (`Codec.continuation`, of an encoder-decoder `Codec.plain`), and no
    EOS, as is the custom (lm-evaluation-harness), with one exception: where the tokens of one choice are the start
    of another's ("neutral", "neutral positive"), the longer could never win, so all choices of that prompt then end
    with EOS, the token that training puts behind an answer.

    Args:
        model: causal or encoder-decoder; its mode and the random state are left as they were.
        prompts: token ids, with what the tokenizer puts around them. An empty prompt becomes BOS, else EOS. One that
            with its longest choice exceeds the model's positions loses tokens behind its start (BOS), the same for
            all its choices.
        choices: per prompt, texts to be written right behind it, so with their leading blank if there is one.
        batch_size: sequences at a time, padded on the right; halves of them where memory runs out. Choices that
            differ in their last token alone are one.
        normalise: divide by the number of "tokens" (EOS included where it is scored), or of "characters", blanks at
            both ends aside.
        progress: told of every batch.

    Raises:
        LoricaError: prompts and choices differ in number, a prompt has no choice, a choice is blank or longer than
            the model's positions, or ``normalise`` is unknown.
    """
    _check(prompts, choices, normalise)
    codec = Codec(tokenizer)
    readings = _readings(model, codec, prompts, choices)
    lengths = [len(reading.prompt) + len(reading.tail) for reading in readings]
    score_of = partial(_log_probabilities, model, Collator(tokenizer))
    batches = [[readings[index] for index in indices] for indices in batches_by_length(lengths, batch_size)]
    tell = counting(progress, "choices", batch_count(len(readings), batch_size))

    def one_batch(batch: list[_Reading]) -> list[float]:
        found = in_parts(score_of, batch, in_step=in_step(model))
        tell()
        return found

    scores = [[0.0] * len(texts) for texts in choices]
    training = model.training
    model.eval()
    try:
        for batch, found in zip(batches, together(batches, one_batch, in_step=in_step(model)), strict=True):
            asked = [(reading, choice) for reading in batch for choice in reading.lasts]
            for (reading, choice), score in zip(asked, found, strict=True):
                text, tokens = choices[reading.row][choice], len(reading.tail) + 1
                scores[reading.row][choice] = score / _divisor(normalise, text, tokens)
    finally:
        model.train(training)
    return scores


class _Reading(NamedTuple):
    """What is read once: a prompt and the tokens on which some of its choices agree, all but their last.

    ``lasts`` holds the last token of each of these choices, by index.
    """

    row: int
    prompt: list[int]
    tail: tuple[int, ...]
    lasts: dict[int, int]


def _check(prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[str]], normalise: str) -> None:
    if normalise not in (known := get_args(Normalise)):
        raise LoricaError(
            f"normalise {normalise!r} is not known; known: {', '.join(known)}.{did_you_mean(normalise, known)}"
        )
    if len(prompts) != len(choices):
        raise LoricaError(f"there are {len(prompts)} prompts and choices for {len(choices)}; give each prompt its own.")
    for row, texts in enumerate(choices):
        if not texts or not all(text.strip() for text in texts):
            raise LoricaError(f"prompt {row} needs at least one choice and none that is blank; it has {list(texts)}.")


def _readings(
    model: Any, codec: Codec, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[str]]
) -> list[_Reading]:
    # Cached, for most benchmarks ask every row for the same labels.
    plain, continuation = cache(codec.plain), cache(codec.continuation)
    readings = []
    for row, (prompt, texts) in enumerate(zip(prompts, choices, strict=True)):
        alone = model.config.is_encoder_decoder or list(prompt) in ([], codec.prefix)
        endings = _endings([(plain if alone else continuation)(text) for text in texts], codec.eos)
        fitted = _fitted(model, codec, list(prompt), max(map(len, endings)), row)
        groups: dict[tuple[int, ...], dict[int, int]] = defaultdict(dict)
        for choice, (*tail, last) in enumerate(endings):
            groups[tuple(tail)][choice] = last
        readings += [_Reading(row, fitted, tail, lasts) for tail, lasts in groups.items()]
    return readings


def _endings(tokens: list[list[int]], eos: int) -> list[list[int]]:
    """Return the tokens of a prompt's choices, each with EOS if one is the start of another."""
    nested = any(a != b and b[: len(a)] == a for a in tokens for b in tokens)
    return [[*ids, eos] for ids in tokens] if nested else tokens


def _fitted(model: Any, codec: Codec, prompt: list[int], longest: int, row: int) -> list[int]:
    """Return a prompt that leaves room for its longest choice; its first special ids and its last token stay."""
    start = codec.tokenizer.bos_token_id
    prompt = prompt or [codec.eos if start is None else start]
    limit = position_limit(model.config)
    if limit is None:
        return prompt
    if longest > limit:
        raise LoricaError(f"a choice of prompt {row} has {longest} tokens, the model {limit} positions; shorten it.")
    # The last token of a choice is never read, so it needs no position; a decoder of its own reads no prompt.
    room = limit if model.config.is_encoder_decoder else limit - longest + 1
    if (excess := len(prompt) - room) <= 0:
        return prompt
    head = min(len(codec.prefix) if prompt[: len(codec.prefix)] == codec.prefix else 0, room - 1)
    return prompt[:head] + prompt[head + excess :]


def _log_probabilities(model: Any, collate: Collator, batch: Sequence[_Reading]) -> list[float]:
    """Return the log-probabilities of all choices of a batch, in the order of the readings and their ``lasts``."""
    inputs, firsts = _inputs(model, collate, batch)
    start = min(firsts)
    stop = max(first + len(reading.tail) + 1 for first, reading in zip(firsts, batch, strict=True))
    log_p = _logits(model, inputs, torch.arange(start, stop, device=inputs["input_ids"].device)).float().log_softmax(-1)
    found = []
    for row, (reading, first) in enumerate(zip(batch, firsts, strict=True)):
        own = log_p[row, first - start :]
        shared = own[range(len(reading.tail)), reading.tail].sum()
        found.append(shared + own[len(reading.tail), list(reading.lasts.values())])
    scores: list[float] = torch.cat(found).tolist()
    return scores


def _inputs(model: Any, collate: Collator, batch: Sequence[_Reading]) -> tuple[dict[str, Tensor], list[int]]:
    """Return what the model reads, and where in each sequence the first token of a choice is predicted."""
    if model.config.is_encoder_decoder:
        read, firsts = [reading.prompt for reading in batch], [0] * len(batch)
    else:
        read = [[*reading.prompt, *reading.tail] for reading in batch]
        firsts = [len(reading.prompt) - 1 for reading in batch]
    padded = collate([{"input_ids": ids, "labels": ids} for ids in read])
    inputs = {name: padded[name] for name in ("input_ids", "attention_mask")}
    if model.config.is_encoder_decoder:
        given = [[model.config.decoder_start_token_id, *reading.tail] for reading in batch]
        inputs["decoder_input_ids"] = collate([{"input_ids": ids, "labels": ids} for ids in given])["input_ids"]
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}, firsts


def _logits(model: Any, inputs: dict[str, Tensor], positions: Tensor) -> Tensor:
    """Return the logits at some positions alone: over a large vocabulary those of all outweigh the model's work."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**inputs, logits_to_keep=positions, use_cache=False).logits
    return model(**inputs, use_cache=False).logits[:, positions]


def _divisor(normalise: Normalise, text: str, tokens: int) -> int:
    return {"none": 1, "tokens": tokens, "characters": len(text.strip())}[normalise]
