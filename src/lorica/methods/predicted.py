"""What is kept of a model's predictions, and how far others are from them.

Shape suffixes: T predictions, V the vocabulary, K kept tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

KEPT = 64
"""So many of the likeliest tokens are kept of each prediction; all others count as one."""

IMPOSSIBLE = -1e30
"""In place of the logarithm of 0, whose difference from itself is no number."""


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
