"""How many directions of each weight are protected: one function per policy, from numbers to numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from lorica.errors import LoricaError

RANKS = ("uniform", "importance", "energy", "effective-rank", "marginal")
"""The policies that ``lorica.plan(ranks=...)`` knows."""


LARGEST_IMPORTANCE = 10.0
"""Largest importance of a layer, mean 1, that still means something."""


def share_to_count(share: float, size: int) -> int:
    """Return ``floor(share * size)`` within [0, size], immune to the last bit of ``share``."""
    return min(size, max(0, math.floor(share * size + 1e-9)))


def energy_rank(sigma_S: Tensor, share: float) -> int:
    """Return the least k whose directions hold ``share`` of the squared spectrum.

    k = min { k : sum_{i <= k} s_i^2 >= share * sum_i s_i^2 }

    All of it, share = 1, means every direction, also those of no energy.
    """
    if share >= 1:
        return len(sigma_S)
    energy = sigma_S.square().cumsum(0)
    if share <= 0 or energy[-1] == 0:
        return 0
    return min(len(sigma_S), int((energy < share * energy[-1] * (1 - 1e-12)).sum()) + 1)


def effective_rank(sigma_S: Tensor) -> float:
    """Return the exponential of the entropy of the normalised spectrum, in [1, S]; 0 for a zero weight.

    p_i = s_i / sum_j s_j        erank = exp(-sum_i p_i log p_i)

    Source:
        Roy and Vetterli, "The effective rank", 2007.
    """
    total = sigma_S.sum()
    if total == 0:
        return 0.0
    p = sigma_S[sigma_S > 0] / total
    return float((-(p * p.log()).sum()).exp())


def importance_shares(similarity: Mapping[str, float], mrr: float, trr: float) -> dict[str, float]:
    """Return the protected share of each weight under the paper's adaptive rule.

        I_l = similarity_l / mean(similarity)        r_l = mrr + I_l (trr - mrr)

    Args:
        similarity: mean cosine between inputs and outputs of each layer over the calibration inputs.
        mrr: minimum retention ratio, of a layer with I = 0; the paper's 0.1.
        trr: target retention ratio, of a layer of mean importance; the paper's 0.8.

    Returns:
        Shares, not yet clamped to [0, 1]: ``share_to_count`` does that.

    Raises:
        LoricaError: the mean similarity is not positive, or so near 0 that a single layer would be more than ten times
            as important as the mean: dividing by it says nothing then.

    Source:
        arXiv 2504.07097, adaptive rank selection.
    """
    mean = sum(similarity.values()) / len(similarity)
    largest = max(map(abs, similarity.values()))
    if not mean > max(1e-6, largest / LARGEST_IMPORTANCE):
        raise LoricaError(
            f"ranks 'importance' is undefined here: inputs and outputs have mean cosine {mean:.2g} over the "
            f"{len(similarity)} weights, single ones up to {largest:.2g}, and the rule divides by that mean; use ranks "
            "'uniform' or 'energy'"
        )
    return {name: mrr + value / mean * (trr - mrr) for name, value in similarity.items()}
