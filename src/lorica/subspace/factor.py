"""One Kronecker factor of the loss's curvature: a second moment, as its principal directions and a floor beneath them.

Shape suffixes: D the dimension of one side of a weight, R kept directions, K wanted directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.errors import LoricaError
from lorica.subspace.learned import top_pairs


@dataclass(frozen=True, eq=False)
class Factor:
    """A second moment ``E[x x^T]``, approximated by

        A = V diag(e) V^T + floor (I - V V^T)

    exact in the span of V, and of the right trace: what V leaves out is taken to be the same in all other directions.

    Attributes:
        vectors_DR: V, orthonormal columns to the rounding of their dtype, the largest energy first.
        energies_R: e, descending, float64, none below ``floor``.
        floor: mean energy of the directions that V leaves out, 0 where it leaves none.
    """

    vectors_DR: Tensor
    energies_R: Tensor
    floor: float = 0.0

    @classmethod
    def of(cls, moment_DD: Tensor, rank: int | None = None) -> Factor:
        """Return the factor of a symmetric positive semi-definite matrix; ``rank``: keep so many directions."""
        energies, vectors = torch.linalg.eigh(moment_DD.double())
        return cls.cut(vectors.flip(1), energies.flip(0), float(moment_DD.double().trace()), rank)

    @classmethod
    def cut(cls, vectors_DR: Tensor, energies_R: Tensor, trace: float, rank: int | None = None) -> Factor:
        """Return the first ``rank`` of these principal directions; the rest of the trace becomes the floor."""
        dim, found = vectors_DR.shape
        kept = found if rank is None else min(rank, found)
        energies = energies_R[:kept].clamp_min(0)
        rest = max(trace - float(energies.sum()), 0.0) / (dim - kept) if kept < dim else 0.0
        floor = min(rest, float(energies[-1])) if kept else rest  # a sketch may have missed some of what it kept
        return cls(vectors_DR[:, :kept].contiguous(), energies, floor)

    @property
    def dim(self) -> int:
        """D."""
        return self.vectors_DR.shape[0]

    @property
    def trace(self) -> float:
        """Sum of all D energies."""
        return float(self.energies_R.sum()) + self.floor * (self.dim - len(self.energies_R))

    def directions(self, k: int, device: torch.device | None = None) -> Tensor:
        """Return the top k principal directions, D x K, float64, orthonormal to its rounding.

        Beyond those that were kept all directions have the same energy; some of them are drawn, always the same.
        """
        kept = self.vectors_DR[:, :k].to(device or self.vectors_DR.device, torch.float64)
        if kept.shape[1] == k and self.vectors_DR.dtype == torch.float64:
            return kept
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(self.dim, k - kept.shape[1], generator=generator, dtype=torch.float64).to(kept.device)
        return torch.linalg.qr(torch.cat([kept, drawn], dim=1))[0]

    def aside(self, dtype: torch.dtype) -> Factor:
        """Return it as it is kept: on the CPU, its directions in this dtype."""
        return Factor(self.vectors_DR.to(dtype).cpu(), self.energies_R.cpu(), self.floor)

    def cut_to(self, rank: int) -> Factor:
        """Return it with at most so many directions, of the same trace."""
        return Factor.cut(self.vectors_DR, self.energies_R, self.trace, rank)

    def same_as(self, other: Factor) -> bool:
        """Return whether two factors are equal to the last bit."""
        alike = self.floor == other.floor and torch.equal(self.energies_R, other.energies_R)
        return alike and torch.equal(self.vectors_DR, other.vectors_DR)

    def check_side(self, name: str, dim: int) -> None:
        """Raise unless what is remembered has the dimension of a layer's side."""
        if self.dim != dim:
            raise LoricaError(
                f"{name} has a side of {dim}, and what is remembered of finished tasks has {self.dim}: it belongs to "
                "another model"
            )

    def scaled(self, by: float) -> Factor:
        """Return the factor of ``by A``."""
        return Factor(self.vectors_DR, self.energies_R * by, self.floor * by)

    def plus(self, other: Factor, rank: int) -> Factor:
        """Return the factor of the sum of both, cut to ``rank`` directions; the sum of the traces stays."""
        excess = [one.above_floor() for one in (self, other)]
        thin_DR, _ = top_pairs(torch.cat([excess[0], excess[1].to(excess[0])], dim=1), rank)
        vectors_DR = torch.linalg.qr(thin_DR)[0]  # the small ones of top_pairs are orthogonal to 1e-4 only
        energies_R = thin_DR.square().sum(0) + self.floor + other.floor
        return Factor.cut(vectors_DR, energies_R, self.trace + other.trace, rank)

    def filled(self, rank: int) -> Factor:
        """Return it with at least so many directions: those beyond the kept ones are drawn, of the floor's energy."""
        missing = rank - len(self.energies_R)
        if missing <= 0:
            return self
        energies = torch.cat([self.energies_R, self.energies_R.new_full((missing,), self.floor)])
        return Factor(self.directions(rank), energies, self.floor)

    def above_floor(self, device: torch.device | None = None) -> Tensor:
        """Return F (D x R, float64) of ``A = F F^T + floor I``."""
        directions = self.directions(len(self.energies_R), device)
        return directions * (self.energies_R - self.floor).clamp_min(0).sqrt().to(directions.device)

    def matrix(self) -> Tensor:
        """Return A itself, D x D, float64. For narrow sides and for tests."""
        v = self.vectors_DR.double()
        rest = torch.eye(self.dim, dtype=torch.float64, device=v.device) * self.floor
        return v * (self.energies_R.to(v) - self.floor) @ v.T + rest


@dataclass(frozen=True)
class Factors:
    """What was measured of one layer; None: not measured.

    ``B kron A`` is the K-FAC form of the Fisher matrix of its weight, so that a change D moves a prediction by about
    ``tr(B D A D^T) / 2``.

    Attributes:
        inputs: A, the mean of x x^T over the positions that the layer sees.
        outputs: B, the sum of g g^T over them for each prediction, g the gradient of its loss by the layer's outputs.
    """

    inputs: Factor | None = None
    outputs: Factor | None = None
