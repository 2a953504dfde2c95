"""What finished tasks leave behind, at a size that does not grow with their number.

Shape suffixes: M output rows, N input columns, J columns, R kept directions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lorica.errors import LoricaError
from lorica.subspace.linalg import Pair
from lorica.subspace.ranks import share_to_count

NOISE = 1e-6
"""Directions with less than this share of the largest singular value are rounding of float32."""


def top_pairs(x_MN: Tensor, rank: int) -> Pair:
    """Return the top singular directions of a matrix, both sides scaled by the singular values.

    With ``X = P S R^T``, the best approximations of that rank to ``X X^T`` and ``X^T X`` are ``F F^T`` and
    ``G G^T``:

        F = P[:, :rank] S[:rank]        G = R[:, :rank] S[:rank]

    Unlike ``split`` it never divides by a singular value: a change has often less rank than is asked for.
    Columns that are ``NOISE`` are left out.

    Args:
        x_MN: any matrix of finite numbers.
        rank: at most this many columns.

    Returns:
        F (M x R) and G (N x R), float64, orthogonal columns, largest first, R <= rank.
    """
    x_MN = x_MN.double()
    wide = x_MN.shape[0] < x_MN.shape[1]
    long_by_short = x_MN.T if wide else x_MN
    energies, vectors = torch.linalg.eigh(long_by_short.T @ long_by_short)
    sigma = energies.flip(0)[:rank].clamp_min(0).sqrt()
    kept = int((sigma > NOISE * sigma.max()).sum()) if len(sigma) else 0
    short = vectors.flip(1)[:, :kept]
    f, g = long_by_short @ short, short * sigma[:kept]
    return (g, f) if wide else (f, g)


class LearnedDirections:
    """The directions in which finished tasks changed each weight.

    Of a change D = P S R^T the top r pairs are kept, r = floor(share min(M, N)), as F = P S and G = R S. The
    pairs of several tasks are merged side by side: the top r left singular directions of ``[F_old, F_new]``,
    scaled by the singular values, so that ``F F^T`` stays near ``sum_t D_t D_t^T`` and ``G G^T`` near
    ``sum_t D_t^T D_t``. A weight takes r (M + N) numbers however many tasks there were, and what was learned
    along small singular values makes room first.

    Args:
        share: of min(M, N), 0 (nothing is kept) to 1.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._factors: dict[str, Pair] = {}

    def add(self, name: str, delta_MN: Tensor) -> None:
        """Merge what a finished task changed in one weight, (out, in).

        Raises:
            LoricaError: the change holds NaN or inf.
        """
        rank = share_to_count(self.share, min(delta_MN.shape))
        if not bool(torch.isfinite(delta_MN).all()):
            raise LoricaError(f"{name}: the trained weight holds NaN or inf; there is nothing to protect in it")
        sides = top_pairs(delta_MN, rank)
        if name in self._factors:
            self._check(name, delta_MN.shape)
            stacked = (torch.cat([old.to(new), new], 1) for old, new in zip(self._factors[name], sides, strict=True))
            f, g = (top_pairs(both, rank)[0] for both in stacked)
            sides = f, g
        f, g = (side.float().cpu().contiguous() for side in sides)
        self._factors[name] = f, g

    def directions(self, name: str, shape: tuple[int, int]) -> Pair | None:
        """Return the unit directions (M x R, N x R) that are kept of one weight, float64; None if there are none.

        Raises:
            LoricaError: they are those of a weight of another shape.
        """
        if name not in self._factors:
            return None
        self._check(name, shape)
        rank = share_to_count(self.share, min(shape))
        u, v = (side[:, :rank].double() for side in self._factors[name])
        return (u / u.norm(dim=0), v / v.norm(dim=0)) if u.shape[1] or v.shape[1] else None

    def state_dict(self) -> dict[str, Tensor]:
        """Return F and G by name (float32)."""
        lefts = {f"{name}.u": f for name, (f, _) in self._factors.items()}
        return lefts | {f"{name}.v": g for name, (_, g) in self._factors.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state_dict`` returned."""
        names = [key.removesuffix(".u") for key in state if key.endswith(".u")]
        self._factors = {name: (state[f"{name}.u"], state[f"{name}.v"]) for name in names}

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        kept = tuple(len(side) for side in self._factors[name])
        if kept != tuple(shape):
            raise LoricaError(
                f"{name} is {shape[0]} x {shape[1]}, and what is remembered of finished tasks is of a weight of "
                f"{kept[0]} x {kept[1]}: it belongs to another model"
            )
