"""Rehearsal of a model's own text: what it predicted there before a task is what it is to predict while it learns.

Shape suffixes: B texts, L positions, T predictions, V the vocabulary, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorica import processes
from lorica.subspace.calibration import LENGTH, Batch, evaluating, first_token

KEPT = 64
"""So many of the likeliest tokens are kept of each prediction; all others count as one."""

NEEDED_BY, INSTEAD = "rehearse", "leave it out"
"""What the errors of a model that writes no text name, and what they say to do."""

IMPOSSIBLE = -1e30
"""In place of the logarithm of 0, whose difference from itself is no number."""

LOGITS = 2**25
"""So many numbers of logits are looked at together before a task: 128 MB in float32."""


class Prediction(NamedTuple):
    """The likeliest tokens at T positions.

    Attributes:
        tokens_TK: their numbers.
        logp_TK: their log-probabilities, float32, at least ``IMPOSSIBLE``.
        rest_T: log-probability of all other tokens together, ``IMPOSSIBLE`` where there are none.
    """

    tokens_TK: Tensor
    logp_TK: Tensor
    rest_T: Tensor

    @classmethod
    def of(cls, logits_TV: Tensor) -> Prediction:
        """Return what is kept of a model's logits."""
        tokens_TK = logits_TV.topk(min(KEPT, logits_TV.shape[-1])).indices
        return cls(tokens_TK, *_log_probabilities(logits_TV, tokens_TK))

    def divergence(self, logits_TV: Tensor) -> Tensor:
        """Return ``sum_k p_k log(p_k / q_k)`` over the kept tokens and the rest, T values in nats.

        That is the Kullback-Leibler divergence KL(p || q) where all tokens are kept, and never more than it.
        """
        logq_TK, rest_T = _log_probabilities(logits_TV, self.tokens_TK)
        kept_T = (self.logp_TK.exp() * (self.logp_TK - logq_TK)).sum(-1)
        return kept_T + self.rest_T.exp() * (self.rest_T - rest_T)


def _log_probabilities(logits_TV: Tensor, tokens_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Return those of some tokens, and that of all others together."""
    logp_TV = logits_TV.float().log_softmax(-1)
    rest_T = logp_TV.scatter(-1, tokens_TK, IMPOSSIBLE).logsumexp(-1)
    return logp_TV.gather(-1, tokens_TK).clamp(min=IMPOSSIBLE), rest_T


@dataclass
class Rehearsal:
    """Texts that a causal model wrote, and what it predicted at each of their positions; on the CPU.

    With p its predictions before the task and q those of the model in training, ``penalty`` is

        weight * mean over the positions of some of the texts of KL(p || q)        (nats per token)

    Which texts is drawn from the process's random state, which checkpoints hold and a step that is run again begins
    with; several processes draw others. Kept are ``KEPT`` tokens and numbers a position, not a second model.

    Attributes:
        texts: token ids of each, the first of them BOS.
        told: what was predicted at all but its last position.
        ratio: texts of a call for each row of the training batch, above 0; a call draws at least one.
        weight: above 0.

    Source:
        Robins 1995, pseudo-rehearsal; Li and Hoiem 2016, arXiv 1606.09282, for the loss.
    """

    texts: list[Tensor]
    told: list[Prediction]
    ratio: float
    weight: float = 1.0

    @classmethod
    def of(cls, model: nn.Module, batches: Iterable[Batch], ratio: float, weight: float) -> Rehearsal:
        """Ask a model what it predicts on texts, in evaluation mode and its own dtype.

        Args:
            model: a causal model.
            batches: ``input_ids`` and ``attention_mask``, padded on the right.
        """
        made = cls([], [], ratio, weight)
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                for part in _parts(model, batch):
                    made._take_up(part, _logits(model, part))
        return made

    @classmethod
    def blank(cls, model: Any, ratio: float) -> Rehearsal:
        """Return one whose penalty is as much work as that of texts of full length; its values mean nothing."""
        text = torch.full((LENGTH,), first_token(model, NEEDED_BY, INSTEAD))
        told = Prediction.of(torch.zeros(LENGTH - 1, model.get_input_embeddings().num_embeddings))
        return cls([text], [told], ratio)

    def _take_up(self, batch: Batch, logits_BLV: Tensor) -> None:
        lengths = batch["attention_mask"].sum(1).tolist()
        for ids, logits, length in zip(batch["input_ids"], logits_BLV, lengths, strict=True):
            if length > 1:
                self.texts.append(ids[:length].cpu())
                self.told.append(Prediction(*(part.cpu() for part in Prediction.of(logits[: length - 1]))))

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        tensors = [*self.texts, *(part for told in self.told for part in told)]
        return sum(tensor.nbytes for tensor in tensors)

    def penalty(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted mean divergence over the next texts, drawn with replacement.

        Args:
            model: in training; a forward pass of its own runs through it.
            inputs: the training batch, of which only the number of rows counts.
        """
        drawn = self._draw(max(1, round(self.ratio * row_count(inputs))))
        batch = _padded([self.texts[index] for index in drawn])
        logits_BLV = _logits(model, batch)
        device = logits_BLV.device
        row_T, position_T = (index.to(device) for index in batch["attention_mask"][:, 1:].nonzero(as_tuple=True))
        told = Prediction(*(torch.cat(parts).to(device) for parts in zip(*(self.told[i] for i in drawn), strict=True)))
        return self.weight * told.divergence(logits_BLV[row_T, position_T]).mean()

    def _draw(self, rows: int) -> list[int]:
        total = len(self.texts)
        apart = processes.rank() * total // processes.size()  # their random states can be the same
        drawn: list[int] = ((torch.randint(total, (rows,)) + apart) % total).tolist()
        return drawn


def row_count(inputs: Mapping[str, Tensor]) -> int:
    """Return how many rows a training batch has, also where they lie end to end."""
    flat = inputs.get("position_ids")
    return len(inputs["labels"]) if flat is None else int((flat == 0).sum())


def _parts(model: Any, batch: Batch) -> Iterator[Batch]:
    """Yield the rows of a batch, as many at a time as have at most ``LOGITS`` logits, or a single one."""
    row = batch["input_ids"].shape[1] * model.get_input_embeddings().num_embeddings
    names = list(batch)
    for tensors in zip(*(batch[name].split(max(1, LOGITS // row)) for name in names), strict=True):
        yield dict(zip(names, tensors, strict=True))


def _logits(model: Any, batch: Batch) -> Tensor:
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def _padded(texts: Sequence[Tensor]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
