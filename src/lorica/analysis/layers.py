"""What one weight and its inputs look like: the spectrum, and where the energy of the inputs lies.

Shape suffixes: M output rows, N input columns, S = min(M, N), B protected input directions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lorica.errors import LoricaError
from lorica.subspace.factor import Factor, Factors
from lorica.subspace.linalg import singular_values, spectrum_points
from lorica.subspace.observe import InputStatistics
from lorica.subspace.plan_entry import PlanEntry
from lorica.subspace.prediction import energy_shares
from lorica.subspace.ranks import effective_rank
from lorica.subspace.sources import protected_directions


def squared_share(sigma_S: Tensor, k: int) -> float | None:
    """Return ``sum_{i <= k} s_i^2 / sum_i s_i^2``; None for a zero weight."""
    energy = sigma_S.square()
    total = energy.sum().item()
    return energy[:k].sum().item() / total if total > 0 else None


def describe_layer(
    weight_MN: Tensor, entry: PlanEntry, statistics: InputStatistics, factors: Factors | None = None
) -> dict[str, Any]:
    """Return the measures of one layer, as plain data.

    Args:
        weight_MN: the weight, (out, in).
        entry: what would be protected in it.
        statistics: of the layer's calibration inputs, with moments.
        factors: what was measured for the plan, if its source needs it.

    Raises:
        LoricaError: the weight holds NaN or inf.
    """
    try:
        sigma_S = singular_values(weight_MN)
    except LoricaError as error:
        raise LoricaError(f"{entry.name}: {error}") from error
    assert statistics.moment_NN is not None
    directions = protected_directions(weight_MN, entry, factors)
    energy = energy_shares(Factor.of(statistics.moment_NN), directions.v_NB)
    return {
        "spectrum": spectrum_points(sigma_S),
        "effective_rank": effective_rank(sigma_S),
        "squared_share": squared_share(sigma_S, entry.k),
        "similarity": statistics.similarity,
        "energy": energy._asdict() if energy else None,
    }
