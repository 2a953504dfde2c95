"""Rehearsal of a model's own text: what it predicted there before a task is what it is to predict while it learns.

Shape suffixes: B texts, L positions, T predictions, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lorica import processes
from lorica.data.example import IGNORED_LABEL
from lorica.data.positions import position_limit
from lorica.methods.predicted import Prediction
from lorica.subspace.calibration import Batch, decodes, evaluating, first_token, parts

NEEDED_BY, INSTEAD = "rehearse", "leave it out"
"""What the errors of a model that writes no text name, and what they say to do."""

LOGITS = 2**24
"""So many numbers of logits are looked at together before a task: 64 MB in float32."""


def instead(model: Any) -> str:
    """Return what the errors of a model that writes no text by itself say to do."""
    return f"give it prompts_file, or {INSTEAD}" if decodes(model) else INSTEAD


class Text(NamedTuple):
    """A text as a row that is trained on: of a causal model both tensors have L positions.

    Attributes:
        ids: what is read; of an encoder-decoder the prompt.
        labels: what is predicted where that is held, ``IGNORED_LABEL`` elsewhere; of an encoder-decoder the answer.
    """

    ids: Tensor
    labels: Tensor


@dataclass
class Rehearsal:
    """Texts that a model wrote, and what it predicted at those of their positions that are held; on the CPU.

    With p its predictions before the task and q those of the model in training, ``penalty`` is

        weight * mean over the positions held of some of the texts of KL(p || q)        (nats per token)

    All texts are rehearsed before one is rehearsed again, in an order of each pass; processes share them out. Training
    goes on from ``drawn`` as if it had not stopped. Kept are a few tokens and numbers a position (``Prediction``), not
    a second model.

    Attributes:
        texts: from BOS, of which all is held but that, or a prompt with its answer, which alone is.
        told: what was predicted at the positions of each that are held.
        ratio: texts of a call for each row of the training batch, above 0; a call draws at least one.
        weight: above 0.
        drawn: texts that this process has been given so far.

    Source:
        Robins 1995, pseudo-rehearsal; Li and Hoiem 2016, arXiv 1606.09282, for the loss.
    """

    texts: list[Text]
    told: list[Prediction]
    ratio: float
    weight: float = 1.0
    drawn: int = 0

    @classmethod
    def of(cls, model: nn.Module, batches: Iterable[Batch], ratio: float, weight: float) -> Rehearsal:
        """Ask a model what it predicts on texts, in evaluation mode and its own dtype.

        Args:
            model: a causal model or an encoder-decoder.
            batches: ``input_ids`` and ``attention_mask``, padded on the right; ``labels``, as rows to train on have
                them, where not all of a text is held.
        """
        made = cls([], [], ratio, weight)
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                for part in _parts(model, _labelled(batch)):
                    logits_BLV = _logits(model, part)
                    made._take_up(part, _held(model, part).to(logits_BLV.device), logits_BLV)
        return made

    @classmethod
    def blank(cls, model: Any, ratio: float, length: int, prompt: int = 0) -> Rehearsal:
        """Return one whose penalty is as much work as that of texts of full length; its values mean nothing.

        Args:
            length: tokens of a text or an answer, at most.
            prompt: tokens of the longest prompt; 0: the texts are from BOS.
        """
        if not prompt:
            first_token(model, NEEDED_BY, instead(model))
        taken = 0 if decodes(model) else prompt
        length = min(length, (position_limit(model.config) or taken + length) - taken)
        before, held = (prompt, length) if prompt else (1, length - 1)
        labels = torch.zeros(held, dtype=torch.int64)
        if not decodes(model):
            labels = torch.cat([torch.full((before,), IGNORED_LABEL), labels])
        ids = torch.zeros(before if decodes(model) else len(labels), dtype=torch.int64)
        told = Prediction.of(torch.zeros(held, model.get_input_embeddings().num_embeddings))
        return cls([Text(ids, labels)], [told], ratio)

    def _take_up(self, batch: Batch, held_BL: Tensor, logits_BLV: Tensor) -> None:
        # All rows at once: between large pieces that come and go row by row, what is kept would lie scattered, and on a
        # CPU the memory between would not be given back.
        made = Prediction.of(logits_BLV[:, : held_BL.shape[1]][held_BL])
        counts = held_BL.sum(1).tolist()
        told = zip(*(part.cpu().split(counts) for part in made), strict=True)
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], told, strict=True)
        for ids, shown, labels, prediction in rows:
            if len(prediction[-1]):
                end = int((labels != IGNORED_LABEL).nonzero().max()) + 1
                self.texts.append(Text(ids[shown].cpu(), labels[:end].cpu()))
                self.told.append(Prediction(*prediction))

    @property
    def positions(self) -> int:
        """How many positions are held."""
        return sum(len(told.rest_T) for told in self.told)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(tensor.nbytes for kept in (*self.texts, *self.told) for tensor in kept)

    def penalty(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted mean divergence over the next texts.

        Args:
            model: in training; a forward pass of its own runs through it.
            inputs: the training batch, of which only the number of rows counts.
        """
        drawn = self._draw(max(1, round(self.ratio * row_count(inputs))))
        return self.weight * self.divergence(model, drawn).mean()

    def divergence(self, model: nn.Module, drawn: Sequence[int]) -> Tensor:
        """Return KL(p || q) at each position held of some of the texts, in nats; see ``Prediction.divergence``."""
        batch = _padded([self.texts[index] for index in drawn])
        logits_BLV = _logits(model, batch)
        device = logits_BLV.device
        row_T, position_T = (index.to(device) for index in _held(model, batch).nonzero(as_tuple=True))
        told = Prediction(*(torch.cat(parts).to(device) for parts in zip(*(self.told[i] for i in drawn), strict=True)))
        return told.divergence(logits_BLV[row_T, position_T])

    def _draw(self, rows: int) -> list[int]:
        """Return the next texts of this process: all are drawn before one is drawn again."""
        first, total = self.drawn, len(self.texts)
        self.drawn += rows
        places = [number * processes.size() + processes.rank() for number in range(first, first + rows)]
        return [_order(place // total, total)[place % total] for place in places]


@lru_cache(maxsize=2)
def _order(turn: int, total: int) -> list[int]:
    """Return in which order texts are drawn in a pass over all of them."""
    order: list[int] = torch.randperm(total, generator=torch.Generator().manual_seed(turn)).tolist()
    return order


def prompt_loss(inputs: Mapping[str, Tensor], logits_BLV: Tensor) -> Tensor:
    """Return the loss of the tokens that a row shows but does not train: of its prompt.

        sum over these tokens of -log q(token | what is before it)  /  trained tokens of the micro-batch      (nats)

    so that with a weight w in front each counts w times as much as a trained one.

    Source:
        Sun et al. 2020, arXiv 1909.03329 (LAMOL): who learns to write the questions can rehearse them.
    """
    tokens_BL, labels_BL = inputs["input_ids"], inputs["labels"]
    flat = inputs.get("position_ids")
    shown_BL = inputs["attention_mask"] == 1 if flat is None else flat > 0
    asked_BL = shown_BL[:, 1:] & (labels_BL[:, 1:] == IGNORED_LABEL)
    trained = (labels_BL[:, 1:] != IGNORED_LABEL).sum().clamp(min=1)
    loss = nn.functional.cross_entropy(
        logits_BLV[:, :-1][asked_BL].float(), tokens_BL[:, 1:][asked_BL], reduction="sum"
    )
    return loss / trained


def row_count(inputs: Mapping[str, Tensor]) -> int:
    """Return how many rows a training batch has, also where they lie end to end."""
    flat = inputs.get("position_ids")
    return len(inputs["labels"]) if flat is None else int((flat == 0).sum())


def _parts(model: Any, batch: Batch) -> Iterator[Batch]:
    """Return the rows of a batch, as many at a time as have at most ``LOGITS`` logits, or a single one."""
    row = batch["labels"].shape[1] * model.get_input_embeddings().num_embeddings
    return parts(batch, max(1, LOGITS // row))


def _labelled(batch: Batch) -> Batch:
    """Return a batch with labels: of texts from BOS each token but the first is predicted."""
    if "labels" in batch:
        return batch
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
    labels[:, 0] = IGNORED_LABEL
    return {**batch, "labels": labels}


def _held(model: nn.Module, batch: Batch) -> Tensor:
    """Return at which positions of the logits, from the first, a prediction is held: a causal model's are shifted."""
    return batch["labels"][:, 0 if decodes(model) else 1 :] != IGNORED_LABEL


def _logits(model: Any, batch: Batch) -> Tensor:
    names = ("input_ids", "attention_mask", "labels")[: 3 if decodes(model) else 2]  # what a decoder reads is shifted
    inputs = {name: batch[name].to(model.device) for name in names}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def _padded(texts: Sequence[Text]) -> dict[str, Tensor]:
    ids, labels = zip(*texts, strict=True)
    return {
        "input_ids": pad_sequence(list(ids), batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(list(labels), batch_first=True, padding_value=IGNORED_LABEL),
    }
