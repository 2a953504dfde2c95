"""Rows to a batch: padded to equal length, or end to end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from lorica.data.example import IGNORED_LABEL
from lorica.errors import LoricaError


class Collator:
    """Pad rows on the right into a batch of tensors.

    ``attention_mask`` comes from each row's length, never from the pad id, so that EOS stays trained and attended
    where it also pads; ``labels`` are padded with -100. All are int64, (batch, length), but a classifier's labels.

    Args:
        tokenizer: gives the pad id: its own, else EOS, else 0.
        seq2seq: labels are sequences of their own and padded to their own length.
        classifier: labels are one class per row; they come as (batch,).
        pad_to_multiple_of: lengths are rounded up to a multiple of this; None: not.
        pad_token_id: used instead of the tokenizer's.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        seq2seq: bool = False,
        classifier: bool = False,
        pad_to_multiple_of: int | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise LoricaError(f"pad_to_multiple_of is {pad_to_multiple_of}; give a positive number or leave it out.")
        choices = (
            pad_token_id,
            getattr(tokenizer, "pad_token_id", None),
            getattr(tokenizer, "eos_token_id", None),
        )
        self.pad_token_id: int = next((choice for choice in choices if choice is not None), 0)
        self.seq2seq = seq2seq
        self.classifier = classifier
        self.multiple = pad_to_multiple_of or 1

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = [list(feature["input_ids"]) for feature in features]
        labels = [list(feature["labels"]) for feature in features]
        if not (self.seq2seq or self.classifier) and any(len(i) != len(j) for i, j in zip(ids, labels, strict=True)):
            raise ValueError("input_ids and labels differ in length; an encoder-decoder needs seq2seq=True")
        return {
            "input_ids": self._pad(ids, self.pad_token_id),
            "attention_mask": self._pad([[1] * len(row) for row in ids], 0),
            "labels": torch.tensor([row[0] for row in labels]) if self.classifier else self._pad(labels, IGNORED_LABEL),
        }

    def _pad(self, rows: list[list[int]], value: int) -> Tensor:
        longest = max(map(len, rows))
        width = -(-longest // self.multiple) * self.multiple
        return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.int64)


class FlatCollator:
    """Lay rows end to end in one row without padding, for a causal model that keeps them apart.

    ``position_ids`` begin at 0 with each row: where there is neither an ``attention_mask`` nor a cache (``use_cache``
    is False), models of transformers take this for the beginning of a sequence that sees no other one. The first label
    of a row is -100, so that no row predicts the next one. Tensors are int64, (1, tokens of all rows).

    Args:
        boundaries: tell FlashAttention's kernels where rows begin and end, which otherwise each layer looks for:
            ``cu_seq_lens_q``, ``cu_seq_lens_k`` (int32, rows + 1), ``max_length_q``, ``max_length_k`` (int).
    """

    def __init__(self, *, boundaries: bool = False) -> None:
        self.boundaries = boundaries

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        lengths = [len(feature["input_ids"]) for feature in features]
        batch = {
            "input_ids": _end_to_end(feature["input_ids"] for feature in features),
            "labels": _end_to_end([IGNORED_LABEL, *feature["labels"][1:]] for feature in features),
            "position_ids": _end_to_end(map(range, lengths)),
            "use_cache": False,
        }
        return batch | _boundaries(lengths) if self.boundaries else batch


def _end_to_end(rows: Iterable[Iterable[int]]) -> Tensor:
    return torch.tensor([list(chain.from_iterable(rows))], dtype=torch.int64)


def _boundaries(lengths: Sequence[int]) -> dict[str, Any]:
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return {f"cu_seq_lens_{side}": ends for side in "qk"} | {f"max_length_{side}": max(lengths) for side in "qk"}
