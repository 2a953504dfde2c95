"""Calibration inputs that need no data: random tokens, and what a model writes by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorica.errors import LoricaError

Batch = Mapping[str, Tensor]

Progress = Callable[[str, int, int], None]
"""Is told of long work as ``progress(name, done, total)``."""

WRITING, MEASURING = "writing text", "measuring the model"
"""Its names for what comes before a task."""

LENGTH = 64
"""Tokens of a text that a model writes, at most."""

WRITTEN_TOGETHER, RANDOM_TOGETHER = 64, 16
"""Texts that a model writes at a time, see ``written_together``; sequences of random tokens in a batch."""

TOGETHER = 8_192
"""Tokens of the texts that a model writes at a time, at most: while it writes it holds keys and values of each."""

TOKENS = 32_768
"""Tokens that a model writes, where nobody says how many."""


def random_tokens(
    vocabulary: int,
    *,
    sequences: int = 64,
    length: int = 64,
    batch_size: int = RANDOM_TOGETHER,
    seed: int = 0,
    decoder: bool = False,
) -> list[dict[str, Tensor]]:
    """Return batches of uniformly random token ids: a calibration set that needs no data at all.

    Args:
        vocabulary: how many ids there are.
        sequences, length, batch_size, seed: what is drawn, and how it is cut into batches.
        decoder: give the same ids to the decoder of an encoder-decoder model as well.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (sequences, length), generator=generator)
    names = ("input_ids", "decoder_input_ids") if decoder else ("input_ids",)
    return [dict.fromkeys(names, part) | {"attention_mask": torch.ones_like(part)} for part in ids.split(batch_size)]


@torch.no_grad()
def own_text(
    model: Any,
    *,
    tokens: int = TOKENS,
    length: int = LENGTH,
    batch_size: int | None = None,
    seed: int = 0,
    needed_by: str = 'calibration "self"',
    instead: str = 'give batches, or "random" for random tokens',
    progress: Progress | None = None,
) -> list[dict[str, Tensor]]:
    """Return batches of text that a causal model writes by itself: what it has learned, without any data.

    Each sequence begins with BOS (EOS for a model without one) and is sampled from the model's own distribution,
    temperature 1, nothing cut off; what the model's generation configuration adds is set aside. What follows the end
    of a text is masked. The random state of the process, the model's mode and its configuration are as before.

    Args:
        model: a causal model that can generate.
        tokens: sample until the texts hold so many together. A model of short texts, such as answers of a few words,
            writes more of them.
        length: tokens of a text, at most.
        batch_size: how many of that length are sampled at a time; None: as ``written_together`` says.
        seed: what is drawn.
        needed_by, instead: what the errors name, and what they say to do.
        progress: is told, as ``WRITING``, how many tokens have been sampled, and of how many.

    Raises:
        LoricaError: the model does not continue a text by itself, or has neither BOS nor EOS to begin with.
    """
    start = first_token(model, needed_by, instead)
    ends = end_tokens(model)
    length = min(length, getattr(model.config, "max_position_embeddings", None) or length)
    device = next(model.parameters()).device
    batches: list[dict[str, Tensor]] = []
    batch_size = batch_size or written_together(length)
    rows, counted = min(batch_size, -(-tokens // length)), 0
    with evaluating(model), sampling(model, ends, start, length - 1), own_random(device, seed):
        while counted < tokens:
            first = torch.full((rows, 1), start, device=device)
            ids = model.generate(first, attention_mask=torch.ones_like(first))
            mask = torch.cat([torch.ones_like(first), until_end(ids[:, 1:], ends)], dim=1)  # a text may begin with EOS
            batches.append({"input_ids": ids, "attention_mask": mask})
            found = int(batches[-1]["attention_mask"].sum())
            counted += found
            if progress:
                progress(WRITING, min(counted, tokens), tokens)
            rows = max(1, min(batch_size * length, tokens - counted) * rows // found)
    return batches


def written_together(length: int) -> int:
    """Return how many texts of a length a model writes at a time: of long ones fewer."""
    return max(1, min(WRITTEN_TOGETHER, TOGETHER // length))


def first_token(model: Any, needed_by: str, instead: str) -> int:
    """Return the token that a model's own text begins with: BOS, or EOS for a model without one.

    Raises:
        LoricaError: see ``own_text``.
    """
    if not is_causal(model):
        raise LoricaError(f"{needed_by} is for causal models, which write text by themselves; {instead}")
    tokens = _known(model, getattr(model.config, "bos_token_id", None)) + end_tokens(model)
    if not tokens:
        raise LoricaError(
            f"{needed_by} needs a model with a bos_token_id or eos_token_id in its vocabulary to begin at; {instead}"
        )
    return tokens[0]


def end_tokens(model: Any) -> list[int]:
    """Return the tokens of the model's vocabulary that end a text; there may be none."""
    return _known(model, model.generation_config.eos_token_id)


def is_causal(model: Any) -> bool:
    """Return whether a model continues a text by itself: it generates, and is no encoder-decoder."""
    return generates(model) and not decodes(model)


def generates(model: Any) -> bool:
    """Return whether a model writes text, of itself or as an answer."""
    can = getattr(model, "can_generate", None)
    return callable(can) and bool(can())


def decodes(model: Any) -> bool:
    """Return whether a model is an encoder-decoder, which reads on one side and writes on the other."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def parts(batch: Batch, rows: int) -> Iterator[Batch]:
    """Yield the rows of a batch, at most so many at a time; as it is where its tensors have no rows in common."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    counts = {len(value) if value.ndim else 0 for value in tensors.values()}
    if len(counts) != 1 or len(tensors) < len(batch) or max(counts) <= rows:
        yield batch
        return
    for start in range(0, max(counts), rows):
        yield {name: value[start : start + rows] for name, value in tensors.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; afterwards each module back in its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def sampling(model: Any, ends: list[int], other: int, new_tokens: int) -> Iterator[None]:
    """Exchange the model's generation configuration, from which ``generate`` fills in whatever it is not told.

    Args:
        ends: tokens that end a text.
        other: pads where there are none.
        new_tokens: are written at most.
    """
    own = model.generation_config
    model.generation_config = type(own)(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=new_tokens,
        eos_token_id=ends or None, pad_token_id=ends[0] if ends else other, use_cache=True,
        decoder_start_token_id=own.decoder_start_token_id,
    )  # fmt: skip
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def own_random(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the random generators; afterwards those of the process and of this device are as before."""
    with torch.random.fork_rng([device] if device.type in ("cuda", "xpu") else []):
        torch.manual_seed(seed)
        yield


def until_end(written: Tensor, ends: list[int]) -> Tensor:
    """Return 1 up to and including the first of ``ends`` in a sequence, 0 after it."""
    ended = torch.isin(written, torch.tensor(ends, dtype=written.dtype, device=written.device)).long()
    return (ended.cumsum(1) - ended == 0).long()


def _known(model: Any, tokens: int | list[int] | None) -> list[int]:
    """Return the tokens that are in the model's vocabulary; a configuration can name others, which none will write."""
    named = tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]
    return [token for token in named if 0 <= token < model.get_input_embeddings().num_embeddings]
